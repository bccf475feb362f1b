# SPDX-License-Identifier: Apache-2.0
"""Seams of the engine core: block keys, and circuits that admitted requests still need."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from cna_vllm.request import RESOLVED_FIELD, Steering
from cna_vllm.serving.cache_keys import steering_block_key
from cna_vllm.serving.config import CnaConfig
from cna_vllm.serving.seams.wrapping import wrap
from cna_vllm.serving.table import CircuitTableError


def install() -> None:
    """Cores that are built from now on key their blocks and guard their circuits."""
    from vllm.v1.core import kv_cache_utils
    from vllm.v1.engine.core import EngineCore

    wrap(kv_cache_utils, "_gen_prompt_embeds_extra_hash_keys", _block_keys)
    wrap(EngineCore, "_initialize_kv_caches", _initialize_kv_caches)
    wrap(EngineCore, "preprocess_add_request", _preprocess_add_request)
    wrap(EngineCore, "add_request", _add_request)
    wrap(EngineCore, "collective_rpc", _collective_rpc)


def _block_keys(original: Callable[..., list[Any]]) -> Callable[..., list[Any]]:
    def _gen_prompt_embeds_extra_hash_keys(
        request: Any, start_token_idx: int, end_token_idx: int
    ) -> list[Any]:
        keys = original(request, start_token_idx, end_token_idx)
        params = request.sampling_params
        if params is None or not params.extra_args:
            return keys
        key = steering_block_key(params.extra_args, request.num_prompt_tokens, end_token_idx)
        return keys if key is None else [*keys, key]

    return _gen_prompt_embeds_extra_hash_keys


class ResidentCircuits:
    """What the workers of one core hold, and which of it requests on their way still need.

    Requests of several front ends and their loads reach the core through queues of their own, so
    only the core can tell that a request was overtaken by the eviction of its circuit.
    """

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self._resident: frozenset[str] = frozenset()
        self._pending: dict[str, tuple[str, ...]] = {}

    def hold(self, request_id: str, digests: tuple[str, ...]) -> None:
        """Keeps circuits for a request until ``release``. Raises CircuitTableError for one that is
        not there: that fails the request, where a worker could only fail the engine."""
        with self.lock:
            for digest in digests:
                if digest not in self._resident:
                    raise CircuitTableError(
                        f"circuit or vector {digest[:12]} is not resident: it was unloaded, and "
                        "its row was needed, before the request reached the engine; send it again"
                    )
            self._pending[request_id] = digests

    def release(self, request_id: str) -> None:
        """The scheduler knows the request now; unknown ids are fine."""
        self._pending.pop(request_id, None)

    def wanted(self, requests: Iterable[Any]) -> list[str]:
        """Digests of the scheduler's requests and of those on their way; call under the lock."""
        digests = {d for request in requests for d in _digests(request)}
        return sorted(digests.union(*self._pending.values()))

    def update(self, reports: Iterable[Mapping[str, Any]]) -> None:
        """What all workers hold, at the start and after a load; call under the lock."""
        self._resident = frozenset.intersection(*(frozenset(r["resident"]) for r in reports))


def _digests(request: Any) -> Iterator[str]:
    extra_args = getattr(request.sampling_params, "extra_args", None) or {}
    if (resolved := extra_args.get(RESOLVED_FIELD)) is not None:
        yield from Steering.from_field(resolved).digests


def _circuits_of(core: Any) -> ResidentCircuits:
    """Made on first use: a core loads plugins, and with them these seams, while it is built."""
    circuits: ResidentCircuits = vars(core).setdefault("cna_circuits", ResidentCircuits())
    return circuits


def _initialize_kv_caches(original: Callable[..., Any]) -> Callable[..., Any]:
    """The last thing a core does while it is built; its workers hold what they start with."""

    def initialize_kv_caches(self: Any, vllm_config: Any) -> Any:
        result = original(self, vllm_config)
        if CnaConfig.from_additional_config(vllm_config.additional_config) is not None:
            circuits = _circuits_of(self)
            with circuits.lock:
                circuits.update(self.model_executor.collective_rpc("cna_status"))
        return result

    return initialize_kv_caches


def _preprocess_add_request(original: Callable[..., Any]) -> Callable[..., Any]:
    def preprocess_add_request(self: Any, request: Any) -> Any:
        if digests := tuple(_digests(request)):
            _circuits_of(self).hold(request.request_id, digests)
        return original(self, request)

    return preprocess_add_request


def _add_request(original: Callable[..., None]) -> Callable[..., None]:
    def add_request(self: Any, request: Any, *args: Any, **kwargs: Any) -> None:
        original(self, request, *args, **kwargs)
        _circuits_of(self).release(request.request_id)

    return add_request


def _collective_rpc(original: Callable[..., list[Any]]) -> Callable[..., list[Any]]:
    """Tells workers that make room for a circuit or a vector what unfinished requests need."""

    def collective_rpc(
        self: Any,
        method: Any,
        timeout: float | None = None,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> list[Any]:
        if method not in ("cna_load", "cna_load_vectors"):
            return original(self, method, timeout, args, kwargs)
        circuits = _circuits_of(self)
        with circuits.lock:
            wanted = circuits.wanted(self.scheduler.requests.values())
            reports = original(self, method, timeout, args, {**(kwargs or {}), "wanted": wanted})
            circuits.update(reports)
        return reports

    return collective_rpc
