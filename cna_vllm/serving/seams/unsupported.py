# SPDX-License-Identifier: Apache-2.0
"""Seam for a vLLM that this package does not fit: engines that are configured to steer are refused,
all others run as if the package were not there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from cna_vllm.serving.config import CONFIG_KEY, CnaConfigError
from cna_vllm.serving.seams.wrapping import wrap


def refuse(problems: Sequence[str]) -> None:
    """Configurations that are made from now on and have a ``cna`` key raise CnaConfigError."""
    from vllm.config import VllmConfig

    def make(original: Callable[..., None]) -> Callable[..., None]:
        def __post_init__(self: Any, *args: Any, **kwargs: Any) -> None:
            config = self.additional_config
            if isinstance(config, dict) and CONFIG_KEY in config:
                raise CnaConfigError(
                    f"cna: this vLLM cannot be steered: {'; '.join(problems)}; install one that "
                    "can, or remove the cna key"
                )
            original(self, *args, **kwargs)

        return __post_init__

    wrap(VllmConfig, "__post_init__", make)
