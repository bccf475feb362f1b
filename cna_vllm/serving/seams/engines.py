# SPDX-License-Identifier: Apache-2.0
"""Seams of deployments with several engines: reaching all of them, or refusing to start."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from itertools import chain
from typing import Any

from cna_vllm.serving.config import CnaConfig, CnaConfigError
from cna_vllm.serving.front.store import RegistryStore
from cna_vllm.serving.seams.gate import gate_of
from cna_vllm.serving.seams.wrapping import Original, Wrap, adding, wrap
from cna_vllm.steering.packed import Packed


def install(wrap: Wrap = wrap) -> None:
    """Engines that are built from now on get what is configured before their first request;
    servers are refused where nobody would admit requests."""
    from vllm.v1.engine import utils
    from vllm.v1.engine.async_llm import AsyncLLM
    from vllm.v1.engine.llm_engine import LLMEngine

    wrap(utils, "bind_engine_zmq_listeners", _bind_engine_zmq_listeners)
    wrap(LLMEngine, "__init__", _llm_engine_init)
    wrap(AsyncLLM, "add_request", _async_add_request)


@adding
def _llm_engine_init(original: Original, self: Any, *args: Any, **kwargs: Any) -> None:
    original(self, *args, **kwargs)
    for content in _contents(self):
        for report in self.collective_rpc("cna_load", args=tuple(content)):
            _refuse(report)


@adding
async def _async_add_request(original: Original, self: Any, *args: Any, **kwargs: Any) -> Any:
    await ready(self)
    return await original(self, *args, **kwargs)


async def ready(engine_client: Any) -> list[Any]:
    """Returns when every engine holds what this front end's names stood for when it was first
    asked: the engines' workers' status then.

    Raises CnaConfigError, each time, where one does not take it, or holds other content too.
    """
    held = vars(engine_client)
    if "cna_ready" not in held:
        held["cna_ready"] = asyncio.ensure_future(_push(engine_client))
    if not held["cna_ready"].done() or held["cna_ready"].exception() is not None:
        await asyncio.shield(held["cna_ready"])
    engines: list[Any] = held["cna_ready"].result()
    return engines


async def _push(engine_client: Any) -> list[Any]:
    contents = await asyncio.to_thread(_contents, engine_client)
    for content in contents:
        for report in chain(*await call_every_engine(engine_client, "cna_load", tuple(content))):
            _refuse(report)
    if gate_of(engine_client) is None:
        return []
    engines = await call_every_engine(engine_client, "cna_status", ())
    named = {content.digest for content in contents}
    if any({*report["circuits"], *report["vectors"]} != named for report in chain(*engines)):
        raise CnaConfigError(
            "cna: this API server and another one read different content under the same names: a "
            "file was changed while they started; start the server again"
        )
    return engines


def _contents(engine: Any) -> list[Packed]:
    """What the names of an engine's front end stand for."""
    gate = gate_of(engine)
    if gate is None:
        return []
    return [content.packed() for content in gate.registry.names().contents().values()]


def _refuse(report: Mapping[str, Any]) -> None:
    if report["refused"]:
        raise CnaConfigError(f"cna: a worker cannot hold what is configured: {report['refused']}")


async def call_every_engine(engine_client: Any, method: str, args: tuple[Any, ...]) -> list[Any]:
    """``collective_rpc`` of every data-parallel engine: for each, in rank order, its workers'
    answers. vLLM's own returns those of the first engine, whatever the others say.

    Raises what the first engine to fail raised; others may have done what was asked.
    """
    results: list[Any] = await engine_client.engine_core.call_utility_all_async(
        "collective_rpc", method, None, args, None
    )
    return results


def refuse_partial_control(config: CnaConfig, parallel_config: Any) -> None:
    """Raises CnaConfigError where this front end would not reach every engine that serves what it
    pushes: at the start, or of what is to be loaded while serving."""
    if config.circuit_dir is not None and parallel_config.local_engines_only:
        raise CnaConfigError(
            "cna.circuit_dir: with external or hybrid load balancing a front end reaches its own "
            "engines only, so circuits could not be loaded on all engines or none; give circuits "
            "at start and drop circuit_dir, or let vLLM balance the load (no "
            "--data-parallel-external-lb, --data-parallel-hybrid-lb, --data-parallel-rank or "
            "--data-parallel-start-rank)"
        )
    if parallel_config.enable_elastic_ep:
        raise CnaConfigError(
            "cna: engines that elastic expert parallelism adds later would not hold what was "
            "loaded before; drop --enable-elastic-ep, or the cna key"
        )


@adding
def _bind_engine_zmq_listeners(
    original: Original, vllm_config: Any, *args: Any, **kwargs: Any
) -> Any:
    """The first step of servers whose front ends are processes of their own."""
    from vllm import envs

    config = CnaConfig.from_additional_config(vllm_config.additional_config)
    if config is not None and config.registry_dir is not None:
        RegistryStore(config.registry_dir).claim()
    if config is not None and envs.VLLM_USE_RUST_FRONTEND:
        raise CnaConfigError(
            "VLLM_USE_RUST_FRONTEND: the Rust front end does not admit requests for circuits; "
            "unset it, or start the server without a cna key"
        )
    return original(vllm_config, *args, **kwargs)
