# SPDX-License-Identifier: Apache-2.0
"""The result of an A/B test, its file `ab.json` (format `cna-ab`, version 1), and its folder.

The file holds all that was run and every score, so that statistics and reports can be made again
without an engine; `outcomes` are what follows from them, for other programs to read.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, get_args

from cna_vllm.batch import partial
from cna_vllm.batch.plan import Request, digests
from cna_vllm.evaluation.answers import SetInfo
from cna_vllm.evaluation.metrics import Better, EngineMetric, Kind, Metric
from cna_vllm.evaluation.outcomes import Analysis, Outcome, Scores
from cna_vllm.files import write_atomic

FORMAT, VERSION = "cna-ab", 1
ANSWERS, RESULT, REPORT = "answers.jsonl", "ab.json", "report.html"


class ResultError(ValueError):
    """A result file that cannot be used: one line."""


@dataclass(frozen=True)
class MetricInfo:
    """What a result keeps of a metric: how it was asked for, and how it describes itself."""

    spec: str
    name: str
    kind: Kind
    better: Better
    description: str

    @classmethod
    def of(cls, spec: str, metric: Metric | EngineMetric) -> MetricInfo:
        return cls(spec, metric.name, metric.kind, metric.better, metric.description)


@dataclass(frozen=True)
class Test:
    """What was run.

    Attributes:
        model: as it was named.
        arms: `Arm.to_dict()` of each, in order.
        control: name of the arm that the others are compared with.
        prompt_sets: in the order of the rows' `index`.
        sampling: fields of `vllm.SamplingParams`, the run's seed, whether text was asked to be
            `raw`, and whether the `chat_template` was applied.
        samples: answers to each prompt in each arm.
        steering: of each circuit or vector by name, its `file` and `digest`.
        versions: of this package, the engine and what else decides the answers.
        identity: what answers must agree with to be those of this test.
        created: ISO 8601, UTC, when the answers were complete.
        seconds: from the first request to the last answer, of the last run.
    """

    __test__ = False  # for pytest, which collects classes of this name

    model: str
    arms: Sequence[Mapping[str, Any]]
    control: str
    prompt_sets: Sequence[SetInfo]
    sampling: Mapping[str, Any] = field(default_factory=dict)
    samples: int = 1
    steering: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    identity: Mapping[str, Any] = field(default_factory=dict)
    created: str = ""
    seconds: float | None = None

    @property
    def arm_names(self) -> list[str]:
        return [arm["arm"] for arm in self.arms]

    @property
    def prompts(self) -> int:
        return sum(info.prompts for info in self.prompt_sets)

    @property
    def answers(self) -> int:
        return self.prompts * len(self.arms) * self.samples


@dataclass(frozen=True)
class Result:
    """What was run, how its answers score, and what follows.

    scores: metric's name -> arm -> prompt (all sets, in order) -> sample.
    """

    test: Test
    metrics: Sequence[MetricInfo]
    scores: Mapping[str, Scores]
    analysis: Analysis
    outcomes: Sequence[Outcome]

    def metric(self, name: str) -> MetricInfo:
        return next(metric for metric in self.metrics if metric.name == name)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes `ab.json`, atomically."""
        whole = {
            "format": FORMAT,
            "version": VERSION,
            "test": asdict(self.test),
            "analysis": asdict(self.analysis),
            "metrics": [asdict(metric) for metric in self.metrics],
            "outcomes": [asdict(outcome) for outcome in self.outcomes],
            "scores": self.scores,
        }
        write_json(path, whole)


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Writes a file of indented JSON, atomically; lone surrogates as JSON's escapes of them."""
    text = json.dumps(value, ensure_ascii=False, indent=1)
    write_atomic(path, [text.encode("utf-8", "backslashreplace"), b"\n"])


def load(
    path: str | os.PathLike[str],
) -> tuple[Test, list[MetricInfo], dict[str, Scores], Analysis]:
    """Reads the parts of an `ab.json` from which all else follows.

    Raises:
        ResultError: it cannot be read, is of another format or version, or lacks something.
    """
    try:
        whole = json.loads(Path(path).read_text("utf-8"))
    except OSError as error:
        raise ResultError(f"{path}: cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise ResultError(f"{path}: is not JSON: {error}") from error
    if not isinstance(whole, dict) or whole.get("format") != FORMAT:
        raise ResultError(f"{path}: 'format' is not {FORMAT!r}; name the folder of an A/B test")
    if whole.get("version") != VERSION:
        raise ResultError(
            f"{path}: 'version' is {whole.get('version')!r}; this program reads {VERSION}"
        )
    try:
        fields = dict(whole["test"])
        fields["prompt_sets"] = [SetInfo(**info) for info in fields["prompt_sets"]]
        test = Test(**fields)
        metrics = [MetricInfo(**metric) for metric in whole["metrics"]]
        scores = {metric.name: _scores(whole["scores"][metric.name], test) for metric in metrics}
        analysis = Analysis(**whole["analysis"])
        if test.control not in test.arm_names:
            raise ValueError(f"the control {test.control!r} is not an arm")
        if any(m.kind not in get_args(Kind) or m.better not in get_args(Better) for m in metrics):
            raise ValueError("a metric's 'kind' or 'better' is unknown")
    except (KeyError, TypeError, ValueError) as error:
        raise ResultError(f"{path}: is incomplete or malformed ({error!r})") from error
    return test, metrics, scores, analysis


def _scores(scores: Scores, test: Test) -> Scores:
    if list(scores) != test.arm_names or any(
        len(prompts) != test.prompts or any(len(p) != test.samples for p in prompts)
        for prompts in scores.values()
    ):
        raise ValueError("'scores' does not fit the arms, prompts and samples")
    return scores


def batch_identity(
    model: str, steering: Mapping[str, Mapping[str, Any]], identity: Mapping[str, Any]
) -> dict[str, Any]:
    """What answers depend on besides the rows that ask for them."""
    named = {f"steering {name}": what["digest"] for name, what in steering.items()}
    return {**identity, "model": model, **named}


def answered(out: Path, rows: Sequence[Request], identity: Mapping[str, Any]) -> Test | None:
    """The test in `out` if it is this one and all of its rows are answered; None if none is there.

    Raises:
        ResultError: `out` holds another test.
        BatchError: it holds the unfinished rows of another one.
    """
    from cna_vllm.batch.runner import rows_done

    rows_done(rows, out / ANSWERS, identity)
    if not ((out / RESULT).exists() and (out / ANSWERS).exists()):
        return None
    test, *_ = load(out / RESULT)
    wanted = {**identity, **digests(rows)}
    if test.identity == wanted:
        return test
    names = [n for n in {**wanted, **test.identity} if test.identity.get(n) != wanted.get(n)]
    raise ResultError(
        f"{out}: holds a test with other settings ({', '.join(names)}); name another folder, or "
        "add --restart to discard that test"
    )


def discard(out: Path) -> None:
    """Removes what an earlier test left in `out`. Raises BatchError where one runs."""
    partial.discard(out / ANSWERS)
    for name in (RESULT, REPORT, ANSWERS):
        (out / name).unlink(missing_ok=True)
