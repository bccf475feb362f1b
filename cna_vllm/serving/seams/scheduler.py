# SPDX-License-Identifier: Apache-2.0
"""Seams of the scheduler: the account of steered rows, and blocks that must not be reused as they
are. Without a ``cna`` key each costs one look at an attribute."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from cna_vllm.serving.config import CnaConfig
from cna_vllm.serving.core.ledger import Ledger
from cna_vllm.serving.seams.gate import steering_of
from cna_vllm.serving.seams.wrapping import Original, Wrap, adding, wrap

REPORT_ATTRIBUTE = "cna_report"  # of a ModelRunnerOutput
SCRUB_ATTRIBUTE = "cna_scrub"  # of a SchedulerOutput


def install(wrap: Wrap = wrap) -> None:
    """Schedulers that are built from now on keep a ledger, if they are configured to steer."""
    from vllm.v1.core.kv_cache_manager import KVCacheManager
    from vllm.v1.core.sched.scheduler import Scheduler

    wrap(Scheduler, "__init__", _scheduler_init)
    wrap(Scheduler, "schedule", _schedule)
    wrap(Scheduler, "update_from_output", _update_from_output)
    wrap(KVCacheManager, "free", _free)


@adding
def _scheduler_init(
    original: Original, self: Any, vllm_config: Any, *args: Any, **kwargs: Any
) -> None:
    original(self, vllm_config, *args, **kwargs)
    configured = CnaConfig.from_additional_config(vllm_config.additional_config) is not None
    dtype = str(vllm_config.model_config.dtype).removeprefix("torch.")
    self.cna_ledger = self.kv_cache_manager.cna_ledger = Ledger(dtype) if configured else None


@adding
def _schedule(original: Original, self: Any, *args: Any, **kwargs: Any) -> Any:
    output = original(self, *args, **kwargs)
    if self.cna_ledger is not None:
        for req_id in output.finished_req_ids:
            self.cna_ledger.end(req_id)
        for new in output.scheduled_new_reqs:
            if (steering := steering_of(new)) is not None:
                self.cna_ledger.begin(new.req_id, steering, new.prompt_len)
        if scrub := self.cna_ledger.take_scrub():
            setattr(output, SCRUB_ATTRIBUTE, scrub)
    return output


@adding
def _update_from_output(
    original: Original, self: Any, scheduler_output: Any, model_runner_output: Any
) -> Any:
    ledger: Ledger | None = self.cna_ledger
    if ledger is None:
        return original(self, scheduler_output, model_runner_output)
    report = getattr(model_runner_output, REPORT_ATTRIBUTE, None)
    scheduled = scheduler_output.num_scheduled_tokens
    wrong = ledger.check(scheduled, _computed(scheduler_output), report)
    # Before the step's tokens are taken in: to what follows these requests are aborted ones.
    ended = _end(self, wrong) if wrong else []
    outputs = original(self, scheduler_output, model_runner_output)
    for client, output in ended:
        _outputs_of(outputs, client).outputs.append(output)
    return outputs


def _computed(scheduler_output: Any) -> Iterator[tuple[str, int]]:
    """(request id, tokens computed before the step) of every request of a step."""
    for new in scheduler_output.scheduled_new_reqs:
        yield new.req_id, new.num_computed_tokens
    cached = scheduler_output.scheduled_cached_reqs
    yield from zip(cached.req_ids, cached.num_computed_tokens, strict=True)


def _end(scheduler: Any, wrong: dict[str, str]) -> list[tuple[int, Any]]:
    """Ends requests with an error: (index of the client, its output) of each that still ran."""
    from vllm.v1.engine import EngineCoreOutput, FinishReason
    from vllm.v1.request import RequestStatus

    return [
        (
            request.client_index,
            EngineCoreOutput(
                request_id=request.request_id,
                new_token_ids=[],
                finish_reason=FinishReason.ERROR,
                stop_reason=wrong[request.request_id],
                events=request.take_events(),
                trace_headers=request.trace_headers,
            ),
        )
        for request in scheduler.finish_requests(list(wrong), RequestStatus.FINISHED_ERROR)
    ]


def _outputs_of(outputs: dict[int, Any], client: int) -> Any:
    from vllm.v1.engine import EngineCoreOutputs

    if client not in outputs:
        outputs[client] = EngineCoreOutputs()
    return outputs[client]


@adding
def _free(original: Original, self: Any, request: Any) -> None:
    """Every way by which a request gives its blocks back: finished, aborted or preempted."""
    ledger: Ledger | None = getattr(self, "cna_ledger", None)
    if ledger is None:
        original(self, request)
        return
    start = ledger.unsound_from(
        request.request_id, request.num_computed_tokens, request.num_in_flight_tokens
    )
    if start is not None:
        unsound = set(_blocks_from(self, request.request_id, start))
        self.evict_blocks(unsound)
        ledger.taint(unsound)
    original(self, request)
    if ledger.has_tainted:
        blocks = self.block_pool.blocks
        ledger.scrub_unused(lambda block: blocks[block].ref_cnt > 0)


def _blocks_from(manager: Any, req_id: str, position: int) -> list[int]:
    return [
        block.block_id
        for kind in manager.coordinator.single_type_managers
        for block in kind.req_to_blocks.get(req_id, ())[position // kind.block_size :]
        if not block.is_null
    ]
