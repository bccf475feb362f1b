# SPDX-License-Identifier: Apache-2.0
"""From vLLM's own engine flags to a running `LLM` with our section in its configuration."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

from cna_vllm.checkpoints.models import resolve_model
from cna_vllm.cli.section import loaded, merge, section_of, with_section
from cna_vllm.cli.usage import UsageError
from cna_vllm.serving.config import CONFIG_KEY
from cna_vllm.serving.seams.command_line import parser_class
from cna_vllm.serving.seams.platform import on_cpu

if TYPE_CHECKING:
    from vllm import LLM, EngineArgs


def start_engine(
    command: str,
    argv: Sequence[str],
    cna: Mapping[str, Any],
    *,
    default_model: str | None = None,
    cpu_defaults: Mapping[str, Any] | None = None,
) -> LLM:
    """Parses `MODEL [vLLM's engine flags]` and starts the engine.

    Args:
        argv: what the command's own options left over.
        cna: our section of `additional_config`; see `add_section`.
        default_model: taken when the user names none; without it that is an error.
        cpu_defaults: further engine arguments on a CPU, unless the user sets them.

    Raises:
        UsageError: unknown or malformed flags, or no model.
    """
    args = parse_engine_args(command, argv, default_model, cpu_defaults)
    add_section(args, cna)
    return launch(args)


def add_section(args: EngineArgs | argparse.Namespace, cna: Mapping[str, Any]) -> None:
    """Merges our section into `additional_config`, and says what of the user's own was found.

    What a command needs room for is no contradiction: `max_circuits` and `max_vectors` grow.

    Raises:
        UsageError: the user's section contradicts ours.
        CnaConfigError: the user's section, or both together, cannot be served.
    """
    given = section_of(args.additional_config)
    room = {key: max(cna[key], given.get(key, 0)) for key in _ROOM if key in cna}
    section = merge({**given, **room}, {**cna, **room})
    if room.get("max_vectors") and section.get("vectors"):
        section["max_vectors"] = max(room["max_vectors"], len(section["vectors"]))
    args.additional_config = with_section(args.additional_config, section)
    if any(given.get(key) for key in ("circuits", "vectors", "adapters")):
        print(f"cna-vllm: {loaded(section)}", file=sys.stderr)


def launch(args: EngineArgs) -> LLM:
    """Starts the engine; an eager one on a CPU compiles nothing at all.

    vLLM compiles one small function for log-probabilities, eager or not: most of a minute on a CPU,
    where it gains nothing. Its workers there are processes that start anew, and PyTorch reads the
    variable when they do.
    """
    from vllm import LLM

    if on_cpu() and args.enforce_eager:
        os.environ.setdefault("TORCH_COMPILE_DISABLE", "1")
    llm: LLM = LLM.from_engine_args(args)
    return llm


def parse_engine_args(
    command: str,
    argv: Sequence[str],
    default_model: str | None = None,
    cpu_defaults: Mapping[str, Any] | None = None,
) -> EngineArgs:
    """See `start_engine`; starts nothing. `--help=...` prints vLLM's flags and exits."""
    # Before vLLM is imported, which reads them then: stdout is for results.
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")

    from vllm import EngineArgs

    parser = flag_parser(command)
    parser.add_argument("model_tag", nargs="?", metavar="MODEL")
    EngineArgs.add_cli_args(parser)
    parser.set_defaults(model=None, disable_log_stats=True)
    set_cpu_defaults(parser, **(cpu_defaults or {}))
    keep_sections(parser)
    namespace = parser.parse_args(list(argv))
    model = namespace.model_tag or namespace.model or default_model
    if model is None:
        parser.error("name a model: a folder, a hub id, or smollm2")
    namespace.model = resolve_model(model)
    return EngineArgs.from_cli_args(namespace)


_ROOM = ("max_circuits", "max_vectors")


def keep_sections(parser: Any) -> None:
    """Lets several `--additional-config`, of the command line and of `--config`, add up in what is
    ours; the rest is the last one's, as in vLLM."""
    action = next(a for a in parser._actions if a.dest == "additional_config")
    action.type = _merging(action.type)


def _merging(parse: Callable[[str], Any]) -> Callable[[str], Any]:
    section: dict[str, Any] = {}

    def parse_and_merge(text: str) -> Any:
        value = parse(text)
        if not isinstance(value, dict):
            return value
        try:
            section.update(merge(section, section_of(value), "an earlier --additional-config"))
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from error
        return {**value, CONFIG_KEY: dict(section)} if section or CONFIG_KEY in value else value

    return parse_and_merge


def flag_parser(command: str) -> Any:
    """vLLM's `FlexibleArgumentParser`; a mistake raises UsageError."""
    flexible: Any = parser_class()

    class FlagParser(flexible):
        def error(self, message: str) -> NoReturn:
            raise UsageError(f"{message}; see cna-vllm {command} --help")

    return FlagParser(prog=f"cna-vllm {command}")


def set_cpu_defaults(parser: Any, **more: Any) -> None:
    """On a CPU, what its vLLM needs to start soon and beside other programs."""
    if on_cpu():
        # Compiling takes minutes on a CPU and gains about a tenth; --no-enforce-eager asks for it.
        # vLLM would claim nine tenths of all memory and not start where that is not free.
        parser.set_defaults(enforce_eager=True, gpu_memory_utilization=0.5, **more)
