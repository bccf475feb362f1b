# SPDX-License-Identifier: Apache-2.0
"""How many prompts a paired A/B test needs to find an effect of a given size.

None where no number up to a million does: without an effect, or with a power outside (alpha, 1).
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable

import numpy as np
from scipy import stats
from statsmodels.stats.power import TTestPower

_MOST_PAIRS = 1_000_000
MOST_ENUMERATED = 5_000


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


def pairs_for_rates(
    only_a: float, only_b: float, *, alpha: float = 0.05, power: float = 0.8
) -> int | None:
    """Pairs for which the exact McNemar test tells two shares of discordant pairs apart.

    The search starts at the normal approximation of Connor (Biometrics 43, 1987), which is for the
    test that is not exact and so is a little small. Where that is over MOST_ENUMERATED it is the
    answer: there it is at most two percent short (measured), and the enumeration takes seconds.
    """
    if only_a == only_b or not alpha < power < 1:
        return None
    start = connor(only_a + only_b, only_a - only_b, alpha, power)
    if start > MOST_ENUMERATED:
        return start if start <= _MOST_PAIRS else None
    return _smallest(lambda n: mcnemar_power(n, only_a, only_b, alpha), power, start)


def connor(discordant: float, difference: float, alpha: float, power: float) -> int:
    """Connor's number of pairs for McNemar's test: from shares, as a whole number."""
    z_alpha, z_power = stats.norm.ppf([1 - alpha / 2, power])
    root = z_alpha * math.sqrt(discordant) + z_power * math.sqrt(discordant - difference**2)
    return math.ceil((root / difference) ** 2)


def pairs_for_means(effect_size: float, *, alpha: float = 0.05, power: float = 0.8) -> int | None:
    """Pairs for which a paired test of means finds `effect_size` with `power`.

    effect_size: mean difference over the standard deviation of the differences (Cohen's d_z). By
    the power of the paired t-test, which the permutation test of `compare_arms` nears.
    """
    if effect_size == 0 or not alpha < power < 1:
        return None
    test = TTestPower()
    z_alpha, z_power = stats.norm.ppf([1 - alpha / 2, power])
    start = math.ceil(((z_alpha + z_power) / effect_size) ** 2)
    return _smallest(lambda n: float(test.power(abs(effect_size), n, alpha)), power, max(2, start))


def _smallest(power_at: Callable[[int], float], wanted: float, start: int) -> int | None:
    """A number of pairs with the wanted power, from `start` on; one less has not, or is `start`."""
    high = start
    while high <= _MOST_PAIRS and power_at(high) < wanted:
        high += max(1, high // 8)
    if high > _MOST_PAIRS:
        return None
    return bisect_left(range(high), wanted, lo=start, key=power_at)
