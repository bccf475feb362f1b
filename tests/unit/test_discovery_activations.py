# SPDX-License-Identifier: Apache-2.0
"""Rows of single prompts: joined from all ranks, or refused with the bytes they would need."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from cna_vllm.discovery.activations import TokenRows, check_bytes, place_rows
from cna_vllm.discovery.prefill import DiscoveryError
from cna_vllm.serving.worker.sinks import Rows
from cna_vllm.steering.layout import Layout
from cna_vllm.steering.shape import Shape

LAYERS, WIDTH, PROMPTS = 4, 6, 5
SIZE = Layout(Shape.of(LAYERS, WIDTH))
WHOLE = np.random.default_rng(0).standard_normal((LAYERS, PROMPTS, WIDTH)).astype(np.float32)
WANTED = [0, 3]


def share(layers: list[int], offset: int, shift: int) -> dict[str, Any]:
    """What a rank of half the width says, prompts in an order of its own."""
    kept = [layer for layer in WANTED if layer in layers]
    places = [slice(3 * layers.index(k), 3 * layers.index(k) + 3) for k in kept]
    rows = Rows(places, PROMPTS, len(layers), torch.float32, torch.device("cpu"))
    reached = torch.ones(len(layers), dtype=torch.uint8)
    for i in range(PROMPTS):
        at = (i + shift) % PROMPTS
        values = WHOLE[layers, at, offset : offset + 3].reshape(-1)
        rows.add(str(at), torch.from_numpy(values.copy()), reached)
    parts = np.array([(layer, -1, offset, 3) for layer in layers], dtype=np.int32)
    return {"parts": parts.tobytes(), "rows": {"layers": kept, **rows.report()}}


def empty(prompts: int) -> TokenRows:
    values = np.zeros((prompts, len(WANTED) * WIDTH), dtype=np.float32)
    return TokenRows((WIDTH,) * len(WANTED), values, np.zeros((prompts, LAYERS), dtype=bool))


def shares() -> list[dict[str, Any]]:
    """Two stages by two ranks."""
    return [share([0, 1], 3, 2), share([2, 3], 0, 1), share([2, 3], 3, 0), share([0, 1], 0, 4)]


def test_rows_of_all_ranks_in_the_order_of_the_prompts() -> None:
    rows = empty(PROMPTS)
    place_rows(shares(), range(PROMPTS), WANTED, SIZE, rows)
    assert np.array_equal(np.stack(rows.by_layer()), WHOLE[WANTED])
    assert rows.reached.all()


@pytest.mark.parametrize("missing", range(4))
def test_a_missing_share_is_refused(missing: int) -> None:
    reports = shares()
    del reports[missing]
    rows = empty(PROMPTS)
    with pytest.raises(RuntimeError, match="a worker's share is missing"):
        place_rows(reports, range(PROMPTS), WANTED, SIZE, rows)


def test_a_missing_prompt_is_refused() -> None:
    rows = empty(PROMPTS + 1)
    with pytest.raises(RuntimeError, match="5 of 6 prompts"):
        place_rows(shares(), range(PROMPTS + 1), WANTED, SIZE, rows)


def test_the_limit_names_the_bytes_and_the_fix() -> None:
    check_bytes(100, 100)
    with pytest.raises(DiscoveryError, match=r"need 101 bytes, over max_bytes = 100; raise"):
        check_bytes(101, 100)
