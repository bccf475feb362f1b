# SPDX-License-Identifier: Apache-2.0
"""`cna-vllm eval`: the paper's evaluations on one model, beside the published rows."""

from __future__ import annotations

import argparse
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cna_vllm.cli.interrupt import going_on
from cna_vllm.cli.options import OptionParser
from cna_vllm.cli.usage import UsageError, say
from cna_vllm.evaluation.metrics import load_metric
from cna_vllm.evaluation.paper.datasets import JBB_HUB, read_jbb, read_strongreject
from cna_vllm.evaluation.paper.estimate import durations, loads, measure_speed, report
from cna_vllm.evaluation.paper.settings import CONTRAST, PARTS, PRESETS, Settings
from cna_vllm.text.prompts import read_prompts

if TYPE_CHECKING:
    from vllm import EngineArgs

    from cna_vllm.evaluation.paper.harness import Task

_DEFAULT_PARTS = ("jbb", "sweep", "caa", "mmlu", "structure")
_STRENGTHS = (1.0, 0.75, 0.5, 0.25, 0.0)


def run(argv: list[str]) -> int:
    options, rest = _parser().split(argv)
    if options.out is None and not options.estimate:
        raise UsageError("--out DIR is missing; see cna-vllm eval --help")
    inputs = _inputs(options)

    from cna_vllm.cli.batch_run import engine_identity
    from cna_vllm.cli.engine_args import add_section, launch, parse_engine_args

    args = parse_engine_args("eval", rest)
    model = Path(args.model).name if Path(args.model).is_dir() else args.model
    settings = Settings(model=model, **inputs)
    if settings.judge is not None:
        load_metric(f"judge:{settings.judge}")
    task = _task(settings)
    work = loads(settings, _tokenizer(args), () if task is None else task.texts())
    say(report(work))

    from cna_vllm.evaluation.paper.run import discover_base, evaluate, section
    from cna_vllm.evaluation.paper.study import Study, claim

    identity = engine_identity(args)
    if options.estimate:
        add_section(args, section(settings))
        say(durations(work, measure_speed(launch(args))))
        return 0
    out = Path(options.out)
    with going_on(f"what is finished is kept in {out}; run the same command again to go on"):
        claim(out, settings, identity)
        if settings.base_model is not None and "structure" in settings.parts:
            say(f"the base model's circuit: {settings.base_model}")
            discover_base(args, settings, out)
        add_section(args, section(settings))
        llm = launch(args)
        say(durations(work, measure_speed(llm)))
        print(evaluate(Study(llm, settings, out, identity, task), say=say))
        say(f"all figures are in {out / 'eval.json'}, answers and reports beside it")
    return 0


def _inputs(options: argparse.Namespace) -> dict[str, Any]:
    """Fields of the settings, but for the model: what can be told to be wrong without vLLM."""
    behaviors = read_jbb(options.jbb)
    if options.contrast is None:
        positive = behaviors.harmful[:CONTRAST]
        negative = behaviors.benign[:CONTRAST]
    else:
        positive, negative = (tuple(read_prompts(path)) for path in options.contrast)
    if options.keywords is not None:
        load_metric(f"refusal_keywords:phrases={options.keywords}")
    asked, forbidden = options.sweep_prompts, options.strongreject
    names = {field.name for field in fields(Settings)}
    given = {
        **{name: value for name, value in vars(options).items() if name in names},
        "parts": tuple(part for part in PARTS if part in options.parts),
        "multipliers": tuple(dict.fromkeys(options.multipliers)),
        "harmful": behaviors.harmful,
        "benign": behaviors.benign,
        "positive": positive,
        "negative": negative,
        "asked": () if asked is None else tuple(read_prompts(asked)),
        "forbidden": () if forbidden is None else read_strongreject(forbidden),
    }
    Settings(model="", **given)  # raises EvalError
    return given


def _task(settings: Settings) -> Task | None:
    if "mmlu" not in settings.parts:
        return None
    try:
        from cna_vllm.evaluation.paper.harness import Task
    except ImportError as error:
        raise UsageError(
            f"--parts mmlu: needs {error.name}: pip install 'cna-vllm[eval]'"
        ) from error
    return Task(settings.mmlu_task, num_fewshot=settings.mmlu_fewshot, limit=settings.mmlu_limit)


def _tokenizer(args: EngineArgs) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(
        args.tokenizer or args.model,
        revision=args.tokenizer_revision or args.revision,
        trust_remote_code=args.trust_remote_code,
    )


def _parser() -> OptionParser:
    parts = "\n".join(f"  {name:13} {text}" for name, text in PARTS.items())
    parser = OptionParser(
        "eval",
        f"The evaluations of arXiv 2605.12290 on one model, beside the published rows.\n\n{parts}",
        model="MODEL",
    )
    add = parser.add_argument
    add("--out", metavar="DIR", help="new folder, or one to go on with after an interruption")
    add(
        "--parts",
        nargs="+",
        choices=tuple(PARTS),
        default=_DEFAULT_PARTS,
        metavar="PART",
        help=f"default: {' '.join(_DEFAULT_PARTS)}",
    )
    add(
        "--preset",
        choices=PRESETS,
        default="paper",
        help="how circuits are selected: as the paper states it (default) or as its code does",
    )
    add(
        "--multipliers", nargs="+", type=float, default=_STRENGTHS, metavar="M", help="of the sweep"
    )
    add(
        "--jbb",
        default=JBB_HUB,
        metavar="SOURCE",
        help="hub id, or folder with harmful-behaviors.csv and benign-behaviors.csv, both with a "
        f"column Goal (default: {JBB_HUB})",
    )
    add(
        "--contrast",
        nargs=2,
        metavar=("POSITIVE", "NEGATIVE"),
        help="prompt files of the small circuit "
        f"(default: the first {CONTRAST} harmful and benign prompts of JBB-Behaviors)",
    )
    add(
        "--sweep-prompts",
        metavar="FILE",
        help="prompts of sweep and caa (default: the harmful ones of JBB-Behaviors that are not "
        "in the contrast)",
    )
    add(
        "--keywords",
        metavar="FILE",
        help="phrases of the keyword rule of refusal, one a line (default: those of GCG and "
        "AutoDAN)",
    )
    add("--strongreject", metavar="SOURCE", help="the published CSV file, or REPOSITORY:FILE")
    add(
        "--judge", metavar="url=...,model=...", help="options of the judge metric, for strongreject"
    )
    add("--base-model", metavar="MODEL", help="for structure: the model before instruction tuning")
    add(
        "--mmlu",
        dest="mmlu_task",
        default="mmlu",
        metavar="TASK",
        help="a task of lm-evaluation-harness, or its YAML file (default: mmlu)",
    )
    parser.add_count("--mmlu-limit", "questions a task")
    parser.add_count(
        "--mmlu-fewshot",
        "examples before each question (default: the task's own number; of mmlu, 0)",
    )
    parser.add_count("--limit", "prompts of each set that are answered (default: all)")
    parser.add_count("--max-tokens", "of an answer (default: 150)", 150)
    add("--seed", type=int, default=0, metavar="N", help="of the bootstrap (default: 0)")
    add("--estimate", action="store_true", help="tell requests, tokens and time, then stop")
    return parser
