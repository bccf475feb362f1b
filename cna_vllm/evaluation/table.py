# SPDX-License-Identifier: Apache-2.0
"""The result of an A/B test as text for a terminal."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from cna_vllm.evaluation.outcomes import Difference, Estimate, Outcome
from cna_vllm.evaluation.result import Result
from cna_vllm.evaluation.wording import Form, count, found, methods, p_value

_WIDTH = 100


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
    return f"{metric.name} on {outcome.prompt_set}{direction}\n{_align(lines)}"


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


def _align(lines: Sequence[Sequence[str]]) -> str:
    """The first column to the left, all others to the right."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )
