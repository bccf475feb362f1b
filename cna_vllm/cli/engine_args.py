# SPDX-License-Identifier: Apache-2.0
"""From vLLM's own engine flags to a running `LLM` with our section in its configuration."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

from cna_vllm.cli.options import UsageError
from cna_vllm.models import resolve_model

if TYPE_CHECKING:
    from vllm import LLM
    from vllm.engine.arg_utils import EngineArgs


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
        command: name of the command, for messages.
        argv: what the command's own options left over.
        cna: our section of `additional_config`; one given by the user is merged, ours wins.
        default_model: taken when the user names none; without it that is an error.
        cpu_defaults: further engine arguments on a CPU, unless the user sets them.

    Raises:
        UsageError: unknown or malformed flags, or no model.
    """
    args = parse_engine_args(command, argv, default_model, cpu_defaults)
    add_section(args, cna)
    return launch(args)


def add_section(args: EngineArgs, cna: Mapping[str, Any]) -> None:
    """Puts our section into `additional_config`; one given by the user is merged, ours wins."""
    given = dict(args.additional_config or {})
    given["cna"] = {**given.get("cna", {}), **cna}
    args.additional_config = given


def prefill_whole_on_cpu(args: EngineArgs) -> None:
    """For sampling with seeds, unless the user has chosen: see `cna_vllm.batch.sampling`."""
    from vllm.platforms import current_platform

    if current_platform.is_cpu() and args.enable_chunked_prefill is None:
        args.enable_chunked_prefill = False


def launch(args: EngineArgs) -> LLM:
    """Starts the engine; an eager one on a CPU compiles nothing at all.

    vLLM compiles one small function for log-probabilities, eager or not: most of a minute on a CPU,
    where it gains nothing. Its workers there are processes that start anew, and PyTorch reads the
    variable when they do.
    """
    from vllm import LLM
    from vllm.platforms import current_platform

    if current_platform.is_cpu() and args.enforce_eager:
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

    from vllm.engine.arg_utils import EngineArgs

    parser = flag_parser(command)
    parser.add_argument("model_tag", nargs="?", metavar="MODEL")
    EngineArgs.add_cli_args(parser)
    parser.set_defaults(model=None, disable_log_stats=True)
    set_cpu_defaults(parser, **(cpu_defaults or {}))
    namespace = parser.parse_args(list(argv))
    model = namespace.model_tag or namespace.model or default_model
    if model is None:
        parser.error("name a model: a folder, a hub id, or smollm2")
    namespace.model = resolve_model(model)
    return EngineArgs.from_cli_args(namespace)


def flag_parser(command: str) -> Any:
    """vLLM's `FlexibleArgumentParser`; a mistake raises UsageError."""
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    class FlagParser(FlexibleArgumentParser):
        def error(self, message: str) -> NoReturn:
            raise UsageError(f"{message}; see cna-vllm {command} --help")

    return FlagParser(prog=f"cna-vllm {command}")


def set_cpu_defaults(parser: Any, **more: Any) -> None:
    """On a CPU, what its vLLM needs to start soon and beside other programs."""
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        # Compiling takes minutes on a CPU and gains about a tenth; --no-enforce-eager asks for it.
        # vLLM would claim nine tenths of all memory and not start where that is not free.
        parser.set_defaults(enforce_eager=True, gpu_memory_utilization=0.5, **more)
