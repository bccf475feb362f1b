# SPDX-License-Identifier: Apache-2.0
"""Seam of a worker's KV cache: blocks set to zero before others have them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

# Not every dtype of a cache (FP8) can be filled; an integer of its size can.
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}


def zero_blocks(runner: Any, block_ids: Sequence[int]) -> None:
    """Zeroes KV cache blocks of every attention layer, in the order of the runner's stream.

    On a device by vLLM's own zeroing kernel, one launch for all layers; it is made for hybrid
    models, and on others on the first use here.
    """
    if runner.device.type != "cpu":
        zeroer = getattr(runner, "kv_block_zeroer", None) or getattr(
            runner, "_kv_block_zeroer", None
        )
        if zeroer is None:
            runner._init_kv_zero_meta()
            zeroer = getattr(runner, "kv_block_zeroer", None) or runner._kv_block_zeroer
        zeroer.zero_block_ids(list(block_ids))
        return
    blocks = torch.tensor(block_ids)
    count = runner.kv_cache_config.num_blocks
    layers = runner.vllm_config.compilation_config.static_forward_context
    for name in {n for g in runner.kv_cache_config.kv_cache_groups for n in g.layer_names}:
        cache = layers[name].kv_cache
        for part in (cache,) if isinstance(cache, torch.Tensor) else cache:
            # A manager's block is `ratio` blocks of the kernel, side by side.
            ratio = part.shape[0] // count
            rows = (blocks[:, None] * ratio + torch.arange(ratio)).flatten()
            part.view(_INTEGERS[part.element_size()]).index_fill_(0, rows, 0)
