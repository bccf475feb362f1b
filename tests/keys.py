# SPDX-License-Identifier: Apache-2.0
"""The key that vLLM's core adds to a block of a request, by the seam itself."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vllm import SamplingParams
from vllm.v1.request import Request

from cna_vllm.serving.seams.engine_core import _block_keys


def block_key(extra_args: Mapping[str, Any] | None, prompt_len: int, end: int) -> Any:
    """Of the block that ends before position ``end``; None where nothing is added."""
    params = SamplingParams(extra_args=dict(extra_args) if extra_args else None)
    request = Request("r", [0] * prompt_len, params, None)
    keys = _block_keys(lambda *_: [])(request, 0, end)
    return keys[0] if keys else None
