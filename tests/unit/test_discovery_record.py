# SPDX-License-Identifier: Apache-2.0
"""Two sets of prompts that can be contrasted; joining the shares of all ranks and stages, or
refusing to."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from cna_vllm.discovery.prefill import DiscoveryError, check_sets
from cna_vllm.discovery.shares import assemble
from cna_vllm.steering.layout import Layout
from cna_vllm.steering.shape import Shape

LAYERS, WIDTH = 5, 8
SIZE = Layout(Shape.of(LAYERS, WIDTH))
STAGES, OFFSETS = ([0, 1, 2], [3, 4]), (0, 4)
COUNTS = {"positive": 3, "negative": 2}


@pytest.mark.parametrize("times", [1, 2])
def test_sets_of_equal_shares_are_the_same(times: int) -> None:
    """For circuits and for vectors: equal shares have equal means, however often they repeat."""
    check_sets("CAA", [[1], [2]], [[1], [2], [2]])
    with pytest.raises(DiscoveryError, match="prompts are the same"):
        check_sets("CAA", [[1], [2]], [[2], [1]] * times)
    with pytest.raises(DiscoveryError, match=r"CAA needs at least one .* got 0 and 1"):
        check_sets("CAA", [], [[1]])


def whole(seed: int = 0) -> dict[str, NDArray[np.float64]]:
    random = np.random.default_rng(seed)
    return {group: random.standard_normal((LAYERS, WIDTH)) for group in COUNTS}


def share(
    sums: dict[str, NDArray[np.float64]], layers: list[int], offset: int, width: int
) -> dict[str, Any]:
    groups = {
        group: {
            "count": COUNTS[group],
            "sum": total[layers, offset : offset + width].tobytes(),
            "reached": np.full(len(layers), COUNTS[group]).tobytes(),
        }
        for group, total in sums.items()
    }
    parts = np.array([(layer, -1, offset, width) for layer in layers], dtype=np.int32)
    return {"parts": parts.tobytes(), "groups": groups}


def shares(sums: dict[str, NDArray[np.float64]]) -> list[dict[str, Any]]:
    """Two ranks by two stages."""
    return [share(sums, layers, offset, 4) for layers in STAGES for offset in OFFSETS]


@given(st.permutations(range(4)), st.integers(0, 5))
@settings(max_examples=40, deadline=None)
def test_two_ranks_by_two_stages_in_any_order(order: list[int], seed: int) -> None:
    sums = whole(seed)
    reports = shares(sums)
    recorded = assemble([reports[i] for i in order], COUNTS, SIZE)
    assert set(recorded) == set(COUNTS)
    for group, count in COUNTS.items():
        assert recorded[group].mean.dtype == np.float64
        assert np.array_equal(recorded[group].mean, (sums[group] / count).reshape(-1))
        assert recorded[group].routed.tolist() == [count] * LAYERS


def test_one_rank_and_a_group_that_nobody_asked_for() -> None:
    sums = whole()
    recorded = assemble([share(sums, list(range(LAYERS)), 0, WIDTH)], {"positive": 3}, SIZE)
    assert set(recorded) == {"positive"}
    assert np.array_equal(recorded["positive"].mean, (sums["positive"] / 3).reshape(-1))


def test_a_stage_without_layers_has_nothing_to_add() -> None:
    sums = whole()
    recorded = assemble([*shares(sums), share(sums, [], 0, 1)], COUNTS, SIZE)
    assert np.array_equal(recorded["negative"].mean, (sums["negative"] / 2).reshape(-1))


@pytest.mark.parametrize("missing", range(4))
def test_a_missing_share_is_refused(missing: int) -> None:
    """No mean with holes in it leaves this function."""
    reports = shares(whole())
    del reports[missing]
    with pytest.raises(RuntimeError):
        assemble(reports, COUNTS, SIZE)


def test_no_share_at_all_is_refused() -> None:
    with pytest.raises(RuntimeError):
        assemble([], COUNTS, SIZE)


@pytest.mark.parametrize("at", range(4))
@pytest.mark.parametrize("group", sorted(COUNTS))
@pytest.mark.parametrize("change", [-1, 1])
def test_a_miscounted_share_is_refused(at: int, group: str, change: int) -> None:
    reports = shares(whole())
    reports[at]["groups"][group]["count"] += change
    count = COUNTS[group]
    with pytest.raises(RuntimeError, match=rf"{count + change} of {count} prompts.*'{group}'"):
        assemble(reports, COUNTS, SIZE)


@pytest.mark.parametrize("at", range(4))
@pytest.mark.parametrize("group", sorted(COUNTS))
def test_a_share_without_a_group_is_refused(at: int, group: str) -> None:
    reports = shares(whole())
    del reports[at]["groups"][group]
    with pytest.raises(RuntimeError, match=rf"0 of {COUNTS[group]} prompts.*'{group}'"):
        assemble(reports, COUNTS, SIZE)
