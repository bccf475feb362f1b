# SPDX-License-Identifier: Apache-2.0
"""`cna-vllm generate`: every prompt in every arm, in one engine pass that can be gone on with."""

from __future__ import annotations

from collections.abc import Container, Sequence
from pathlib import Path

from cna_vllm.batch.partial import discard, partial_path
from cna_vllm.batch.plan import Request, plan
from cna_vllm.batch.reading import BatchPrompt, read_batch
from cna_vllm.cli.batch_run import (
    add_batch_options,
    checked_args,
    engine_identity,
    sampling_fields,
    swept_arms,
)
from cna_vllm.cli.interrupt import going_on
from cna_vllm.cli.options import OptionParser
from cna_vllm.cli.usage import UsageError, check_known, check_output, located, named_files, say
from cna_vllm.steering.arms import Arm, check_names, parse_arm
from cna_vllm.steering.circuit import Circuit
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
    circuits = located(Circuit.load, named_files("--circuit", options.circuit))
    arms = swept_arms(circuits, options.multiplier, [options.scope])
    arms += [parse_arm(text, (), circuits) for text in options.arm]
    sampling = sampling_fields(options)
    prompts = read_batch(options.input, column=options.column)
    arms = _check_arms(arms, prompts, circuits)
    rows = plan(prompts, arms, sampling, samples=options.samples, raw=options.raw)
    if options.seed is not None:
        rest = [*rest, "--seed", str(options.seed)]  # it has always been the engine's too

    section = {"circuits": {name: path for name, (path, _) in circuits.items()}}
    args = checked_args("generate", rest, section, rows, sampling)
    _check_models(rows, {args.model, Path(args.model).name, *rest})
    digests = {f"circuit {name}": digest for name, (_, digest) in circuits.items()}
    identity = {**engine_identity(args), **digests}

    from cna_vllm.batch.runner import rows_done, run_batch
    from cna_vllm.cli.engine_args import launch

    if options.restart:
        discard(target)
    if done := rows_done(rows, target, identity):
        say(f"going on: {done} of {len(rows)} rows are there")
    advice = f"rows are kept in {partial_path(target)}; run the same command again to go on"
    with going_on(advice if done else ""):
        llm = launch(args)
    with going_on(advice):
        run_batch(llm, rows, target, identity=identity)
    say(f"{len(rows)} rows in {options.output}")
    return 0


def _check_arms(
    arms: Sequence[Arm], prompts: Sequence[BatchPrompt], circuits: Container[str]
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
        check_known(where, (name for name, _ in arm.circuits), circuits)
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
    add_batch_options(parser)
    add = parser.add_argument
    add(
        "--scope",
        choices=SCOPES,
        default=DEFAULT_SCOPE,
        help="steered positions: from the last prompt token on, all, or generated ones only "
        f"(default: {DEFAULT_SCOPE})",
    )
    add("--input", required=True, metavar="FILE", help=".txt, .jsonl or .csv, see above")
    add("--output", required=True, metavar="OUT.jsonl")
    add("--overwrite", action="store_true", help="replace OUT.jsonl")
    add("--restart", action="store_true", help="discard the rows of an unfinished run")
    return parser
