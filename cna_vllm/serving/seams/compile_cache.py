# SPDX-License-Identifier: Apache-2.0
"""Seam of the compile cache: its key holds what shapes the graph, never names, paths or content."""

from __future__ import annotations

import copy
from typing import Any

from cna_vllm.serving.config import CONFIG_KEY, CnaConfig
from cna_vllm.serving.seams.wrapping import Original, Wrap, adding, wrap

SHAPING = ("max_circuits", "max_circuits_per_request", "max_vectors", "max_vectors_per_request")
"""Settings, beside whether the engine records, from which sizes of operands follow."""


def install(wrap: Wrap = wrap) -> None:
    """Configurations of engines that differ only in their circuits share what was compiled."""
    from vllm.config import VllmConfig

    wrap(VllmConfig, "compute_hash", _compute_hash)


@adding
def _compute_hash(original: Original, self: Any, *args: Any, **kwargs: Any) -> Any:
    config = CnaConfig.from_additional_config(self.additional_config)
    if config is None:
        return original(self, *args, **kwargs)
    shape = {name: getattr(config, name) for name in (*SHAPING, "record")}
    alike = copy.copy(self)
    alike.additional_config = {**self.additional_config, CONFIG_KEY: shape}
    return original(alike, *args, **kwargs)
