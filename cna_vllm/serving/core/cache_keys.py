# SPDX-License-Identifier: Apache-2.0
"""Prefix-cache keys: which blocks may be shared between differently steered requests."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from cna_vllm.steering.request import RESOLVED_FIELD, Steering


class BlockKey(NamedTuple):
    """The extra key of a request's blocks that end after ``first_position``.

    A block that ends at or before the first steered position holds what every request would
    compute there, so it stays shared; any later block depends on the digests, multipliers, scope
    and first steered position.
    """

    first_position: int
    key: tuple[str, str]

    def of_block(self, end: int) -> tuple[str, str] | None:
        """The key of the block that ends before position ``end``; None for a shared one."""
        return self.key if end > self.first_position else None


def steering_key(extra_args: Mapping[str, Any] | None, prompt_len: int) -> BlockKey | None:
    """The key of a request's blocks; None for a plain one."""
    resolved = None if extra_args is None else extra_args.get(RESOLVED_FIELD)
    if resolved is None:
        return None
    steering = Steering.from_field(resolved)
    first = steering.first_position(prompt_len)
    return BlockKey(first, ("cna", steering.cache_key(first)))
