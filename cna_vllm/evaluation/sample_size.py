# SPDX-License-Identifier: Apache-2.0
"""How many prompts a paired A/B test needs to find an effect of a given size."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from scipy import stats
from statsmodels.stats.power import TTestPower

_MOST_PAIRS = 1_000_000
MOST_ENUMERATED = 5_000


def discordant_shares(
    rate_a: float, rate_b: float, correlation: float = 0.0
) -> tuple[float, float]:
    """Shares of pairs that are 1 in a only and in b only, from the two rates.

    correlation: of a and b over prompts (phi). 0, independent answers, is the careful choice:
    answers of two arms to one prompt mostly agree, and then fewer pairs do.

    Raises:
        ValueError: a value is out of range, or no such pair of arms exists.
    """
    for name, rate in (("rate_a", rate_a), ("rate_b", rate_b)):
        if not 0 <= rate <= 1:
            raise ValueError(f"{name}={rate} must lie between 0 and 1")
    if not -1 <= correlation <= 1:
        raise ValueError(f"correlation={correlation} must lie between -1 and 1")
    both = rate_a * rate_b + correlation * math.sqrt(rate_a * (1 - rate_a) * rate_b * (1 - rate_b))
    low, high = max(0.0, rate_a + rate_b - 1), min(rate_a, rate_b)
    if not low - 1e-12 <= both <= high + 1e-12:
        raise ValueError(
            f"correlation={correlation} is impossible for rates {rate_a} and {rate_b}; "
            "use one nearer 0"
        )
    both = min(max(both, low), high)
    return rate_a - both, rate_b - both


def mcnemar_power(n: int, only_a: float, only_b: float, alpha: float = 0.05) -> float:
    """Power of the exact McNemar test with `n` pairs, by enumeration of the discordant ones.

    only_a, only_b: expected shares of the two kinds of discordant pairs, together at most 1.
    """
    discordant = np.arange(n + 1)
    share = only_a + only_b
    if share == 0:
        return 0.0
    # The largest count k, on either side, with 2 P(X <= k) <= alpha under X ~ B(discordant, 1/2).
    critical = stats.binom.ppf(alpha / 2, discordant, 0.5)
    too_far = 2 * stats.binom.cdf(critical, discordant, 0.5) > alpha
    critical = np.where(too_far, critical - 1, critical)
    ratio = only_a / share
    rejects = stats.binom.cdf(critical, discordant, ratio) + stats.binom.sf(
        discordant - critical - 1, discordant, ratio
    )
    weights = stats.binom.pmf(discordant, n, min(share, 1.0))
    return float(np.sum(weights * np.where(critical >= 0, rejects, 0.0)))


def sample_size_paired_proportions(
    rate_a: float,
    rate_b: float,
    *,
    correlation: float = 0.0,
    alpha: float = 0.05,
    power: float = 0.8,
) -> int:
    """Pairs for which the exact McNemar test finds `rate_a` against `rate_b` with `power`.

    Raises:
        ValueError: the rates are equal, or a value is out of range.
    """
    only_a, only_b = discordant_shares(rate_a, rate_b, correlation)
    if rate_a == rate_b:
        raise ValueError(
            f"rate_a and rate_b are both {rate_a}; no number of pairs tells them apart"
        )
    return sample_size_discordant(only_a, only_b, alpha=alpha, power=power)


def sample_size_discordant(
    only_a: float, only_b: float, *, alpha: float = 0.05, power: float = 0.8
) -> int:
    """Pairs for which the exact McNemar test tells two unequal shares of discordant pairs apart.

    The search starts at the normal approximation of Connor (Biometrics 43, 1987), which is for the
    test that is not exact and so is a little small. Where that is over MOST_ENUMERATED it is the
    answer: there it is at most two percent short (measured), and the enumeration takes seconds.

    Raises:
        ValueError: the shares are equal, or a value is out of range.
    """
    _check(alpha, power)
    if min(only_a, only_b) < 0 or only_a == only_b or only_a + only_b > 1 + 1e-12:
        raise ValueError(
            f"only_a={only_a} and only_b={only_b} must be unequal shares of at most 1 together"
        )
    start = connor(only_a + only_b, only_a - only_b, alpha, power)
    if start > _MOST_PAIRS:
        raise ValueError(f"needs more than {_MOST_PAIRS} pairs; look for a larger effect")
    if start > MOST_ENUMERATED:
        return start
    return _smallest(lambda n: mcnemar_power(n, only_a, only_b, alpha), power, start)


def connor(discordant: float, difference: float, alpha: float, power: float) -> int:
    """Connor's number of pairs for McNemar's test: from shares, as a whole number."""
    z_alpha, z_power = stats.norm.ppf([1 - alpha / 2, power])
    root = z_alpha * math.sqrt(discordant) + z_power * math.sqrt(discordant - difference**2)
    return math.ceil((root / difference) ** 2)


def sample_size_paired_means(effect_size: float, *, alpha: float = 0.05, power: float = 0.8) -> int:
    """Pairs for which a paired test of means finds `effect_size` with `power`.

    effect_size: mean difference over the standard deviation of the differences (Cohen's d_z). By
    the power of the paired t-test, which the permutation test of `compare_arms` nears.

    Raises:
        ValueError: an effect of 0, or a value out of range.
    """
    _check(alpha, power)
    if not math.isfinite(effect_size) or effect_size == 0:
        raise ValueError(f"effect_size={effect_size} must be a finite number other than 0")
    test = TTestPower()
    z_alpha, z_power = stats.norm.ppf([1 - alpha / 2, power])
    start = math.ceil(((z_alpha + z_power) / effect_size) ** 2)
    return _smallest(lambda n: float(test.power(abs(effect_size), n, alpha)), power, max(2, start))


def _smallest(power_at: Callable[[int], float], wanted: float, start: int) -> int:
    """A number of pairs with the wanted power, from `start` on; one less has not, or is `start`."""
    high = start
    while high <= _MOST_PAIRS and power_at(high) < wanted:
        high += max(1, high // 8)
    if high > _MOST_PAIRS:
        raise ValueError(f"needs more than {_MOST_PAIRS} pairs; look for a larger effect")
    low = start - 1
    while high - low > 1:
        middle = (low + high) // 2
        if power_at(middle) < wanted:
            low = middle
        else:
            high = middle
    return high


def _check(alpha: float, power: float) -> None:
    if not 0 < alpha < 1:
        raise ValueError(f"alpha={alpha} must lie between 0 and 1, for instance 0.05")
    if not alpha < power < 1:
        raise ValueError(f"power={power} must lie between alpha and 1, for instance 0.8")
