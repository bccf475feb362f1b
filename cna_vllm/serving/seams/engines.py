# SPDX-License-Identifier: Apache-2.0
"""Seams of deployments with several engines: reaching all of them, or refusing to start."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from cna_vllm.serving.config import CnaConfig, CnaConfigError
from cna_vllm.serving.seams.wrapping import wrap


def install() -> None:
    """Servers that are started from now on are refused where nobody would admit requests."""
    from vllm.v1.engine import utils

    wrap(utils, "bind_engine_zmq_listeners", _bind_engine_zmq_listeners)


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
    """Raises CnaConfigError where circuits are to be loaded while serving, and this front end
    would not reach every engine that serves them."""
    if config.circuit_dir is None:
        return
    if parallel_config.local_engines_only:
        raise CnaConfigError(
            "cna.circuit_dir: with external or hybrid load balancing a front end reaches its own "
            "engines only, so circuits could not be loaded on all engines or none; give circuits "
            "at start and drop circuit_dir, or let vLLM balance the load (no "
            "--data-parallel-external-lb, --data-parallel-hybrid-lb, --data-parallel-rank or "
            "--data-parallel-start-rank)"
        )
    if parallel_config.enable_elastic_ep:
        raise CnaConfigError(
            "cna.circuit_dir: engines that elastic expert parallelism adds later would not hold "
            "what was loaded before; give circuits at start and drop circuit_dir, or drop "
            "--enable-elastic-ep"
        )


def _bind_engine_zmq_listeners(original: Callable[..., Any]) -> Callable[..., Any]:
    """The first step of servers whose front ends are processes of their own."""

    def bind_engine_zmq_listeners(vllm_config: Any, *args: Any, **kwargs: Any) -> Any:
        from vllm import envs

        if (
            envs.VLLM_USE_RUST_FRONTEND
            and CnaConfig.from_additional_config(vllm_config.additional_config) is not None
        ):
            raise CnaConfigError(
                "VLLM_USE_RUST_FRONTEND: the Rust front end does not admit requests for circuits; "
                "unset it, or start the server without a cna key"
            )
        return original(vllm_config, *args, **kwargs)

    return bind_engine_zmq_listeners
