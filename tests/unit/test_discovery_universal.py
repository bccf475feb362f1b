# SPDX-License-Identifier: Apache-2.0
"""Universal neurons: membership joined from all ranks against a count written out."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from cna_vllm.discovery.contrast import select_neurons
from cna_vllm.discovery.universal import GROUP, UniversalRule, diverse_prompts, membership
from cna_vllm.serving.worker.sinks import Top
from cna_vllm.steering.layout import Layout
from cna_vllm.steering.shape import Shape

LAYERS, WIDTH = 5, 8
SIZE = Layout(Shape.of(LAYERS, WIDTH))
# Whole model, two tensor-parallel ranks, two pipeline stages of two ranks, a stage without layers.
SHARES: list[list[tuple[list[int], int, int]]] = [
    [(list(range(LAYERS)), 0, WIDTH)],
    [(list(range(LAYERS)), 4, 4), (list(range(LAYERS)), 0, 4)],
    [([0, 1, 2], 0, 4), ([3, 4], 4, 4), ([0, 1, 2], 4, 4), ([3, 4], 0, 4), ([], 0, 1)],
]


def report(
    prompts: NDArray[np.float32], k: int, layers: list[int], offset: int, width: int, shift: int
) -> dict[str, Any]:
    """What a rank with these layers and columns says; ranks may see prompts in another order."""
    top = Top(k, len(prompts), len(layers) * width, torch.device("cpu"))
    for i in range(len(prompts)):
        at = (i + shift) % len(prompts)
        values = prompts[at][layers, offset : offset + width].reshape(-1).copy()
        top.add(f"request-{at}", torch.from_numpy(values), torch.ones(len(layers)))
    return {"parts": parts(layers, offset, width), "top": {GROUP: top.report()}}


def parts(layers: list[int], offset: int, width: int) -> bytes:
    rows = [(layer, -1, offset, width) for layer in layers]
    return np.array(rows, dtype=np.int32).tobytes()


def naive(prompts: NDArray[np.float32], k: int) -> NDArray[np.int64]:
    counts = np.zeros((LAYERS, WIDTH), dtype=np.int64)
    for values in prompts:
        order = sorted(np.ndindex(LAYERS, WIDTH), key=lambda at: (-abs(values[at]), at))
        for at in order[:k]:
            counts[at] += 1
    return counts


# Few values, so that ties are the rule, also between ranks and at zero.
@given(
    st.integers(0, 2**32 - 1),
    st.integers(1, 6),
    st.integers(1, LAYERS * WIDTH),
    st.sampled_from(SHARES),
    st.booleans(),
)
@settings(max_examples=150, deadline=None)
def test_equals_a_count_written_out(
    seed: int, count: int, k: int, shares: list[Any], ties: bool
) -> None:
    random = np.random.default_rng(seed)
    shape = (count, LAYERS, WIDTH)
    values = random.integers(-2, 3, shape) if ties else random.standard_normal(shape)
    prompts = values.astype(np.float32)
    reports = [report(prompts, k, *share, shift=i) for i, share in enumerate(shares)]
    found = membership(reports, count, k, SIZE)
    assert np.array_equal(found, naive(prompts, k).reshape(-1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_ranked_as_it_is(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(1, LAYERS, WIDTH, generator=generator).to(dtype)
    top = Top(7, 1, LAYERS * WIDTH, torch.device("cpu"))
    top.add("a", values[0].reshape(-1), torch.ones(LAYERS))
    whole = {"parts": parts(list(range(LAYERS)), 0, WIDTH), "top": {GROUP: top.report()}}
    found = membership([whole], 1, 7, SIZE)
    assert np.array_equal(found, naive(values.float().numpy(), 7).reshape(-1))


def test_a_planted_neuron_is_found_excluded_and_k_are_left() -> None:
    random = np.random.default_rng(0)
    prompts = random.standard_normal((20, LAYERS, WIDTH)).astype(np.float32)
    prompts[:17, 2, 3] = -50.0  # strong in 17 of 20, more than 80%
    prompts[:15, 4, 0] = 50.0  # in 15 of 20, fewer
    rule = UniversalRule(fraction=2 / 40, threshold=0.8)
    assert rule.top(SIZE) == 2
    members = membership([report(prompts, 2, *SHARES[0][0], shift=0)], 20, 2, SIZE)
    universal = members >= rule.needed(20)
    assert np.flatnonzero(universal).tolist() == [2 * WIDTH + 3]
    delta = random.standard_normal((LAYERS, WIDTH))
    delta[2, 3] = 9.0
    assert (select_neurons(delta, 4)[0].layer, select_neurons(delta, 4)[0].index) == (2, 3)
    found = select_neurons(delta, 4, excluded=universal)
    assert len(found) == 4 and (2, 3) not in {(n.layer, n.index) for n in found}
    assert select_neurons(delta, 5)[1:] == found


@pytest.mark.parametrize(
    ("threshold", "prompts", "needed"),
    [(0.8, 40, 32), (0.8, 10, 8), (0.7, 10, 7), (0.29, 100, 29), (1.0, 3, 3), (0.1, 3, 1)],
)
def test_the_threshold_is_as_written(threshold: float, prompts: int, needed: int) -> None:
    """0.7 * 10 is 7.000000000000001 in some orders of multiplication; 7 of 10 must do."""
    assert UniversalRule(threshold=threshold).needed(prompts) == needed


def test_a_missing_share_is_refused() -> None:
    prompts = np.ones((3, LAYERS, WIDTH), dtype=np.float32)
    reports = [report(prompts, 2, *share, shift=0) for share in SHARES[2]]
    for missing in range(4):
        with pytest.raises(RuntimeError, match="a worker's share is missing"):
            membership([r for i, r in enumerate(reports) if i != missing], 3, 2, SIZE)
    with pytest.raises(RuntimeError, match="3 of 4 diverse prompts"):
        membership(reports, 4, 2, SIZE)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_values_that_are_not_finite_are_refused(value: float) -> None:
    prompts = np.ones((1, LAYERS, WIDTH), dtype=np.float32)
    prompts[0, 1, 1] = value
    with pytest.raises(ValueError, match="not finite"):
        membership([report(prompts, 1, *SHARES[0][0], shift=0)], 1, 1, SIZE)


def test_the_packaged_prompts() -> None:
    prompts = [p.text for p in diverse_prompts()]
    assert len(prompts) == 40
    assert len(set(prompts)) == len(prompts)
