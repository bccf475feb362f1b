# SPDX-License-Identifier: Apache-2.0
"""Seams of the engine core: its own admission, block keys, and circuits that requests need."""

from __future__ import annotations

import logging
import sys
import threading
from collections.abc import Iterable, Mapping
from typing import Any

from cna_vllm.serving.config import CircuitTableError, CnaConfig
from cna_vllm.serving.core.admission import CoreAdmission
from cna_vllm.serving.core.cache_keys import NO_KEY, BlockKey, steering_key
from cna_vllm.serving.seams.api_server import validation_error
from cna_vllm.serving.seams.gate import keep_steering, steering_of
from cna_vllm.serving.seams.wrapping import Original, Wrap, adding, wrap
from cna_vllm.steering.packed import KindName, Packed
from cna_vllm.steering.request import SteeringError

logger = logging.getLogger("vllm.cna")
ASLEEP = "the engine sleeps, and its memory is elsewhere; wake it up first"


def install(wrap: Wrap = wrap) -> None:
    """Cores that are built from now on refuse what was not admitted, key their blocks and guard
    their circuits."""
    from vllm.v1.core import kv_cache_utils
    from vllm.v1.engine.core import EngineCore, EngineCoreProc

    wrap(kv_cache_utils, "_gen_prompt_embeds_extra_hash_keys", _block_keys)
    wrap(EngineCore, "_initialize_kv_caches", _initialize_kv_caches)
    wrap(EngineCore, "preprocess_add_request", _preprocess_add_request)
    wrap(EngineCore, "add_request", _add_request)
    wrap(EngineCore, "collective_rpc", _collective_rpc)
    wrap(EngineCoreProc, "_handle_client_request", _handle_client_request)
    wrap(EngineCoreProc, "_handle_request_preproc_error", _handle_request_preproc_error)


@adding
def _block_keys(
    original: Original, request: Any, start_token_idx: int, end_token_idx: int
) -> list[Any]:
    keys: list[Any] = original(request, start_token_idx, end_token_idx)
    # Once for each block of every prompt: all that does not depend on the block is kept.
    first_position, key = vars(request).get("cna_key") or _keep_key(request)
    return [*keys, key] if end_token_idx > first_position else keys


def _keep_key(request: Any) -> BlockKey:
    key, steering = NO_KEY, steering_of(request)
    if steering is not None:
        images = [feature.mm_position for feature in request.mm_features]
        spans = [(image.offset, image.offset + image.length) for image in images]
        key = steering_key(steering, request.num_prompt_tokens, spans)
    vars(request)["cna_key"] = key
    return key


class ResidentContent:
    """What the workers of one core hold, and which of it requests on their way still need.

    Requests of several front ends and their loads reach the core through queues of their own, so
    only the core can tell that a request was overtaken by the eviction of its circuit. The lock is
    never held while workers load.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._loaded: dict[str, KindName] = {}
        self._resident: frozenset[str] = frozenset()
        self._pending: dict[str, tuple[str, ...]] = {}

    def hold(self, request_id: str, digests: tuple[str, ...]) -> None:
        """Keeps content for a request until ``release``. Raises CircuitTableError for what is not
        there: that fails the request, where a worker could only fail the engine."""
        with self._lock:
            for digest in digests:
                if digest not in self._resident:
                    raise CircuitTableError(
                        f"circuit or vector {digest[:12]} is not resident: it was unloaded, and "
                        "its row was needed, before the request reached the engine; send it again"
                    )
            self._pending[request_id] = digests

    def release(self, request_id: str) -> None:
        """The scheduler knows the request now, or never will; unknown ids are fine."""
        with self._lock:
            self._pending.pop(request_id, None)

    def begin_load(self, requests: Iterable[Any]) -> list[str]:
        """Digests of the scheduler's requests and of those on their way. What is unloaded and not
        among them may be overwritten: from now on no request gets it."""
        steered = (steering_of(request) for request in requests)
        known = {d for steering in steered if steering for d in steering.digests}
        with self._lock:
            wanted = known.union(*self._pending.values())
            self._resident &= self._loaded.keys() | wanted
        return sorted(wanted)

    def end_load(self, kind: KindName, digest: str, reports: Iterable[Mapping[str, Any]]) -> None:
        """What all workers hold after a load, or after one that failed."""
        with self._lock:
            self._resident = frozenset.intersection(*(frozenset(r["resident"]) for r in reports))
            if digest in self._resident:
                self._loaded[digest] = kind

    def unload(self, digest: str) -> None:
        """Its row stays until it is needed."""
        with self._lock:
            self._loaded.pop(digest, None)

    def loaded(self, kind: KindName) -> int:
        """How many of a kind requests may use."""
        with self._lock:
            return sum(one == kind for one in self._loaded.values())


def _content_of(core: Any) -> ResidentContent:
    """Made on first use: a core loads plugins, and with them these seams, while it is built."""
    content: ResidentContent = vars(core).setdefault("cna_content", ResidentContent())
    return content


@adding
def _initialize_kv_caches(original: Original, self: Any, vllm_config: Any) -> Any:
    config = CnaConfig.from_additional_config(vllm_config.additional_config)
    self.cna_admission = CoreAdmission(config)
    return original(self, vllm_config)


@adding
def _preprocess_add_request(original: Original, self: Any, request: Any) -> Any:
    """Where every request of every client passes, also of such as know nothing of circuits."""
    extra_args = getattr(request.sampling_params, "extra_args", None)
    if not extra_args:
        return original(self, request)
    try:
        steering = self.cna_admission.steering(extra_args, resumable=request.resumable)
    except SteeringError as error:
        raise validation_error(error) from error
    if steering is None:
        return original(self, request)
    keep_steering(request, steering)
    content = _content_of(self)
    content.hold(request.request_id, steering.digests)
    try:
        return original(self, request)
    except BaseException:
        content.release(request.request_id)
        raise


@adding
def _add_request(original: Original, self: Any, request: Any, *args: Any, **kwargs: Any) -> None:
    """The scheduler knows the circuits of its requests by itself."""
    try:
        original(self, request, *args, **kwargs)
    finally:
        _content_of(self).release(request.request_id)


@adding
def _handle_client_request(original: Original, self: Any, request_type: Any, request: Any) -> None:
    """A core that is paused or shuts down answers a preprocessed request without adding it."""
    from vllm.v1.engine import EngineCoreRequestType

    try:
        original(self, request_type, request)
    finally:
        if request_type == EngineCoreRequestType.ADD:
            _content_of(self).release(request[0].request_id)


@adding
def _handle_request_preproc_error(original: Original, self: Any, request: Any) -> None:
    """Tells a client why its request was refused, where vLLM would say only that it failed.

    vLLM 0.33 sends the message of a validation error by itself and comes here for others only.
    """
    from vllm.exceptions import VLLMValidationError
    from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs, FinishReason

    error = sys.exception()
    if not isinstance(error, VLLMValidationError | CircuitTableError):
        original(self, request)
        return
    logger.warning("request %s was refused: %s", request.request_id, error)
    output = EngineCoreOutput(
        request.request_id, [], finish_reason=FinishReason.ERROR, stop_reason=str(error)
    )
    outputs = EngineCoreOutputs(finished_requests={request.request_id}, outputs=[output])
    self.output_queue.put_nowait((request.client_index, outputs))


@adding
def _collective_rpc(
    original: Original,
    self: Any,
    method: Any,
    timeout: float | None = None,
    args: tuple[Any, ...] = (),
    kwargs: dict[str, Any] | None = None,
) -> list[Any]:
    """Tells workers that make room for a circuit or a vector what unfinished requests need;
    answers for its counters itself, without a word to the workers."""
    if method not in ("cna_load", "cna_unload", "cna_counters"):
        return original(self, method, timeout, args, kwargs)
    content = _content_of(self)
    if method == "cna_counters":
        tokens = self.scheduler.cna_ledger.steered_tokens()
        return [{"circuits": content.loaded("circuit"), "steered_tokens": tokens}]
    if method == "cna_unload":
        content.unload(args[0])
        return original(self, method, timeout, args, kwargs)
    if self.model_executor.is_sleeping:
        return [{"resident": [], "refused": ASLEEP}]
    wanted = content.begin_load(self.scheduler.requests.values())
    kind, digest, *_ = Packed(*args)
    try:
        kwargs = {**(kwargs or {}), "wanted": wanted}
        reports = original(self, method, timeout, args, kwargs)
    except Exception:
        # Some worker may have overwritten a row before another failed.
        content.end_load(kind, digest, original(self, "cna_status"))
        raise
    content.end_load(kind, digest, reports)
    return reports
