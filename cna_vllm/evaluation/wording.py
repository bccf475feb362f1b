# SPDX-License-Identifier: Apache-2.0
"""Numbers and sentences that the terminal table and the report have in common."""

from __future__ import annotations

import math
from dataclasses import dataclass

from cna_vllm.evaluation.metrics import Kind
from cna_vllm.evaluation.outcomes import Difference, Outcome
from cna_vllm.evaluation.result import Result
from cna_vllm.evaluation.statistics import Interval

NONE = "-"


@dataclass(frozen=True)
class Form:
    """How the values of one outcome are written, all with the same decimal places."""

    percent: bool
    places: int

    @classmethod
    def of(cls, outcome: Outcome, kind: Kind) -> Form:
        """Rates in percent, with one place; other values with three digits or more."""
        if kind == "binary":
            return cls(True, 1)
        sizes = [abs(e.value) for e in outcome.estimates if e.value is not None]
        largest = max(sizes, default=0.0)
        return cls(False, 3 - min(max(math.ceil(math.log10(largest or 1.0)), 0), 3))

    def number(self, value: float | None) -> str:
        return NONE if value is None else self._plain(value) + ("%" if self.percent else "")

    def signed(self, value: float | None) -> str:
        """A difference; of rates in percentage points, without the sign."""
        if value is None:
            return NONE
        text = self._plain(abs(value))
        return text if not text.strip("0.,") else f"{'-' if value < 0 else '+'}{text}"

    def interval(self, ends: Interval | None, *, difference: bool = False) -> str:
        """`[low, high]`, without percent signs."""
        if ends is None:
            return NONE
        write = self.signed if difference else self._plain
        return f"[{', '.join(map(write, ends))}]"

    def _plain(self, value: float) -> str:
        return f"{100 * value if self.percent else value:,.{self.places}f}"


def p_value(value: float | None) -> str:
    if value is None:
        return NONE
    return "<0.001" if value < 0.001 else f"{value:.3f}"


def count(value: int | None) -> str:
    return NONE if value is None else f"{value:,}"


def tick(value: float, *, percent: bool = False) -> str:
    """A tick's label, as short as it can be."""
    return f"{100 * value if percent else value:g}"


def found(difference: Difference, result: Result) -> bool:
    """Whether the difference is told from none, after Holm's correction."""
    p = difference.comparison.p_holm
    return p is not None and p <= round(1 - result.analysis.confidence, 12)


def methods(result: Result) -> list[str]:
    """What the numbers are, in sentences; the first is on units, the last on the correction."""
    analysis, samples = result.analysis, result.test.samples
    level = f"{100 * analysis.confidence:g}%"
    binary = any(metric.kind == "binary" for metric in result.metrics)
    lines = [
        "Arms are paired: each prompt is answered in every arm, with the same seeds."
        + (
            f" The prompt is the unit: the scores of its {samples} answers are averaged first, and "
            "intervals and tests are over prompts."
            if samples > 1
            else ""
        )
    ]
    if binary and samples == 1:
        lines.append(
            f"Rates have {level} Wilson intervals; means and all differences {level} BCa bootstrap "
            f"intervals over prompts ({analysis.resamples:,} resamples)."
        )
        lines.append(
            "p is two-sided: the exact McNemar test for rates, a paired permutation test of the "
            "mean difference for all else."
        )
    else:
        lines.append(
            f"Means and differences have {level} BCa bootstrap intervals over prompts "
            f"({analysis.resamples:,} resamples)"
            + (", rates Wilson ones where each prompt's is 0 or 100%." if binary else ".")
        )
        lines.append("p is two-sided, from a paired permutation test of the mean difference.")
    if binary:
        lines.append(
            "Flips are pairs of answers (same prompt"
            + (", same sample" if samples > 1 else "")
            + ") that the metric calls yes in one of the two arms only."
        )
    if analysis.power is not None:
        lines.append(
            f"Needed is the number of prompts with which a difference as the one seen is found "
            f"with a power of {100 * analysis.power:g}% at the uncorrected level "
            f"{1 - analysis.confidence:g}: a figure for planning, not evidence."
        )
    unscored = [
        metric.name
        for metric in result.metrics
        if all(outcome.metric != metric.name for outcome in result.outcomes)
    ]
    if unscored:
        lines.append(f"Without a score on any of these prompts: {', '.join(unscored)}.")
    compared = sum(len(outcome.differences) for outcome in result.outcomes)
    lines.append(
        f"Holm's correction is over all {compared} comparisons together; the mark * says that "
        f"the corrected p is at most {1 - analysis.confidence:g}."
    )
    return lines
