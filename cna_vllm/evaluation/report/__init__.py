# SPDX-License-Identifier: Apache-2.0
"""One self-contained HTML page: what `report.html.j2` shows of a result and its answers.

Answers, prompts and names are other people's text: all of it goes through Jinja's escaping, and
the page's policy lets nothing run but its own script.
"""

from __future__ import annotations

import base64
import hashlib
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from cna_vllm.evaluation.answers import Answers, last_user_turn
from cna_vllm.evaluation.metrics import Answer
from cna_vllm.evaluation.outcomes import Difference, Estimate, Flips, Outcome
from cna_vllm.evaluation.report.charts import Doses, Forest, doses
from cna_vllm.evaluation.result import MetricInfo, Result
from cna_vllm.evaluation.wording import NONE, Form, count, found, methods, p_value
from cna_vllm.files import write_atomic
from cna_vllm.text.prompts import Prompt

MOST_PROMPTS = 300  # whose transcripts are in the page
_FOLDER = Path(__file__).parent
_UNSHOWN = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")


@dataclass(frozen=True)
class ArmRow:
    """One arm in one outcome; the control has no difference."""

    estimate: Estimate
    difference: Difference | None
    found: bool


@dataclass(frozen=True)
class Section:
    """One outcome, with all that is drawn of it."""

    anchor: str
    metric: MetricInfo
    prompt_set: str
    form: Form
    rows: tuple[ArmRow, ...]
    forest: Forest
    doses: tuple[Doses, ...]

    @property
    def flips(self) -> list[tuple[str, Flips]]:
        return [
            (row.estimate.arm, row.difference.flips)
            for row in self.rows
            if row.difference and row.difference.flips
        ]

    @property
    def wanted(self) -> bool:
        return any(r.difference and r.difference.needed_wanted is not None for r in self.rows)


@dataclass(frozen=True)
class ScoreCell:
    name: str
    text: str
    flipped: bool


@dataclass(frozen=True)
class Sample:
    text: str
    cut: bool
    scores: tuple[ScoreCell, ...]


@dataclass(frozen=True)
class Card:
    """One arm's answers to a prompt; `flips`: numbers of the metrics that flip in one of them."""

    samples: tuple[Sample, ...]
    flips: tuple[int, ...]


@dataclass(frozen=True)
class Transcript:
    """One prompt, and a card for each arm. prompt_set: its number; turns: (role, text)."""

    prompt_set: int
    turns: tuple[tuple[str, str], ...]
    cards: tuple[Card, ...]


def write_report(
    result: Result,
    answers: Answers,
    path: str | os.PathLike[str],
    *,
    most_prompts: int = MOST_PROMPTS,
) -> None:
    """Writes the page, atomically. It refers to nothing outside itself.

    most_prompts: so many prompts' transcripts are shown, the first ones.
    """
    environment = Environment(
        loader=PackageLoader("cna_vllm.evaluation", "report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_shown,
    )
    environment.filters |= {"minus": _minus, "p": p_value, "count": count}
    script = (_FOLDER / "report.js").read_text("utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode("utf-8")).digest()).decode("ascii")
    binary = [metric for metric in result.metrics if metric.kind == "binary"]
    sections = list(_sections(result))
    page = environment.get_template("report.html.j2").render(
        result=result,
        test=result.test,
        sections=sections,
        axes=list(dict.fromkeys(chart.axis for one in sections for chart in one.doses)),
        transcripts=_transcripts(result, answers, binary, most_prompts),
        binary=binary,
        methods=methods(result),
        level=f"{100 * result.analysis.confidence:g}%",
        style=Markup((_FOLDER / "report.css").read_text("utf-8")),  # our own files, not input
        script=Markup(script),
        script_hash=digest,
        found_count=sum(found(d, result) for o in result.outcomes for d in o.differences),
        compared=sum(len(outcome.differences) for outcome in result.outcomes),
    )
    write_atomic(path, [page])


def _sections(result: Result) -> Iterator[Section]:
    for i, outcome in enumerate(result.outcomes):
        metric = result.metric(outcome.metric)
        form = Form.of(outcome, metric.kind)
        yield Section(
            anchor=f"outcome-{i}",
            metric=metric,
            prompt_set=outcome.prompt_set,
            form=form,
            rows=tuple(_rows(outcome, result)),
            forest=Forest.of(outcome, form),
            doses=tuple(doses(outcome, result, form)),
        )


def _rows(outcome: Outcome, result: Result) -> Iterator[ArmRow]:
    differences = {difference.arm: difference for difference in outcome.differences}
    for estimate in outcome.estimates:
        difference = differences.get(estimate.arm)
        yield ArmRow(estimate, difference, difference is not None and found(difference, result))


def _transcripts(
    result: Result, answers: Answers, binary: Sequence[MetricInfo], most: int
) -> list[Transcript]:
    test = result.test
    sets = [i for i, info in enumerate(test.prompt_sets) for _ in range(info.prompts)]
    return [
        Transcript(
            prompt_set=sets[index],
            turns=_turns(answers[test.control][index][0]),
            cards=tuple(
                _card(result, arm, index, answers[arm][index], binary) for arm in test.arm_names
            ),
        )
        for index in range(min(most, len(sets)))
    ]


def _card(
    result: Result,
    arm: str,
    index: int,
    answers: Sequence[Answer],
    binary: Sequence[MetricInfo],
) -> Card:
    samples, flips = [], set()
    for sample, answer in enumerate(answers):
        cells = []
        for metric in result.metrics:
            score = result.scores[metric.name][arm][index][sample]
            control = result.scores[metric.name][result.test.control][index][sample]
            flipped = metric.kind == "binary" and None not in (score, control) and score != control
            if flipped:
                flips.add(binary.index(metric))
            if score is not None:
                text = f"{score:.4g}" if metric.kind != "binary" else "yes" if score else "no"
                cells.append(ScoreCell(metric.name, text, flipped))
        samples.append(Sample(answer.text, answer.finish_reason == "length", tuple(cells)))
    return Card(tuple(samples), tuple(sorted(flips)))


def _turns(answer: Answer) -> tuple[tuple[str, str], ...]:
    """(role, text) of the chat; a single user turn, or a prompt that is no chat, has role ''."""
    messages: Sequence[Mapping[str, Any]] = answer.messages or ()
    if len(messages) < 2:
        return (("", answer.prompt),)
    return tuple(
        (str(m["role"]), last_user_turn(Prompt(messages=[{**m, "role": "user"}]))) for m in messages
    )


def _shown(value: Any) -> Any:
    """Characters that HTML has no place for become the replacement character."""
    if isinstance(value, str) and not isinstance(value, Markup):
        return _UNSHOWN.sub("\ufffd", value)
    return value


def _minus(text: str) -> str:
    """A number's text with typographic signs."""
    return "\u2013" if text == NONE else text.replace("-", "\u2212")
