# SPDX-License-Identifier: Apache-2.0
"""What the commands that answer batches have in common, up to the start of their engine."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from cna_vllm import __version__
from cna_vllm.batch.plan import Request
from cna_vllm.cli.usage import UsageError
from cna_vllm.steering.arms import Arm, steering_arm
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
