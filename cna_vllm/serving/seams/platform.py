# SPDX-License-Identifier: Apache-2.0
"""Seam of the machine: what vLLM, as it is installed here, would run on."""

from __future__ import annotations


def on_cpu() -> bool:
    """Whether engines would run on the CPU."""
    from vllm.platforms import current_platform

    return bool(current_platform.is_cpu())


def device_type() -> str:
    """``cpu``, ``cuda`` or another of vLLM's."""
    from vllm.platforms import current_platform

    return str(current_platform.device_type)


def device_name() -> str:
    """The accelerator's own name."""
    from vllm.platforms import current_platform

    return str(current_platform.get_device_name())
