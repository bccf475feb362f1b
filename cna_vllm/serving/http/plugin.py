# SPDX-License-Identifier: Apache-2.0
"""Entry point of ``vllm.endpoint_plugins``: routes beside vLLM's own, behind the same API key.

vLLM attaches them only where ``VLLM_PLUGINS`` names ``cna``, and loading is refused where the
operator named no ``circuit_dir``.
"""

from __future__ import annotations

import asyncio
import logging
from argparse import Namespace
from functools import partial
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastapi import FastAPI
    from starlette.datastructures import State

    from cna_vllm.serving.front.registry import Registry
    from cna_vllm.serving.http.control_plane import ControlPlane

logger = logging.getLogger("vllm.cna")
STATUS_SECONDS = 5.0


class CnaEndpoints:
    """What vLLM asks of an endpoint plugin."""

    name = "cna"
    required_tasks = ("generate",)

    def attach_router(self, app: FastAPI) -> None:
        """Adds the routes; they answer once ``init_state`` has run."""
        from cna_vllm.serving.http.routes import router

        app.include_router(router)

    async def init_state(self, engine_client: Any, state: State, args: Namespace) -> None:
        """Brings all engines in line with the registry, and starts to read their counters.

        Raises CnaConfigError for a configuration that cannot be kept atomic.
        """
        from cna_vllm.serving.config import CnaConfigError
        from cna_vllm.serving.http.control_plane import ControlPlane
        from cna_vllm.serving.seams.gate import gate_of
        from cna_vllm.serving.seams.http_app import api_process, is_lora

        gate = gate_of(engine_client)
        state.cna_control = None
        if gate is None:
            return
        rank, servers = api_process(engine_client)
        if servers > 1 and gate.config.circuit_dir and gate.config.registry_dir is None:
            raise CnaConfigError(
                f"{servers} API server processes that load circuits need cna.registry_dir, a "
                "folder that they share"
            )
        control = ControlPlane(engine_client, partial(is_lora, state), gate)
        await control.reconcile()
        state.cna_control = control
        # /metrics adds up the counters of all API servers, and the workers' are the same for each.
        if rank <= 0:
            # Kept by the state: a task that nothing refers to may vanish.
            reading = read_counters(engine_client, control, gate.registry)
            state.cna_status_task = asyncio.create_task(reading)


async def read_counters(engine_client: Any, control: ControlPlane, registry: Registry) -> None:
    """Until the engine ends: workers count in their own processes, Prometheus asks this one."""
    from cna_vllm.serving.front.metrics import control_metrics

    while not engine_client.errored:
        await asyncio.sleep(STATUS_SECONDS)
        try:
            reports = await control.counters()
            names = registry.names().digests()
        except Exception as error:
            # The engine is ending or a change is half made: the next look tells.
            logger.warning("cna action=status outcome=failed reason=%r", str(error))
            continue
        control_metrics().take_status(reports, names)
