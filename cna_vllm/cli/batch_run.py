# SPDX-License-Identifier: Apache-2.0
"""What the commands that answer batches share: sampling options, arms, and the engine's arguments.

Common sampling fields are options by name, any other is in the JSON of --sampling.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from cna_vllm import __version__
from cna_vllm.batch.plan import Request
from cna_vllm.cli.options import OptionParser
from cna_vllm.cli.usage import UsageError, number, positive_int
from cna_vllm.steering.arms import Arm, steering_arm
from cna_vllm.steering.content import show
from cna_vllm.steering.request import CircuitRequest

if TYPE_CHECKING:
    from vllm import EngineArgs

# What of vLLM's flags decides the text of an answer, apart from rounding.
_ENGINE_IDENTITY = (
    "model",
    "revision",
    "tokenizer",
    "tokenizer_revision",
    "dtype",
    "quantization",
    "max_model_len",
)

_NOTE = """\
What is not given is vLLM's neutral value; of the model's generation_config only the stop tokens
count. Sampled rows have a seed each, the same in every arm of a prompt; it is in the row."""
_DEFAULTS = {"max_tokens": 128, "temperature": 0.0}
_temperature = number(float, "a finite number of at least 0", lambda t: 0 <= t < math.inf)
# Fields of SamplingParams, and how the option of that name is parsed.
_NAMED: Mapping[str, Mapping[str, Any]] = {
    "max_tokens": {"type": positive_int, "metavar": "N", "help": "default: 128"},
    "temperature": {"type": _temperature, "metavar": "T", "help": "default: 0, greedy"},
    "top_p": {"type": float, "metavar": "P"},
    "top_k": {"type": int, "metavar": "K"},
    "min_p": {"type": float, "metavar": "P"},
    "repetition_penalty": {"type": float, "metavar": "R"},
    "presence_penalty": {"type": float, "metavar": "R"},
    "frequency_penalty": {"type": float, "metavar": "R"},
    "min_tokens": {"type": int, "metavar": "N"},
    "ignore_eos": {"action": "store_true", "default": None, "help": "go on to --max-tokens"},
    "stop": {"action": "append", "metavar": "TEXT", "help": "end at this text; may be repeated"},
    "seed": {
        "type": int,
        "metavar": "N",
        "help": "of all rows' seeds, and the engine's (default: 0)",
    },
}


def add_batch_options(parser: OptionParser) -> None:
    """Adds what names circuits and arms, how prompts are read, and the sampling fields."""
    add = parser.add_argument
    parser.add_list("--circuit", "NAME=C.json", "may be repeated")
    add(
        "--multiplier",
        nargs="+",
        type=float,
        default=[],
        metavar="M",
        help="an arm for every circuit at each; 0 ablates, 1 is the plain model, above 1 amplifies",
    )
    parser.add_list(
        "--arm",
        "NAME=CIRCUIT@M[+CIRCUIT@M...][:SCOPE]",
        "a further arm, or NAME=plain; may be repeated",
    )
    add("--column", help="column of .csv files (default: prompt)")
    add("--raw", action="store_true", help="do not apply the chat template")
    group = parser.add_argument_group("sampling", _NOTE)
    add = group.add_argument
    for name, how in _NAMED.items():
        add(f"--{name.replace('_', '-')}", **how)
    add("--samples", "--n", type=positive_int, default=1, metavar="N", help="answers of each arm")
    add(
        "--sampling",
        type=_json_object,
        default={},
        metavar="JSON",
        help="any other fields of vLLM's SamplingParams, for example '{\"logprobs\": 2}'",
    )


def sampling_fields(options: argparse.Namespace) -> dict[str, Any]:
    """Fields of `vllm.SamplingParams` from the parsed options, defaults filled in; raises
    UsageError if one is given by name and in --sampling."""
    named = {name: getattr(options, name) for name in _NAMED}
    given = {name: value for name, value in named.items() if value is not None}
    for name in options.sampling:
        if name in given:
            raise UsageError(f"--sampling: {name!r} is also given by an option of its own")
    return {**_DEFAULTS, **given, **options.sampling}


def _json_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise argparse.ArgumentTypeError(f"{show(text)} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"{show(text)} is not a JSON object")
    return value


def swept_arms(
    circuits: Iterable[str], multipliers: Iterable[float], scopes: Iterable[str]
) -> list[Arm]:
    """Every circuit at every scope and multiplier."""
    names, wanted = list(circuits), list(dict.fromkeys(multipliers))
    if wanted and not names:
        raise UsageError("--multiplier needs a --circuit NAME=C.json")
    return [
        steering_arm([(name, multiplier)], scope)
        for name in names
        for scope in dict.fromkeys(scopes)
        for multiplier in wanted
    ]


def checked_args(
    command: str,
    argv: Sequence[str],
    section: Mapping[str, Any] | None,
    rows: Sequence[Request],
    sampling: Mapping[str, Any],
) -> EngineArgs:
    """Arguments of an engine that takes these rows, with our section in them; starts nothing.

    Args:
        argv: what the command's own options left over.
        section: of `additional_config`; None starts a plain engine.
        sampling: the run's fields; a row's own are in the row.

    Raises:
        UsageError, CnaConfigError: flags, or the section.
        PromptError: fields of the run or of a row that vLLM would refuse.
        SteeringError: an arm that this engine would not admit.
    """
    from cna_vllm.batch.sampling import check_fields, check_requests
    from cna_vllm.cli.engine_args import add_section, parse_engine_args
    from cna_vllm.serving.config import CnaConfig
    from cna_vllm.serving.seams.platform import on_cpu

    args = parse_engine_args(command, argv)
    if section is not None:
        add_section(args, section)
    seeded = any("seed" in row.sampling for row in rows)
    if seeded and on_cpu() and args.enable_chunked_prefill is None:
        args.enable_chunked_prefill = False  # see `cna_vllm.batch.sampling.check_seeds`
    # Of these two, the plan has made numbers of samples and seeds of rows.
    fields = {name: value for name, value in sampling.items() if name not in ("n", "seed")}
    check_fields(fields, "sampling")
    check_requests(rows)
    config = CnaConfig.from_additional_config(args.additional_config)
    if config is not None:  # no section of ours: no arm of ours either
        for arm in dict.fromkeys(row.arm for row in rows):
            CircuitRequest.from_extra_args(
                arm.extra_args(),
                max_multiplier=config.max_multiplier,
                max_circuits=config.max_circuits_per_request,
                max_vectors=config.max_vectors_per_request,
            )
    return args


def engine_identity(args: EngineArgs) -> dict[str, Any]:
    """What of an engine decides the answers, for runs that are gone on with."""
    import vllm

    engine = {name: getattr(args, name) for name in _ENGINE_IDENTITY}
    return {
        **{name: None if value is None else str(value) for name, value in engine.items()},
        "cna-vllm": __version__,
        "vllm": vllm.__version__,
    }
