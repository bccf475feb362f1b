# SPDX-License-Identifier: Apache-2.0
"""Rows of single prompts: joined from all ranks, or refused with the bytes they would need."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from cna_vllm.discovery.activations import check_bytes, place_rows
from cna_vllm.discovery.prefill import Dimensions, DiscoveryError
from cna_vllm.serving.worker.sinks import Rows

LAYERS, WIDTH, PROMPTS = 4, 6, 5
SIZE = Dimensions(LAYERS, WIDTH)
WHOLE = np.random.default_rng(0).standard_normal((LAYERS, PROMPTS, WIDTH)).astype(np.float32)
WANTED = [0, 3]


def share(layers: list[int], offset: int, shift: int) -> dict[str, Any]:
    """What a rank of half the width says, prompts in an order of its own."""
    kept = [layer for layer in WANTED if layer in layers]
    rows = Rows([layers.index(k) for k in kept], PROMPTS, 3, torch.float32, torch.device("cpu"))
    for i in range(PROMPTS):
        at = (i + shift) % PROMPTS
        rows.add(str(at), torch.from_numpy(WHOLE[layers, at, offset : offset + 3].copy()))
    report = {"layers": kept, **rows.report()}
    return {"layers": layers, "offset": offset, "width": 3, "rows": report}


def shares() -> list[dict[str, Any]]:
    """Two stages by two ranks."""
    return [share([0, 1], 3, 2), share([2, 3], 0, 1), share([2, 3], 3, 0), share([0, 1], 0, 4)]


def test_rows_of_all_ranks_in_the_order_of_the_prompts() -> None:
    rows = np.zeros((len(WANTED), PROMPTS, WIDTH), dtype=np.float32)
    place_rows(shares(), range(PROMPTS), WANTED, SIZE, rows)
    assert np.array_equal(rows, WHOLE[WANTED])


@pytest.mark.parametrize("missing", range(4))
def test_a_missing_share_is_refused(missing: int) -> None:
    reports = shares()
    del reports[missing]
    rows = np.zeros((len(WANTED), PROMPTS, WIDTH), dtype=np.float32)
    with pytest.raises(RuntimeError, match="a worker's share is missing"):
        place_rows(reports, range(PROMPTS), WANTED, SIZE, rows)


def test_a_missing_prompt_is_refused() -> None:
    rows = np.zeros((len(WANTED), PROMPTS + 1, WIDTH), dtype=np.float32)
    with pytest.raises(RuntimeError, match="5 of 6 prompts"):
        place_rows(shares(), range(PROMPTS + 1), WANTED, SIZE, rows)


def test_the_limit_names_the_bytes_and_the_fix() -> None:
    check_bytes(100, 100)
    with pytest.raises(DiscoveryError, match=r"need 101 bytes, over max_bytes = 100; raise"):
        check_bytes(101, 100)
