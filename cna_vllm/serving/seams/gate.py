# SPDX-License-Identifier: Apache-2.0
"""What of ours vLLM's objects hold: an input processor the admission gate, a request's parameters
what the request is steered by."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from cna_vllm.steering.request import RESOLVED_FIELD
from cna_vllm.steering.resolved import Steering

if TYPE_CHECKING:
    from cna_vllm.serving.front.admission import Admission


def gate_of(holder: Any) -> Admission | None:
    """The gate behind an engine, an engine's client or the served models; None for a plain one."""
    processor = getattr(holder, "input_processor", None)
    gate: Admission | None = getattr(processor, "cna_admission", None)
    return gate


def keep_steering(request: Any, steering: Steering) -> None:
    """From now on ``steering_of`` the request, and of all that share its parameters."""
    vars(request.sampling_params)["cna_steering"] = steering


def steering_of(request: Any) -> Steering | None:
    """What a request is steered by; its fields are read once in a process."""
    params = request.sampling_params
    if RESOLVED_FIELD not in (getattr(params, "extra_args", None) or ()):
        return None
    if "cna_steering" not in vars(params):
        keep_steering(request, Steering.from_field(params.extra_args[RESOLVED_FIELD]))
    steering: Steering = vars(params)["cna_steering"]
    return steering
