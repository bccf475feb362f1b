# SPDX-License-Identifier: Apache-2.0
"""From scores to outcomes: each arm's estimate, and each arm against the control.

The prompt is the unit. Several answers to one prompt are averaged first, over those that have a
score, so a binary metric then gives one rate a prompt, and its arms are compared by those rates
(paired permutation) instead of the exact McNemar test. Prompt sets are never pooled: each metric
has an outcome for every set in which it applies.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from cna_vllm.evaluation.metrics.base import Kind, Score
from cna_vllm.evaluation.sample_size import (
    discordant_shares,
    sample_size_discordant,
    sample_size_paired_means,
)
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


def outcomes(
    scored: Sequence[Scored], control: str, analysis: Analysis | None = None
) -> list[Outcome]:
    """Holm's correction is over all comparisons of all outcomes together, as one family.

    A set to which the metric applies in no arm (no prompt has a score) gives no outcome.

    Raises:
        ValueError: the control is no arm, arms are not paired, or an option is out of range.
    """
    analysis = analysis or Analysis()
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


def per_prompt(scores: Sequence[Sequence[Score]]) -> list[Score]:
    """Each prompt's mean over its samples that have a score; None where none has."""
    means: list[Score] = []
    for samples in scores:
        known = [score for score in samples if score is not None]
        means.append(math.fsum(known) / len(known) if known else None)
    return means


def _outcome(scored: Scored, control: str, analysis: Analysis) -> Outcome:
    if control not in scored.scores:
        raise ValueError(
            f"control {control!r} is not an arm; use one of {', '.join(scored.scores)}"
        )
    means = {arm: per_prompt(scores) for arm, scores in scored.scores.items()}
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
        interval = bootstrap_mean(
            known,
            confidence=analysis.confidence,
            seed=analysis.seed,
            resamples=analysis.resamples,
        )
    value = math.fsum(known) / len(known) if known else None
    return Estimate(arm, len(known), len(means) - len(known), value, interval)


def _difference(
    scored: Scored, control: str, arm: str, means: Mapping[str, list[Score]], analysis: Analysis
) -> Difference:
    once = all(len(samples) <= 1 for samples in scored.scores[arm])
    comparison = compare_arms(
        scored.kind if once else "continuous",
        means[control],
        means[arm],
        confidence=analysis.confidence,
        seed=analysis.seed,
        resamples=analysis.resamples,
    )
    flips = None
    if scored.kind == "binary":
        flips = _flips(scored.scores[control], scored.scores[arm])
    seen = wanted = None
    if analysis.power is not None:
        plan = _Plan(1 - analysis.confidence, analysis.power, _spread(means[control], means[arm]))
        seen = plan.for_seen(comparison)
        if scored.metric in analysis.effects:
            wanted = plan.for_wanted(comparison, analysis.effects[scored.metric])
    return Difference(arm, comparison, flips, needed_seen=seen, needed_wanted=wanted)


def _flips(control: Sequence[Sequence[Score]], arm: Sequence[Sequence[Score]]) -> Flips:
    pairs = [
        (bool(x), bool(y))
        for ours, theirs in zip(control, arm, strict=True)
        for x, y in zip(ours, theirs, strict=True)
        if x is not None and y is not None
    ]
    return Flips(
        both=pairs.count((True, True)),
        only_control=pairs.count((True, False)),
        only_arm=pairs.count((False, True)),
        neither=pairs.count((False, False)),
    )


def _spread(control: Sequence[Score], arm: Sequence[Score]) -> float:
    """Standard deviation of the prompts' differences; 0 with fewer than two."""
    differences = [
        y - x for x, y in zip(control, arm, strict=True) if x is not None and y is not None
    ]
    return float(np.std(differences, ddof=1)) if len(differences) > 1 else 0.0


@dataclass(frozen=True)
class _Plan:
    """Prompts needed; None where there is no effect, no spread, or over a million are needed.

    spread: standard deviation of the prompts' differences, for metrics that are not binary.
    """

    alpha: float
    power: float
    spread: float

    def for_seen(self, seen: Comparison) -> int | None:
        if not seen.difference:
            return None
        if seen.only_a is None or seen.only_b is None:
            return self._means(seen.difference)
        return self._rates(seen.only_a / seen.n, seen.only_b / seen.n)

    def for_wanted(self, seen: Comparison, wanted: float) -> int | None:
        """Of rates: from the control's one, in the direction that needs more prompts, and with
        arms whose answers are independent; else with the spread seen."""
        if seen.only_a is None:
            return self._means(wanted)
        if seen.estimate_a is None:
            return None
        ends = (seen.estimate_a - abs(wanted), seen.estimate_a + abs(wanted))
        needed = [
            self._rates(*discordant_shares(seen.estimate_a, end)) for end in ends if 0 <= end <= 1
        ]
        return None if None in needed else max((n for n in needed if n), default=None)

    def _rates(self, only_a: float, only_b: float) -> int | None:
        try:
            return sample_size_discordant(only_a, only_b, alpha=self.alpha, power=self.power)
        except ValueError:
            return None

    def _means(self, difference: float) -> int | None:
        if not self.spread:
            return None
        try:
            return sample_size_paired_means(
                difference / self.spread, alpha=self.alpha, power=self.power
            )
        except ValueError:
            return None
