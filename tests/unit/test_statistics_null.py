# SPDX-License-Identifier: Apache-2.0
"""A/B tests of two equal arms, with sampling: how often the statistics find what is not there.

Each simulated prompt has its own rate (or mean) and both arms sample from it, so arms agree over
prompts as real ones do. Bounds are those of the binomial distribution of the count of rejections,
at 99.9%; seeds are fixed.
"""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats

from cna_vllm.evaluation.statistics import Comparison, adjust, compare_arms

RUNS = 300
PROMPTS = 60
LEVEL = 0.05
CERTAINTY = 0.999


def answers(seed: int, kind: str, shift: float = 0.0) -> NDArray[np.float64]:
    """Scores [2, PROMPTS] of two arms; equal in distribution, but for `shift` of the second."""
    draw = np.random.default_rng(seed)
    if kind == "binary":
        rates = draw.beta(0.7, 0.7, PROMPTS)
        return (draw.random((2, PROMPTS)) < [rates, np.clip(rates + shift, 0, 1)]).astype(float)
    means = draw.normal(size=PROMPTS)
    scores = means + draw.exponential(size=(2, PROMPTS))  # skewed, as lengths and losses are
    scores[1] += shift
    return scores


def runs(kind: str, shift: float = 0.0) -> list[Comparison]:
    made = []
    for seed in range(RUNS):
        a, b = answers(seed, kind, shift).tolist()
        made.append(compare_arms(kind, a, b, seed=seed, resamples=599))  # type: ignore[arg-type]
    return made


@pytest.fixture(scope="module", params=["binary", "continuous"])
def null(request: pytest.FixtureRequest) -> list[Comparison]:
    return runs(request.param)


def rejected(comparisons: list[Comparison]) -> int:
    return sum(c.p_value is not None and c.p_value <= LEVEL for c in comparisons)


def test_equal_arms_are_told_apart_at_the_stated_rate(null: list[Comparison]) -> None:
    count = rejected(null)
    # The exact McNemar test is conservative, so it is bound from above only.
    assert count <= stats.binom.ppf(CERTAINTY, RUNS, LEVEL)
    if null[0].kind == "continuous":
        assert count >= stats.binom.ppf(1 - CERTAINTY, RUNS, LEVEL)


def test_intervals_cover_no_difference_at_the_stated_rate(null: list[Comparison]) -> None:
    covered = 0
    for comparison in null:
        assert comparison.ci_difference is not None
        low, high = comparison.ci_difference
        covered += low <= 0 <= high
    low, high = stats.binom.interval(CERTAINTY, RUNS, 1 - LEVEL)
    assert low <= covered <= high


def test_a_family_of_equal_arms_is_told_apart_at_the_stated_rate(null: list[Comparison]) -> None:
    families = [adjust(null[i : i + 4]) for i in range(0, RUNS, 4)]
    found = sum(any((c.p_holm or 1) <= LEVEL for c in family) for family in families)
    assert found <= stats.binom.ppf(CERTAINTY, len(families), LEVEL)


@pytest.mark.parametrize("kind", ["binary", "continuous"])
def test_the_simulation_can_find_a_difference(kind: str) -> None:
    assert rejected(runs(kind, shift=0.6)) > 0.9 * RUNS
