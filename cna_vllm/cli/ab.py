# SPDX-License-Identifier: Apache-2.0
"""`cna-vllm ab`: the same prompts in several arms, compared with statistics and a report."""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from cna_vllm.cli.ab_options import arms_of, flags, parser, sampling_of, steering_of
from cna_vllm.cli.batch_run import checked_args, engine_identity
from cna_vllm.cli.interrupt import going_on
from cna_vllm.cli.usage import UsageError, say
from cna_vllm.steering.content import show

if TYPE_CHECKING:
    from cna_vllm.evaluation.answers import Answers
    from cna_vllm.evaluation.outcomes import Analysis
    from cna_vllm.evaluation.result import Result

_EXTRA = ("statsmodels", "jinja2", "yaml")
# Of the options: those that --from takes.
_FOR_SAVED = {"saved", "metric", "effect", "control", "confidence", "transcripts"}


def run(argv: list[str]) -> int:
    options, rest = parser().split(argv)
    missing = [name for name in _EXTRA if importlib.util.find_spec(name) is None]
    if missing:
        raise UsageError(f"ab needs {', '.join(missing)}: pip install 'cna-vllm[eval]'")
    if options.saved is not None:
        return _again(options, rest)
    if options.out is None:
        raise UsageError("--out DIR is missing; see cna-vllm ab --help")
    return _run(options, rest)


def _run(options: argparse.Namespace, rest: list[str]) -> int:
    from cna_vllm.evaluation.ab import (
        check_effects,
        choose_control,
        load_metrics,
        plan_rows,
        run_ab,
    )
    from cna_vllm.evaluation.config import read_config, read_sets
    from cna_vllm.evaluation.outcomes import Analysis
    from cna_vllm.evaluation.result import ANSWERS, answered, batch_identity, discard

    given = read_config(options.config) if options.config else {}
    given |= flags(options)
    if "prompts" not in given:
        raise UsageError("name prompts: --prompts FILE[:TAG]")
    if "metrics" not in given:
        raise UsageError("name metrics: --metric refusal, for instance; may be repeated")
    out = Path(options.out)
    if out.exists() and not out.is_dir():
        raise UsageError(f"{out}: is a file; name a folder")
    section, steering = steering_of(given)
    arms = arms_of(given)
    control = choose_control(arms, given.get("control"))
    sets = read_sets(given["prompts"])
    metrics = load_metrics(given["metrics"])
    analysis = Analysis(
        **{name: given[name] for name in ("confidence", "effects") if name in given}
    )
    check_effects(analysis, [metric.name for metric in metrics.values()])
    sampling = sampling_of(options, given)
    seed, samples, raw = given.get("seed", 0), given.get("samples", 1), given.get("raw", False)
    rows = plan_rows(arms, sets, sampling, samples=samples, seed=seed, raw=raw)

    from cna_vllm.cli.engine_args import launch

    args = checked_args("ab", rest, section or None, rows, sampling)
    identity = engine_identity(args)
    if options.restart:
        discard(out)
    if out.exists():
        answered(out, rows, batch_identity(args.model, steering, identity))
    advice = f"what is finished is kept in {out}; run the same command again to go on"
    with going_on(advice if out.exists() else ""):
        llm = launch(args)
    with going_on(advice):
        result = run_ab(
            llm,
            arms,
            sets,
            metrics,
            out=out,
            sampling=sampling,
            samples=samples,
            seed=seed,
            control=control,
            raw=raw,
            analysis=analysis,
            steering=steering,
            identity=identity,
            say=say,
        )
        from cna_vllm.evaluation.answers import collect, read_rows

        test = result.test
        answers = collect(read_rows(out / ANSWERS), test.arm_names, test.prompt_sets, samples)
        _show(result, answers, out, options)
    return 0


def _again(options: argparse.Namespace, rest: Sequence[str]) -> int:
    """Compares and draws again what a folder holds."""
    why = "it runs no engine"
    parser().refuse_others(options, _FOR_SAVED, "--from:", why)
    if rest:
        raise UsageError(f"--from: takes no {show(rest[0])}; {why}")

    from cna_vllm.evaluation.ab import rescore
    from cna_vllm.evaluation.result import RESULT

    folder, given = Path(options.saved), flags(options)

    def settings(saved: Analysis) -> Analysis:
        return replace(
            saved,
            confidence=given.get("confidence", saved.confidence),
            effects={**saved.effects, **given.get("effects", {})},
        )

    result, answers = rescore(
        folder, given.get("metrics", ()), control=given.get("control"), analysis=settings
    )
    result.save(folder / RESULT)
    _show(result, answers, folder, options)
    return 0


def _show(result: Result, answers: Answers, folder: Path, options: argparse.Namespace) -> None:
    from cna_vllm.evaluation.report import write_report
    from cna_vllm.evaluation.result import REPORT, RESULT
    from cna_vllm.evaluation.wording import table

    write_report(result, answers, folder / REPORT, most_prompts=options.transcripts)
    print(table(result))
    say(f"{folder / RESULT} and {folder / REPORT} are written")
