# SPDX-License-Identifier: Apache-2.0
"""Seam of the compile cache: its key holds what shapes the graph, never names, paths or content."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from cna_vllm.serving.config import CONFIG_KEY, CnaConfig
from cna_vllm.serving.seams.wrapping import Wrap, wrap

SHAPING = ("max_circuits", "max_circuits_per_request", "max_vectors", "max_vectors_per_request")
"""Settings, beside whether the engine records, from which sizes of operands follow."""


def install(wrap: Wrap = wrap) -> None:
    """Configurations of engines that differ only in their circuits share what was compiled."""
    from vllm.config import VllmConfig

    wrap(VllmConfig, "compute_hash", _compute_hash)


def _compute_hash(original: Callable[..., str]) -> Callable[..., str]:
    def compute_hash(self: Any, *args: Any, **kwargs: Any) -> str:
        config = CnaConfig.from_additional_config(self.additional_config)
        if config is None:
            return original(self, *args, **kwargs)
        shape = {name: getattr(config, name) for name in (*SHAPING, "record")}
        alike = copy.copy(self)
        alike.additional_config = {**self.additional_config, CONFIG_KEY: shape}
        return original(alike, *args, **kwargs)

    return compute_hash
