# SPDX-License-Identifier: Apache-2.0
"""From scores to outcomes: each arm's estimate, and each arm against the control.

The prompt is the unit. Several answers to one prompt are averaged first, over those that have a
score, so a binary metric then gives one rate a prompt, and its arms are compared by those rates
(paired permutation) instead of the exact McNemar test. Prompt sets are never pooled: each metric
has an outcome for every set in which it applies.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from cna_vllm.evaluation.metrics import Kind, Score
from cna_vllm.evaluation.sample_size import pairs_for_means, pairs_for_rates
from cna_vllm.evaluation.statistics import (
    RESAMPLES,
    Comparison,
    Interval,
    adjust,
    bootstrap_mean,
    compare_arms,
    wilson,
)

Scores = Mapping[str, Sequence[Sequence[Score]]]  # arm -> prompt -> sample


@dataclass(frozen=True)
class Analysis:
    """How scores are compared.

    Attributes:
        confidence: of all intervals; 1 - confidence is also the level for which prompts needed
            are computed, before any correction.
        effects: of a metric's name, the difference one wants to be able to find, in its units.
        power: with which the prompts needed find their effect; None leaves them out.
        seed, resamples: of the bootstrap and of the permutation test.
    """

    confidence: float = 0.95
    effects: Mapping[str, float] = field(default_factory=dict)
    power: float | None = 0.8
    seed: int = 0
    resamples: int = RESAMPLES

    @property
    def options(self) -> dict[str, Any]:
        """Those of the functions in `statistics`."""
        return {name: getattr(self, name) for name in ("confidence", "seed", "resamples")}


@dataclass(frozen=True)
class Scored:
    """One metric's scores on one prompt set."""

    metric: str
    kind: Kind
    prompt_set: str
    scores: Scores


@dataclass(frozen=True)
class Estimate:
    """One arm alone.

    n: prompts with a score; missing: those without. value: mean over them, None if n is 0.
    interval: Wilson where every prompt scores 0 or 1 in a binary metric, else BCa bootstrap over
    prompts; None where there is nothing to resample.
    """

    arm: str
    n: int
    missing: int
    value: float | None
    interval: Interval | None


@dataclass(frozen=True)
class Flips:
    """Answer pairs (same prompt, same sample) of a binary metric, by control and arm."""

    both: int
    only_control: int
    only_arm: int
    neither: int


@dataclass(frozen=True)
class Difference:
    """One arm (b) against the control (a).

    needed_seen: prompts with which an effect as the seen one is found; None if none was seen.
    needed_wanted: the same for the wanted effect of the `Analysis`; None without one.
    """

    arm: str
    comparison: Comparison
    flips: Flips | None
    needed_seen: int | None
    needed_wanted: int | None


@dataclass(frozen=True)
class Outcome:
    """One metric on one prompt set: an estimate for every arm, a difference for all but control."""

    metric: str
    prompt_set: str
    estimates: tuple[Estimate, ...]
    differences: tuple[Difference, ...]


def outcomes(scored: Sequence[Scored], control: str, analysis: Analysis) -> list[Outcome]:
    """Holm's correction is over all comparisons of all outcomes together, as one family.

    A set to which the metric applies in no arm (no prompt has a score) gives no outcome.

    Raises:
        ValueError: the control is no arm, arms are not paired, or an option is out of range.
    """
    for one in scored:
        if control not in one.scores:
            known = ", ".join(one.scores)
            raise ValueError(f"control {control!r} is not an arm; use one of {known}")
    found = [
        _outcome(one, control, analysis)
        for one in scored
        if any(score is not None for arm in one.scores.values() for p in arm for score in p)
    ]
    adjusted = iter(adjust([d.comparison for outcome in found for d in outcome.differences]))
    return [
        replace(
            outcome,
            differences=tuple(replace(d, comparison=next(adjusted)) for d in outcome.differences),
        )
        for outcome in found
    ]


def _mean(scores: Sequence[Score]) -> Score:
    """Over those there are; None where none is."""
    known = [score for score in scores if score is not None]
    return math.fsum(known) / len(known) if known else None


def _outcome(scored: Scored, control: str, analysis: Analysis) -> Outcome:
    means = {arm: [*map(_mean, scores)] for arm, scores in scored.scores.items()}
    return Outcome(
        metric=scored.metric,
        prompt_set=scored.prompt_set,
        estimates=tuple(_estimate(arm, m, scored.kind, analysis) for arm, m in means.items()),
        differences=tuple(
            _difference(scored, control, arm, means, analysis) for arm in means if arm != control
        ),
    )


def _estimate(arm: str, means: Sequence[Score], kind: Kind, analysis: Analysis) -> Estimate:
    known = [mean for mean in means if mean is not None]
    interval: Interval | None = None
    if known and kind == "binary" and set(known) <= {0.0, 1.0}:
        interval = wilson(int(sum(known)), len(known), analysis.confidence)
    elif known:
        interval = bootstrap_mean(known, **analysis.options)
    return Estimate(arm, len(known), len(means) - len(known), _mean(means), interval)


def _difference(
    scored: Scored, control: str, arm: str, means: Mapping[str, list[Score]], analysis: Analysis
) -> Difference:
    once = all(len(samples) <= 1 for samples in scored.scores[arm])
    kind = scored.kind if once else "continuous"
    comparison = compare_arms(kind, means[control], means[arm], **analysis.options)
    flips = None
    if scored.kind == "binary":
        flips = _flips(scored.scores[control], scored.scores[arm])
    apart = [
        y - x
        for x, y in zip(means[control], means[arm], strict=True)
        if x is not None and y is not None
    ]
    spread = float(np.std(apart, ddof=1)) if len(apart) > 1 else 0.0
    needed = _needed(comparison, spread, analysis.effects.get(scored.metric, 0.0), analysis)
    return Difference(arm, comparison, flips, *needed)


def _flips(control: Sequence[Sequence[Score]], arm: Sequence[Sequence[Score]]) -> Flips:
    pairs = Counter(
        (x, y)
        for ours, theirs in zip(control, arm, strict=True)
        for x, y in zip(ours, theirs, strict=True)
    )
    return Flips(
        both=pairs[1.0, 1.0],
        only_control=pairs[1.0, 0.0],
        only_arm=pairs[0.0, 1.0],
        neither=pairs[0.0, 0.0],
    )


def _needed(
    found: Comparison, spread: float, wanted: float, analysis: Analysis
) -> tuple[int | None, int | None]:
    """Prompts needed for the difference seen, and for the wanted one; None for a difference of 0.

    Of rates the wanted one is from the control's rate, in the direction that needs more prompts,
    and with arms whose answers are independent: the careful choice, as answers of two arms to one
    prompt mostly agree, and then fewer do.

    spread: standard deviation of the prompts' differences, for metrics that are not binary.
    """
    if analysis.power is None or found.estimate_a is None or found.difference is None:
        return None, None
    options = {"alpha": 1 - analysis.confidence, "power": analysis.power}
    if found.only_a is None or found.only_b is None:
        if not spread:
            return None, None
        seen, for_wanted = (
            pairs_for_means(size / spread, **options) for size in (found.difference, wanted)
        )
        return seen, for_wanted
    rate = found.estimate_a
    ends = [end for end in (rate - abs(wanted), rate + abs(wanted)) if 0 <= end <= 1]
    both = [pairs_for_rates(rate - rate * end, end - rate * end, **options) for end in ends]
    return (
        pairs_for_rates(found.only_a / found.n, found.only_b / found.n, **options),
        None if None in both else max((n for n in both if n), default=None),
    )
