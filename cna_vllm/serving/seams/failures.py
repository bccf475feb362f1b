# SPDX-License-Identifier: Apache-2.0
"""Seam of the front end's outputs: a request that the core ended for its steering says why."""

from __future__ import annotations

from typing import Any

from cna_vllm.serving.core.ledger import failure_of
from cna_vllm.serving.front.metrics import control_metrics
from cna_vllm.serving.seams.wrapping import Original, Wrap, adding, wrap
from cna_vllm.steering.request import FIELD_MULTIPLIER


def install(wrap: Wrap = wrap) -> None:
    """Outputs that are processed from now on tell errors of steering."""
    from vllm.v1.engine.output_processor import OutputProcessor

    wrap(OutputProcessor, "process_outputs", _process_outputs)


@adding
def _process_outputs(
    original: Original, self: Any, engine_core_outputs: Any, *args: Any, **kwargs: Any
) -> Any:
    failed = [output for output in engine_core_outputs if _message(output) is not None]
    for output in failed:
        state = self.request_states.get(output.request_id)
        if state is None:
            continue
        message = str(output.stop_reason)
        control_metrics().failed.labels(reason=failure_of(message)).inc()
        if state.queue is not None:  # what is awaited there raises it
            state.queue.put(_exception(message))
    result = original(self, engine_core_outputs, *args, **kwargs)
    if failed:
        for request_output in result.request_outputs:
            _without_text(request_output)
    return result


def _message(output: Any) -> str | None:
    """The reason of an ``EngineCoreOutput``, or of a completion, that steering ended: vLLM gives
    none with its own errors."""
    reason = output.stop_reason
    return reason if isinstance(reason, str) and str(output.finish_reason) == "error" else None


def _exception(message: str) -> Exception:
    from vllm.exceptions import GenerationError, VLLMValidationError

    if failure_of(message) == "overflow":
        return VLLMValidationError(message, parameter=FIELD_MULTIPLIER)
    return GenerationError(message)


def _without_text(request_output: Any) -> None:
    """Of ``LLM``: no text that steering spoiled, but the reason, and all other outputs."""
    for completion in getattr(request_output, "outputs", ()):
        if _message(completion) is not None:
            completion.text = ""
            completion.token_ids = []
            completion.logprobs = None
            completion.cumulative_logprob = None
