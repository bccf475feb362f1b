# SPDX-License-Identifier: Apache-2.0
"""Sampling options of the commands that generate: common ones by name, any other as JSON."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Mapping
from typing import Any

from cna_vllm.cli.usage import UsageError, number, positive_int
from cna_vllm.steering.circuit import show

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


def add_sampling_options(parser: argparse.ArgumentParser) -> None:
    """Adds --max-tokens, --temperature and so on, --samples, and --sampling."""
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
    """Fields of `vllm.SamplingParams` from the parsed options, defaults filled in.

    Raises:
        UsageError: a field is given by name and in --sampling.
    """
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
