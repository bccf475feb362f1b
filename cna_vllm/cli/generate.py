# SPDX-License-Identifier: Apache-2.0
"""`cna-vllm generate`: every prompt in every arm, in one engine pass that can be gone on with."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Container, Sequence
from pathlib import Path

from cna_vllm.batch.partial import discard, partial_path
from cna_vllm.batch.plan import Request, plan
from cna_vllm.batch.reading import BatchPrompt, read_batch
from cna_vllm.cli.batch_run import check_admission, check_sampling, engine_identity
from cna_vllm.cli.interrupt import going_on
from cna_vllm.cli.options import OptionParser, UsageError, check_output, load_circuits
from cna_vllm.cli.sampling_options import add_sampling_options, sampling_fields
from cna_vllm.steering.arms import Arm, check_names, parse_arm, steering_arm
from cna_vllm.steering.content import show
from cna_vllm.steering.request import DEFAULT_SCOPE, SCOPES
from cna_vllm.text.prompts import PromptError

_DESCRIPTION = """\
Answer every prompt in every arm: every circuit at every --multiplier, and every --arm.

Input, by its suffix:
  .txt    one prompt a line
  .csv    the column --column, and id and tags (separated by ;) where they are
  .jsonl  {"prompt" or "messages", "id", "tags", "sampling"}, the last three optional; "sampling"
          holds fields of vLLM's SamplingParams that replace the command line's for that row
          (n counts its samples, its seed is taken as it is)
  .jsonl  requests of an OpenAI batch file (custom_id, body). Answers are rows like all others,
          with id = custom_id; what a body leaves out is the command line's, not OpenAI's default;
          steering in vllm_xargs is the row's own arm, and then no arm may be named here

Finished rows are kept in OUT.jsonl.partial. After any interruption, the same command goes on from
there, and the file is then the same as without it."""


def run(argv: list[str]) -> int:
    options, rest = _parser().split(argv)
    target = Path(options.output)
    check_output(options.output, options.overwrite)
    circuits = load_circuits(options.circuit)
    arms = _arms(options, list(circuits))
    sampling = sampling_fields(options)
    prompts = read_batch(options.input, column=options.column)
    arms = _check_arms(arms, prompts, list(circuits))
    rows = plan(prompts, arms, sampling, samples=options.samples, raw=options.raw)
    if options.seed is not None:
        rest = [*rest, "--seed", str(options.seed)]  # it has always been the engine's too

    from cna_vllm.cli.engine_args import (
        add_section,
        launch,
        parse_engine_args,
        prefill_whole_on_cpu,
    )

    args = parse_engine_args("generate", rest)
    add_section(args, {"circuits": {name: str(path) for name, (path, _) in circuits.items()}})
    if any("seed" in row.sampling for row in rows):
        prefill_whole_on_cpu(args)
    check_sampling(rows, sampling)
    check_admission({row.arm: None for row in rows}, args)
    _check_models(rows, {args.model, Path(args.model).name, *rest})
    digests = {f"circuit {name}": circuit.digest for name, (_, circuit) in circuits.items()}
    identity = {**engine_identity(args), **digests}

    from cna_vllm.batch.runner import rows_done, run_batch

    if options.restart:
        discard(target)
    if done := rows_done(rows, target, identity):
        print(f"going on: {done} of {len(rows)} rows are there", file=sys.stderr)
    advice = f"rows are kept in {partial_path(target)}; run the same command again to go on"
    with going_on(advice if done else ""):
        llm = launch(args)
    with going_on(advice):
        run_batch(llm, rows, target, identity=identity)
    print(f"{len(rows)} rows in {options.output}", file=sys.stderr)
    return 0


def _arms(options: argparse.Namespace, circuits: Sequence[str]) -> list[Arm]:
    """Every circuit at every multiplier, then those given by --arm."""
    if options.multiplier and not circuits:
        raise UsageError("--multiplier needs a --circuit NAME=C.json")
    arms = [
        steering_arm([(name, multiplier)], options.scope)
        for name in circuits
        for multiplier in dict.fromkeys(options.multiplier)
    ]
    return arms + [parse_arm(text, (), circuits) for text in options.arm]


def _check_arms(
    arms: Sequence[Arm], prompts: Sequence[BatchPrompt], circuits: Sequence[str]
) -> list[Arm]:
    """The arms of rows that have none of their own; all arms name circuits that are loaded."""
    steered = [prompt for prompt in prompts if prompt.arm is not None]
    if steered and arms:
        raise PromptError(
            f"{steered[0].source}: has steering of its own; drop it, or --multiplier and --arm"
        )
    if not arms and not steered:
        raise UsageError("name arms: --circuit with --multiplier, or --arm (--arm plain for none)")
    chosen = list(arms) or [Arm("plain")]
    check_names(chosen)
    named = [(f"--arm {arm.name}", arm) for arm in chosen]
    named += [(prompt.source, prompt.arm) for prompt in steered if prompt.arm is not None]
    for where, arm in named:
        for name, _ in arm.circuits:
            if name not in circuits:
                raise UsageError(
                    f"{where}: no circuit is named {show(name)}; add --circuit {name}=C.json"
                )
    return chosen


def _check_models(rows: Sequence[Request], names: Container[str]) -> None:
    """Raises PromptError for a row that names another model: an adapter, for instance."""
    for row in rows:
        model = row.prompt.model if isinstance(row.prompt, BatchPrompt) else None
        if model is not None and model not in names:
            raise PromptError(
                f"{row.source}: 'model': {show(model)} is not this run's model; remove it "
                "(adapters are for servers: here, steer with --arm or vllm_xargs)"
            )


def _parser() -> OptionParser:
    parser = OptionParser("generate", _DESCRIPTION, model="MODEL")
    add = parser.add_argument
    add("--circuit", action="append", default=[], metavar="NAME=C.json", help="may be repeated")
    add(
        "--multiplier",
        nargs="+",
        type=float,
        default=[],
        metavar="M",
        help="0 ablates, 1 is the plain model, above 1 amplifies",
    )
    add(
        "--scope",
        choices=SCOPES,
        default=DEFAULT_SCOPE,
        help="steered positions: from the last prompt token on, all, or generated ones only "
        f"(default: {DEFAULT_SCOPE})",
    )
    add(
        "--arm",
        action="append",
        default=[],
        metavar="NAME=CIRCUIT@M[+CIRCUIT@M...][:SCOPE]",
        help="a further arm, or NAME=plain; may be repeated",
    )
    add("--input", required=True, metavar="FILE", help=".txt, .jsonl or .csv, see above")
    add("--column", help="column of a .csv file (default: prompt)")
    add("--output", required=True, metavar="OUT.jsonl")
    add("--overwrite", action="store_true", help="replace OUT.jsonl")
    add("--restart", action="store_true", help="discard the rows of an unfinished run")
    add("--raw", action="store_true", help="do not apply the chat template")
    add_sampling_options(parser)
    return parser
