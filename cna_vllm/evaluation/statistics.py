# SPDX-License-Identifier: Apache-2.0
"""Statistics of paired arms: the same prompts answered by a baseline (a) and by an arm (b).

The pair is the unit: pairs are taken to be independent, so several answers to one prompt are
averaged before they come here. A pair of which either score is None is dropped, and counted.
Methods are those of scipy and statsmodels; what is here is their choice, and what they say where
there is too little data. Nothing returns NaN or warns.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from scipy import stats
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.proportion import proportion_confint

from cna_vllm.evaluation.metrics.base import Kind, Score

RESAMPLES = 9999
_BATCH_VALUES = 4_000_000  # float64 values resampled at once: 32 MB

Interval = tuple[float, float]


@dataclass(frozen=True)
class McNemar:
    """Exact McNemar test: two-sided binomial test of `only_a` against `only_b`.

    both, neither, only_a, only_b: pairs with a 1 in both arms, in none, in one of them.
    p_value: 1 without discordant pairs.
    """

    both: int
    only_a: int
    only_b: int
    neither: int
    p_value: float


@dataclass(frozen=True)
class Comparison:
    """An arm (b) against the baseline (a), on the pairs in which both have a score.

    Attributes:
        kind: `binary` or `continuous`.
        n: pairs compared. n_dropped: pairs left out, as a or b has no score. missing_a, missing_b:
            how many of the scores given are None.
        estimate_a, estimate_b: the mean score; of a binary metric, the rate. None if n is 0.
        ci_a, ci_b: Wilson interval of a rate; BCa bootstrap interval of a mean (None as below).
        difference: estimate_b - estimate_a; None if n is 0.
        ci_difference: BCa bootstrap interval over pairs; None with fewer than two pairs or with
            equal differences in all, when resampling can show no uncertainty.
        p_value: two-sided, of `test`, of the hypothesis of no difference; None if n is 0.
        test: `exact McNemar` or `paired permutation`.
        only_a, only_b: discordant pairs of a binary metric, None of a continuous one.
        confidence: of all the intervals.
        p_holm: p_value after `adjust`, None before.
    """

    kind: Kind
    n: int
    n_dropped: int
    missing_a: int
    missing_b: int
    estimate_a: float | None
    ci_a: Interval | None
    estimate_b: float | None
    ci_b: Interval | None
    difference: float | None
    ci_difference: Interval | None
    p_value: float | None
    test: str
    only_a: int | None
    only_b: int | None
    confidence: float
    p_holm: float | None = None


def wilson(successes: int, n: int, confidence: float = 0.95) -> Interval:
    """Wilson score interval of a rate; (0, 1) when n is 0, as nothing is known then."""
    _check_confidence(confidence)
    if not 0 <= successes <= n:
        raise ValueError(f"successes={successes} must be between 0 and n={n}")
    if n == 0:
        return 0.0, 1.0
    low, high = proportion_confint(successes, n, alpha=1 - confidence, method="wilson")
    # At 0 or n successes rounding can leave the end just inside the estimate.
    return min(max(float(low), 0.0), successes / n), max(min(float(high), 1.0), successes / n)


def mcnemar_exact(a: Sequence[float], b: Sequence[float]) -> McNemar:
    """a, b: paired scores of 0 or 1."""
    left, right = _pair(a, b)
    _check_binary(left, right)
    table = np.zeros((2, 2), dtype=np.int64)
    np.add.at(table, ((1 - left).astype(int), (1 - right).astype(int)), 1)
    (both, only_a), (only_b, neither) = table.tolist()
    # statsmodels gives the same 1.0 without discordant pairs; said here, not left to rounding.
    p_value = float(mcnemar(table, exact=True).pvalue) if only_a + only_b else 1.0
    return McNemar(both, only_a, only_b, neither, min(p_value, 1.0))


def bootstrap_mean(
    values: Sequence[float] | NDArray[np.float64],
    *,
    confidence: float = 0.95,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> Interval | None:
    """BCa bootstrap interval of a mean (Efron 1987); of paired scores, give the differences.

    None with fewer than two values or with equal ones.
    """
    _check_confidence(confidence)
    data = _numbers(values)
    if len(data) < 2 or np.ptp(data) == 0:
        return None
    # From 0 to 1, so that the third powers of the acceleration neither vanish nor overflow.
    shift, scale = data.min(), np.ptp(data)
    result = stats.bootstrap(
        ((data - shift) / scale,),
        np.mean,
        vectorized=True,
        confidence_level=confidence,
        n_resamples=resamples,
        batch=max(1, _BATCH_VALUES // len(data)),
        method="BCa",
        rng=np.random.default_rng(seed),
    )
    low, high = (float(end * scale + shift) for end in result.confidence_interval)
    return low, high


def paired_permutation(
    a: Sequence[float], b: Sequence[float], *, seed: int = 0, resamples: int = RESAMPLES
) -> float:
    """Two-sided p-value of the mean difference under random signs of the pairs' differences.

    Chosen over Wilcoxon's signed-rank test because it tests the very difference of means that is
    reported, keeps the pairs without a difference, and needs no symmetric distribution under the
    null hypothesis of exchangeable arms. Exact while all signs fit into `resamples`; else
    (hits + 1) / (resamples + 1) per side (Phipson and Smyth 2010). 1 where no pair differs, and
    with fewer than two pairs.
    """
    left, right = _pair(a, b)
    differences = right - left
    if len(differences) < 2 or not differences.any():
        return 1.0
    result = stats.permutation_test(
        (differences,),
        np.mean,
        permutation_type="samples",
        vectorized=True,
        n_resamples=resamples,
        batch=max(1, _BATCH_VALUES // len(differences)),
        rng=np.random.default_rng(seed),
    )
    return min(float(result.pvalue), 1.0)


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Holm's step-down adjustment, in the order given; None is no test and stays None."""
    tested = [p for p in p_values if p is not None]
    if not tested:
        return list(p_values)
    adjusted = iter(multipletests(tested, method="holm")[1].tolist())
    return [None if p is None else float(next(adjusted)) for p in p_values]


def compare_arms(
    metric_kind: Kind,
    baseline_scores: Sequence[Score],
    arm_scores: Sequence[Score],
    *,
    confidence: float = 0.95,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> Comparison:
    """Compares the scores of two arms, prompt by prompt.

    Raises:
        ValueError: the arms have different lengths, a score is not finite or, of a binary metric,
            not 0 or 1, or an option is out of range.
    """
    if metric_kind not in ("binary", "continuous"):
        raise ValueError(f"metric_kind={metric_kind!r}; use binary or continuous")
    if len(baseline_scores) != len(arm_scores):
        raise ValueError(
            f"arms of {len(baseline_scores)} and {len(arm_scores)} scores are not paired; "
            "give one score a prompt in both"
        )
    _check_confidence(confidence)
    binary = metric_kind == "binary"
    test = "exact McNemar" if binary else "paired permutation"
    pairs = [
        (x, y)
        for x, y in zip(baseline_scores, arm_scores, strict=True)
        if x is not None and y is not None
    ]
    missing_a, missing_b = list(baseline_scores).count(None), list(arm_scores).count(None)
    dropped = len(baseline_scores) - len(pairs)
    if not pairs:
        counts = 0 if binary else None
        return Comparison(
            kind=metric_kind,
            n=0,
            n_dropped=dropped,
            missing_a=missing_a,
            missing_b=missing_b,
            estimate_a=None,
            ci_a=None,
            estimate_b=None,
            ci_b=None,
            difference=None,
            ci_difference=None,
            p_value=None,
            test=test,
            only_a=counts,
            only_b=counts,
            confidence=confidence,
        )
    a, b = [x for x, _ in pairs], [y for _, y in pairs]
    left, right = _pair(a, b)

    def mean_interval(values: NDArray[np.float64]) -> Interval | None:
        return bootstrap_mean(values, confidence=confidence, seed=seed, resamples=resamples)

    def arm_interval(values: NDArray[np.float64]) -> Interval | None:
        if binary:
            return wilson(int(values.sum()), len(values), confidence)
        return mean_interval(values)

    discordant = mcnemar_exact(a, b) if binary else None
    return Comparison(
        kind=metric_kind,
        n=len(pairs),
        n_dropped=dropped,
        missing_a=missing_a,
        missing_b=missing_b,
        estimate_a=float(left.mean()),
        ci_a=arm_interval(left),
        estimate_b=float(right.mean()),
        ci_b=arm_interval(right),
        difference=float((right - left).mean()),
        ci_difference=mean_interval(right - left),
        p_value=(
            discordant.p_value
            if discordant
            else paired_permutation(a, b, seed=seed, resamples=resamples)
        ),
        test=test,
        only_a=discordant.only_a if discordant else None,
        only_b=discordant.only_b if discordant else None,
        confidence=confidence,
    )


def adjust(comparisons: Sequence[Comparison]) -> list[Comparison]:
    """The comparisons with `p_holm`: Holm over all of them that have a p-value, as one family."""
    adjusted = holm([comparison.p_value for comparison in comparisons])
    return [replace(c, p_holm=p) for c, p in zip(comparisons, adjusted, strict=True)]


def _numbers(values: Sequence[float] | NDArray[np.float64]) -> NDArray[np.float64]:
    data = np.asarray(values, dtype=np.float64)
    if data.ndim != 1 or not np.isfinite(data).all():
        raise ValueError("scores must be a plain list of finite numbers; use None for no score")
    return data


def _pair(
    a: Sequence[float], b: Sequence[float]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    if len(a) != len(b):
        raise ValueError(f"{len(a)} and {len(b)} scores are not paired; give as many of each")
    return _numbers(a), _numbers(b)


def _check_binary(*arms: NDArray[np.float64]) -> None:
    for arm in arms:
        wrong = arm[(arm != 0) & (arm != 1)]
        if len(wrong):
            raise ValueError(f"score {wrong[0]} of a binary metric is neither 0 nor 1")


def _check_confidence(confidence: float) -> None:
    if not (math.isfinite(confidence) and 0 < confidence < 1):
        raise ValueError(f"confidence={confidence} must lie between 0 and 1, for instance 0.95")
