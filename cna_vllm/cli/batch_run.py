# SPDX-License-Identifier: Apache-2.0
"""What the commands that answer batches check and note before their engine starts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from cna_vllm import __version__
from cna_vllm.batch.plan import Request
from cna_vllm.steering.arms import Arm
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


def check_sampling(rows: Sequence[Request], sampling: Mapping[str, Any]) -> None:
    """Raises PromptError for fields of the run or of a row that vLLM would refuse."""
    from cna_vllm.batch.sampling import check_fields, check_requests

    # Of these two, the plan has made numbers of samples and seeds of rows.
    fields = {name: value for name, value in sampling.items() if name not in ("n", "seed")}
    check_fields(fields, "sampling")
    check_requests(rows)


def check_admission(arms: Iterable[Arm], args: EngineArgs) -> None:
    """Raises SteeringError for an arm that this engine would not admit."""
    from cna_vllm.serving.config import CnaConfig

    config = CnaConfig.from_additional_config(args.additional_config)
    if config is None:  # no section of ours, so no arm of ours either
        return
    for arm in arms:
        CircuitRequest.from_extra_args(
            arm.extra_args(),
            max_multiplier=config.max_multiplier,
            max_circuits=config.max_circuits_per_request,
            max_vectors=config.max_vectors_per_request,
        )


def engine_identity(args: EngineArgs) -> dict[str, Any]:
    """What of an engine decides the answers, for runs that are gone on with."""
    import vllm

    engine = {name: getattr(args, name) for name in _ENGINE_IDENTITY}
    return {
        **{name: None if value is None else str(value) for name, value in engine.items()},
        "cna-vllm": __version__,
        "vllm": vllm.__version__,
    }
