# SPDX-License-Identifier: Apache-2.0
"""The result of an A/B test as text: numbers and sentences, of the report as well, and a table."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

from cna_vllm.evaluation.metrics import Kind
from cna_vllm.evaluation.outcomes import Difference, Estimate, Outcome
from cna_vllm.evaluation.result import Result
from cna_vllm.evaluation.statistics import Interval

NONE = "-"
_WIDTH = 100


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

    def tick(self, value: float) -> str:
        """As short as it can be, without a percent sign."""
        return f"{100 * value if self.percent else value:g}"

    def _plain(self, value: float) -> str:
        return f"{100 * value if self.percent else value:,.{self.places}f}"


def p_value(value: float | None) -> str:
    if value is None:
        return NONE
    return "<0.001" if value < 0.001 else f"{value:.3f}"


def count(value: int | None) -> str:
    return NONE if value is None else f"{value:,}"


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


def table(result: Result) -> str:
    """A block for each metric and prompt set, a line for each arm, and what the numbers mean."""
    test = result.test
    head = (
        f"{test.model}: {len(test.arms)} arms, {test.prompts} prompts, {test.answers} answers; "
        f"control: {test.control}"
    )
    notes = [textwrap.fill(line, _WIDTH) for line in methods(result)]
    blocks = [_block(outcome, result) for outcome in result.outcomes]
    return "\n\n".join([head, *blocks, "\n".join(notes)])


def _block(outcome: Outcome, result: Result) -> str:
    metric = result.metric(outcome.metric)
    differences = {difference.arm: difference for difference in outcome.differences}
    level = f"{100 * result.analysis.confidence:g}%"
    flips = metric.kind == "binary"
    wanted = any(d.needed_wanted is not None for d in outcome.differences)
    columns = ["arm", "n", "estimate", level, f"vs {result.test.control}", level, "p", "Holm", ""]
    columns += ["flips -/+"] if flips else []
    columns += ["needed"] if result.analysis.power is not None else []
    columns += ["for wanted"] if wanted else []
    form = Form.of(outcome, metric.kind)
    lines = [columns]
    for estimate in outcome.estimates:
        line = _estimate_cells(estimate, form)
        if difference := differences.get(estimate.arm):
            line += _difference_cells(difference, form)
            line.append("*" if found(difference, result) else "")
            if flips and difference.flips:
                line.append(f"{difference.flips.only_control}/{difference.flips.only_arm}")
            if result.analysis.power is not None:
                line.append(count(difference.needed_seen))
            if wanted:
                line.append(count(difference.needed_wanted))
        lines.append(line + [""] * (len(columns) - len(line)))
    direction = "" if metric.better == "neither" else f", {metric.better} is better"
    return f"{metric.name} on {outcome.prompt_set}{direction}\n{align(lines)}"


def _estimate_cells(estimate: Estimate, form: Form) -> list[str]:
    n = f"{estimate.n}" if not estimate.missing else f"{estimate.n} (-{estimate.missing})"
    return [estimate.arm, n, form.number(estimate.value), form.interval(estimate.interval)]


def _difference_cells(difference: Difference, form: Form) -> list[str]:
    compared = difference.comparison
    return [
        form.signed(compared.difference),
        form.interval(compared.ci_difference, difference=True),
        p_value(compared.p_value),
        p_value(compared.p_holm),
    ]


def align(lines: Sequence[Sequence[str]], left: int = 1) -> str:
    """The first `left` columns to the left, all others to the right."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i < left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )
