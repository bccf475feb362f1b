# SPDX-License-Identifier: Apache-2.0
"""Statistics of paired arms: the same prompts answered by a baseline (a) and by an arm (b).

The pair is the unit: pairs are taken to be independent, so several answers to one prompt are
averaged before they come here. A pair of which either score is None is dropped, and counted.
Methods are those of scipy and statsmodels; what is here is their choice, and what they say where
there is too little data. Nothing returns NaN or warns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from scipy import stats
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.proportion import proportion_confint

from cna_vllm.evaluation.metrics import Kind, Score

RESAMPLES = 9999
_BATCH_VALUES = 4_000_000  # float64 values resampled at once: 32 MB

Interval = tuple[float, float]


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


def mcnemar_exact(only_a: int, only_b: int) -> float:
    """p-value of the exact McNemar test: a two-sided binomial test of the discordant pairs."""
    # statsmodels gives the same 1.0 without discordant pairs; said here, not left to rounding.
    if not only_a + only_b:
        return 1.0
    return min(float(mcnemar(((0, only_a), (only_b, 0)), exact=True).pvalue), 1.0)


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
    data = np.asarray(values, dtype=np.float64)
    if not np.isfinite(data).all():
        raise ValueError("scores must be finite numbers; use None for no score")
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
    differences: NDArray[np.float64], *, seed: int = 0, resamples: int = RESAMPLES
) -> float:
    """Two-sided p-value of the mean difference under random signs of the pairs' differences.

    Chosen over Wilcoxon's signed-rank test because it tests the very difference of means that is
    reported, keeps the pairs without a difference, and needs no symmetric distribution under the
    null hypothesis of exchangeable arms. Exact while all signs fit into `resamples`; else
    (hits + 1) / (resamples + 1) per side (Phipson and Smyth 2010). 1 where no pair differs, and
    with fewer than two pairs.
    """
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
    binary = metric_kind == "binary"
    both = list(zip(baseline_scores, arm_scores, strict=True))
    pairs = [pair for pair in both if None not in pair]
    a, b = np.array(pairs, dtype=np.float64).reshape(-1, 2).T
    n, difference = len(pairs), b - a

    def interval(values: NDArray[np.float64], *, rate: bool = binary) -> Interval | None:
        if rate and n:
            return wilson(int(values.sum()), n, confidence)
        return bootstrap_mean(values, confidence=confidence, seed=seed, resamples=resamples)

    only_a = only_b = None
    if binary:
        for score in (*a, *b):
            if score not in (0, 1):
                raise ValueError(f"score {score} of a binary metric is neither 0 nor 1")
        only_a, only_b = int((a > b).sum()), int((a < b).sum())
        p_value = mcnemar_exact(only_a, only_b)
    else:
        p_value = paired_permutation(difference, seed=seed, resamples=resamples)
    return Comparison(
        kind=metric_kind,
        n=n,
        n_dropped=len(both) - n,
        missing_a=list(baseline_scores).count(None),
        missing_b=list(arm_scores).count(None),
        estimate_a=float(a.mean()) if n else None,
        ci_a=interval(a),
        estimate_b=float(b.mean()) if n else None,
        ci_b=interval(b),
        difference=float(difference.mean()) if n else None,
        ci_difference=interval(difference, rate=False),
        p_value=p_value if n else None,
        test="exact McNemar" if binary else "paired permutation",
        only_a=only_a,
        only_b=only_b,
        confidence=confidence,
    )


def adjust(comparisons: Sequence[Comparison]) -> list[Comparison]:
    """The comparisons with `p_holm`: Holm over all of them that have a p-value, as one family."""
    adjusted = holm([comparison.p_value for comparison in comparisons])
    return [replace(c, p_holm=p) for c, p in zip(comparisons, adjusted, strict=True)]


def _check_confidence(confidence: float) -> None:
    if not 0 < confidence < 1:
        raise ValueError(f"confidence={confidence} must lie between 0 and 1, for instance 0.95")
