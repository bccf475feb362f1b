# SPDX-License-Identifier: Apache-2.0
"""`cna-vllm eval`: the paper's evaluations on one model, beside the published rows."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from cna_vllm.cli.options import OptionParser, positive_int
from cna_vllm.evaluation.paper.datasets import JBB_HUB, read_jbb, read_strongreject
from cna_vllm.evaluation.paper.settings import CONTRAST, PARTS, PRESETS, EvalError, Settings
from cna_vllm.prompts import Prompt, read_prompts

_DEFAULT_PARTS = ("jbb", "sweep", "caa", "mmlu", "structure")
_STRENGTHS = (1.0, 0.75, 0.5, 0.25, 0.0)


def run(argv: list[str]) -> int:
    options, rest = _parser().split(argv)
    if "mmlu" in options.parts:
        _need_harness()

    from cna_vllm.cli.engine_args import parse_engine_args

    args = parse_engine_args("eval", rest)
    settings = _settings(
        options, Path(args.model).name if Path(args.model).is_dir() else args.model
    )
    if settings.judge is not None:
        from cna_vllm.evaluation.metrics import load_metric

        load_metric(f"judge:{settings.judge}")

    from cna_vllm.evaluation.paper.run import claim, discover_base, evaluate, start

    folder = Path(options.out)
    claim(folder, settings)
    if settings.base_model is not None and "structure" in settings.parts:
        _say(f"finding the base model's circuit: {settings.base_model}")
        discover_base(args, settings, folder)
    llm = start(args, settings)
    from cna_vllm.evaluation.paper.estimate import loads, measure_speed, report

    _say(report(loads(settings, llm.get_tokenizer()), measure_speed(llm)))
    if options.estimate:
        return 0
    print(evaluate(llm, settings, folder, say=_say))
    _say(f"all figures in {folder / 'eval.json'}")
    return 0


def _settings(options: argparse.Namespace, model: str) -> Settings:
    behaviors = read_jbb(options.jbb)
    if options.contrast is None:
        positive = behaviors.harmful[:CONTRAST]
        negative = behaviors.benign[:CONTRAST]
    else:
        positive, negative = (tuple(read_prompts(path)) for path in options.contrast)
    forbidden: Sequence[Prompt] = ()
    if options.strongreject is not None:
        forbidden = read_strongreject(options.strongreject)
    return Settings(
        model=model,
        parts=tuple(part for part in PARTS if part in options.parts),
        preset=options.preset,
        multipliers=tuple(dict.fromkeys(options.multipliers)),
        harmful=behaviors.harmful,
        benign=behaviors.benign,
        positive=positive,
        negative=negative,
        forbidden=tuple(forbidden),
        judge=options.judge,
        mmlu_task=options.mmlu,
        mmlu_limit=options.mmlu_limit,
        mmlu_fewshot=options.mmlu_fewshot,
        base_model=options.base_model,
        limit=options.limit,
        max_tokens=options.max_tokens,
        seed=options.seed,
    )


def _need_harness() -> None:
    try:
        import lm_eval  # noqa: F401
    except ImportError as error:
        raise EvalError(
            "--parts mmlu: needs lm-evaluation-harness: pip install 'cna-vllm[eval]'"
        ) from error


def _parser() -> OptionParser:
    parts = "\n".join(f"  {name:13} {text}" for name, text in PARTS.items())
    parser = OptionParser(
        "eval",
        f"The evaluations of arXiv 2605.12290 on one model, beside the published rows.\n\n{parts}",
        model="MODEL",
    )
    parser.add_argument(
        "--out", required=True, metavar="DIR", help="new folder, or one to go on with"
    )
    parser.add_argument(
        "--parts",
        nargs="+",
        choices=tuple(PARTS),
        default=_DEFAULT_PARTS,
        metavar="PART",
        help=f"default: {' '.join(_DEFAULT_PARTS)}",
    )
    parser.add_argument(
        "--preset",
        choices=PRESETS,
        default="paper",
        help="how circuits are selected: as the paper states it (default) or as its code does",
    )
    parser.add_argument(
        "--multipliers", nargs="+", type=float, default=_STRENGTHS, metavar="M", help="of the sweep"
    )
    parser.add_argument(
        "--jbb", default=JBB_HUB, metavar="SOURCE", help=f"hub id or folder (default: {JBB_HUB})"
    )
    parser.add_argument(
        "--contrast",
        nargs=2,
        metavar=("POSITIVE", "NEGATIVE"),
        help="prompt files of the small circuit "
        f"(default: the first {CONTRAST} harmful and benign prompts of JBB-Behaviors)",
    )
    parser.add_argument(
        "--strongreject", metavar="SOURCE", help="the published CSV file, or REPOSITORY:FILE"
    )
    parser.add_argument(
        "--judge", metavar="url=...,model=...", help="options of the judge metric, for strongreject"
    )
    parser.add_argument("--base-model", metavar="MODEL", help="for structure")
    parser.add_argument(
        "--mmlu",
        default="mmlu",
        metavar="TASK",
        help="a task of lm-evaluation-harness, or its YAML file (default: mmlu)",
    )
    parser.add_argument("--mmlu-limit", type=positive_int, metavar="N", help="questions a task")
    parser.add_argument("--mmlu-fewshot", type=int, metavar="N", help="default: the task's own")
    parser.add_argument("--limit", type=positive_int, metavar="N", help="prompts a set")
    parser.add_argument("--max-tokens", type=positive_int, default=150, metavar="N")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--estimate", action="store_true", help="tell requests, tokens and time, then stop"
    )
    return parser


def _say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)
