# SPDX-License-Identifier: Apache-2.0
"""Prefix-cache keys: which blocks may be shared between differently steered requests."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

from cna_vllm.steering.resolved import Steering


class BlockKey(NamedTuple):
    """The extra key of a request's blocks that end after ``first_position``, and of no other.

    A block that ends at or before the first steered position holds what every request would
    compute there, so it stays shared; any later block depends on the digests, multipliers, scope
    and first steered position.
    """

    first_position: float
    key: tuple[str, str]


NO_KEY = BlockKey(math.inf, ("", ""))
"""Of a plain request."""


def steering_key(
    steering: Steering, prompt_len: int, images: Iterable[tuple[int, int]] = ()
) -> BlockKey:
    """The key of a steered request's blocks.

    images: first position of each image in the prompt, and that after its last. Models may let all
    positions of an image attend to each other, so one that is steered in part is keyed as a whole.
    """
    first = steering.first_position(prompt_len)
    starts = [start for start, end in images if start <= first < end]
    return BlockKey(min([first, *starts]), ("cna", steering.cache_key(first)))
