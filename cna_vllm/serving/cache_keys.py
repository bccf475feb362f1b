# SPDX-License-Identifier: Apache-2.0
"""Prefix-cache keys: which blocks may be shared between differently steered requests."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cna_vllm.request import RESOLVED_FIELD, Steering


def steering_block_key(
    extra_args: Mapping[str, Any] | None, prompt_len: int, block_end: int
) -> tuple[str, str] | None:
    """The extra key of the block that ends before position ``block_end``, or None.

    A block that ends at or before the first steered position holds what every request would
    compute there, so it stays shared; any later block depends on the digests, multipliers, scope
    and first steered position.
    """
    resolved = None if extra_args is None else extra_args.get(RESOLVED_FIELD)
    if resolved is None:
        return None
    steering = Steering.from_field(resolved)
    first = steering.first_position(prompt_len)
    if block_end <= first:
        return None
    return ("cna", steering.cache_key(first))
