# SPDX-License-Identifier: Apache-2.0
"""Statistics of paired arms against scipy, statsmodels and published worked examples."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Iterator
from dataclasses import asdict
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from cna_vllm.evaluation.outcomes import Analysis, Scored, outcomes
from cna_vllm.evaluation.sample_size import (
    connor,
    mcnemar_power,
    pairs_for_means,
    pairs_for_rates,
)
from cna_vllm.evaluation.statistics import (
    adjust,
    bootstrap_mean,
    compare_arms,
    holm,
    mcnemar_exact,
    paired_permutation,
    wilson,
)

SCORE = st.none() | st.sampled_from([0.0, 1.0])
NUMBER = st.none() | st.floats(-1e6, 1e6) | st.sampled_from([0.0, 1.0])


@pytest.fixture(autouse=True)
def no_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def pairs(both: int, only_a: int, only_b: int, neither: int) -> tuple[list[float], list[float]]:
    a = [1.0] * (both + only_a) + [0.0] * (only_b + neither)
    b = [1.0] * both + [0.0] * only_a + [1.0] * only_b + [0.0] * neither
    return a, b


def test_wilson_published() -> None:
    # Newcombe, Statistics in Medicine 17 (1998) 857, Table I, method 3.
    for successes, n, low, high in (
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ):
        assert wilson(successes, n) == pytest.approx((low, high), abs=5e-5)


def test_wilson_is_scipys() -> None:
    for successes, n, confidence in product((0, 3, 7), (7, 50), (0.8, 0.95, 0.99)):
        theirs = stats.binomtest(successes, n).proportion_ci(confidence, method="wilson")
        assert wilson(successes, n, confidence) == pytest.approx((theirs.low, theirs.high))


def test_wilson_at_the_edges() -> None:
    assert wilson(0, 0) == (0.0, 1.0)
    assert wilson(0, 5)[0] == 0.0
    assert wilson(5, 5)[1] == 1.0
    for successes, n in ((-1, 5), (6, 5), (1, 0)):
        with pytest.raises(ValueError, match="must be between 0 and n="):
            wilson(successes, n)
    for confidence in (0.0, 1.0, 95.0, math.nan):
        with pytest.raises(ValueError, match=f"confidence={confidence} must lie between"):
            wilson(1, 5, confidence)


def test_mcnemar_published() -> None:
    # Agresti, Categorical Data Analysis, approval of the Prime Minister: 150 against 86.
    found = compare_arms("binary", *pairs(794, 150, 86, 570), resamples=199)
    assert (found.n, found.only_a, found.only_b) == (1600, 150, 86)
    assert found.p_value == mcnemar_exact(150, 86)
    assert found.p_value == pytest.approx(stats.binomtest(86, 236, 0.5).pvalue)
    assert found.p_value == pytest.approx(3.716e-5, rel=1e-3)


@pytest.mark.parametrize(("only_a", "only_b"), list(product(range(8), range(8))))
def test_mcnemar_is_the_binomial_test(only_a: int, only_b: int) -> None:
    total = only_a + only_b
    expected = stats.binomtest(only_a, total, 0.5).pvalue if total else 1.0
    assert mcnemar_exact(only_a, only_b) == pytest.approx(expected)


def test_bootstrap_is_scipys_paired_bootstrap() -> None:
    draw = np.random.default_rng(0)
    a, b = draw.exponential(size=(2, 40))
    ours = bootstrap_mean(b - a, confidence=0.9, seed=5)
    theirs = stats.bootstrap(
        (a, b),
        lambda x, y, axis: np.mean(y - x, axis=axis),
        paired=True,
        vectorized=True,
        confidence_level=0.9,
        rng=np.random.default_rng(5),
    ).confidence_interval
    assert ours == pytest.approx((theirs.low, theirs.high))
    assert ours == bootstrap_mean(b - a, confidence=0.9, seed=5)
    assert ours != bootstrap_mean(b - a, confidence=0.9, seed=6)


def test_permutation_published_and_exact() -> None:
    # Fisher, The Design of Experiments (1935), section 21: Darwin's maize, in eighths of an inch.
    # Of the 32768 arrangements of signs, 863 have a total of at least 314: p = 2 * 863 / 32768.
    darwin = np.array([49.0, -67, 8, 16, 6, 23, 28, 41, 14, 29, 56, 24, 75, 60, -48])
    assert paired_permutation(darwin, resamples=2**15) == pytest.approx(2 * 863 / 2**15)
    assert paired_permutation(darwin) == pytest.approx(2 * 863 / 2**15, abs=0.008)
    assert paired_permutation(-darwin) == pytest.approx(paired_permutation(darwin))


def test_permutation_by_counting_all_signs() -> None:
    for values in ([1.0, 2.0, 3.0], [0.0, 0.0, 1.0, 4.0], [1.0, -1.0, 2.5, 0.0, 3.0]):
        sums = [sum(s * v for s, v in zip(p, values, strict=True)) for p in signs(len(values))]
        extreme = sum(abs(s) >= abs(sum(values)) - 1e-12 for s in sums)
        found = paired_permutation(np.array(values))
        assert found == pytest.approx(extreme / len(sums))


def signs(count: int) -> list[tuple[int, ...]]:
    return list(product((-1, 1), repeat=count))


def test_holm_by_hand() -> None:
    # In order of size: 4 * 0.005, 3 * 0.01, 2 * 0.03, and 0.04, which may not fall below 0.06.
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([0.02, None, 0.03]) == [pytest.approx(0.04), None, pytest.approx(0.04)]
    assert holm([]) == [] and holm([None]) == [None]


def test_compare_binary() -> None:
    a, b = pairs(40, 30, 5, 25)
    found = compare_arms("binary", a, b, seed=1)
    assert (found.n, found.n_dropped, found.test) == (100, 0, "exact McNemar")
    assert (found.estimate_a, found.estimate_b) == (0.7, 0.45)
    assert found.difference == pytest.approx(-0.25)
    assert (found.ci_a, found.ci_b) == (wilson(70, 100), wilson(45, 100))
    assert found.p_value == pytest.approx(stats.binomtest(5, 35, 0.5).pvalue)
    assert (found.only_a, found.only_b) == (30, 5)
    low, high = found.ci_difference or (0, 0)
    # Wald interval for paired rates (Agresti): -0.25 +- 1.96 * 0.0536.
    assert (low, high) == pytest.approx((-0.355, -0.145), abs=0.015)


def test_compare_continuous() -> None:
    draw = np.random.default_rng(2)
    a = draw.normal(size=60)
    b = a + draw.normal(0.5, 0.5, size=60)
    found = compare_arms("continuous", a.tolist(), b.tolist(), confidence=0.9, seed=3)
    assert found.test == "paired permutation" and found.only_a is found.only_b is None
    assert found.difference == pytest.approx(float(np.mean(b - a)))
    assert found.ci_difference == bootstrap_mean(b - a, confidence=0.9, seed=3)
    assert found.ci_a == bootstrap_mean(a, confidence=0.9, seed=3)
    assert found.p_value == pytest.approx(2 / 10_000)  # no random signs are as extreme
    assert found == compare_arms("continuous", a.tolist(), b.tolist(), confidence=0.9, seed=3)


def test_pairs_with_a_missing_score_are_dropped() -> None:
    a = [1.0, None, 0.0, 1.0, None]
    b = [1.0, 1.0, None, 0.0, None]
    found = compare_arms("binary", a, b)
    assert (found.n, found.n_dropped, found.missing_a, found.missing_b) == (2, 3, 2, 2)
    assert (found.estimate_a, found.estimate_b) == (1.0, 0.5)


@pytest.mark.parametrize("kind", ["binary", "continuous"])
def test_too_little_data(kind: str) -> None:
    for scores in ([], [None, None]):
        empty = compare_arms(kind, scores, scores)  # type: ignore[arg-type]
        assert (empty.n, empty.estimate_a, empty.difference, empty.p_value) == (0, None, None, None)
        assert empty.ci_a is empty.ci_difference is None
    one = compare_arms(kind, [0.0], [1.0])  # type: ignore[arg-type]
    assert (one.n, one.difference, one.ci_difference, one.p_value) == (1, 1.0, None, 1.0)
    same = compare_arms(kind, [0.0, 1.0, 1.0], [0.0, 1.0, 1.0])  # type: ignore[arg-type]
    assert (same.difference, same.ci_difference, same.p_value) == (0.0, None, 1.0)
    shifted = compare_arms(kind, [0.0] * 3, [1.0] * 3)  # type: ignore[arg-type]
    assert (shifted.difference, shifted.ci_difference, shifted.p_value) == (1.0, None, 0.25)
    assert (one.ci_a == wilson(0, 1)) if kind == "binary" else one.ci_a is None


@given(st.sampled_from(["binary", "continuous"]), st.data())
@settings(deadline=None, max_examples=60)
def test_nothing_leaks(kind: str, data: st.DataObject) -> None:
    score = SCORE if kind == "binary" else NUMBER
    a, b = zip(*data.draw(st.lists(st.tuples(score, score), min_size=1, max_size=30)), strict=True)
    found = compare_arms(kind, a, b, resamples=199)  # type: ignore[arg-type]
    assert json.loads(json.dumps(asdict(found), allow_nan=False))["n"] == found.n
    assert found.n + found.n_dropped == len(a)
    if found.p_value is not None:
        assert 0 < found.p_value <= 1
    for interval in (found.ci_a, found.ci_b, found.ci_difference):
        assert interval is None or interval[0] <= interval[1]


def test_adjust_is_one_family() -> None:
    made = [compare_arms("binary", *pairs(5, k, 0, 5), seed=0) for k in (0, 5, 9)]
    made.append(compare_arms("binary", [], []))
    adjusted = adjust(made)
    assert [c.p_holm for c in adjusted] == holm([c.p_value for c in made])
    assert adjusted[3].p_holm is None and all(c.p_holm is None for c in made)


@pytest.mark.parametrize(
    ("kind", "a", "b", "says"),
    [
        ("ordinal", [1.0], [1.0], "metric_kind='ordinal'"),
        ("binary", [1.0], [], "is shorter than argument 1"),
        ("binary", [2.0], [1.0], r"score 2\.0 of a binary metric"),
        ("continuous", [math.nan], [1.0], "finite numbers"),
    ],
)
def test_bad_scores(kind: str, a: list[float], b: list[float], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        compare_arms(kind, a, b)  # type: ignore[arg-type]


def test_connor_by_hand() -> None:
    # p10 = 0.25, p01 = 0.1: (1.959964 sqrt(.35) + .841621 sqrt(.3275))^2 / .0225 = 119.5.
    assert connor(0.35, 0.15, 0.05, 0.8) == 120


def test_mcnemar_power_against_simulation() -> None:
    for n, only_a, only_b in ((20, 0.5, 0.1), (60, 0.25, 0.1), (10, 0.9, 0.1)):
        shares = [only_a, only_b, max(0.0, 1 - only_a - only_b)]
        draws = np.random.default_rng(n).multinomial(n, shares, size=2000)
        rejected = [
            x + y > 0 and stats.binomtest(int(x), int(x + y), 0.5).pvalue <= 0.05
            for x, y, _ in draws
        ]
        low, high = stats.binom.interval(0.9999, 2000, mcnemar_power(n, only_a, only_b))
        assert low <= sum(rejected) <= high
    assert mcnemar_power(50, 0, 0) == 0.0
    assert mcnemar_power(5, 0.9, 0.1) == 0.0  # five pairs cannot reach 0.05


@pytest.mark.parametrize("rates", [(0.9, 0.34), (0.5, 0.4), (0.2, 0.25), (0.0, 0.1)])
def test_sample_size_of_rates_is_the_turning_point(rates: tuple[float, float]) -> None:
    both = rates[0] * rates[1]
    shares = rates[0] - both, rates[1] - both
    n = pairs_for_rates(*shares)
    assert n is not None
    assert mcnemar_power(n, *shares) >= 0.8
    assert mcnemar_power(n - 1, *shares) < 0.8
    assert n >= connor(sum(shares), shares[0] - shares[1], 0.05, 0.8)
    assert pairs_for_rates(*reversed(shares)) == n
    assert (pairs_for_rates(*shares, power=0.9) or 0) > n


def test_sample_size_of_means_published() -> None:
    # G*Power 3, difference between two dependent means, two-sided: Faul et al. (2007).
    assert pairs_for_means(0.5) == 34
    assert pairs_for_means(0.2) == 199
    assert pairs_for_means(0.8) == 15
    assert pairs_for_means(-0.5, power=0.95) == 54
    assert pairs_for_means(50.0) == 2


@pytest.mark.parametrize(
    ("shares", "options"),
    [
        ((0.25, 0.25), {}),
        ((0.81, 0.01), {"alpha": 5.0}),
        ((0.81, 0.01), {"power": 0.01}),
        ((0.81, 0.01), {"power": 1.0}),
        ((0.24995, 0.25005), {}),  # more than a million
    ],
)
def test_impossible_sample_sizes(shares: tuple[float, float], options: dict[str, float]) -> None:
    assert pairs_for_rates(*shares, **options) is None


@pytest.mark.parametrize(
    ("effect", "options"), [(0.0, {}), (1e-4, {}), (0.5, {"power": 0.05}), (0.5, {"power": 1.0})]
)
def test_impossible_effects(effect: float, options: dict[str, float]) -> None:
    assert pairs_for_means(effect, **options) is None


def test_a_control_that_is_no_arm() -> None:
    scores = {"plain": [[1.0]], "off": [[0.0]]}
    scored = Scored("refusal", "binary", "p", scores)
    with pytest.raises(ValueError, match="control 'no' is not an arm; use one of plain, off"):
        outcomes([scored], "no", Analysis())
