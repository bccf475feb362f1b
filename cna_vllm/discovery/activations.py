# SPDX-License-Identifier: Apache-2.0
"""The activations themselves, prompt by prompt, for notebooks, bootstraps and held-out scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from cna_vllm.discovery.prefill import (
    Dimensions,
    DiscoveryError,
    TokenIds,
    columns,
    encode,
    prefill,
    require_all,
)
from cna_vllm.text.prompts import PromptLike

if TYPE_CHECKING:
    from vllm import LLM

Activations = dict[int, NDArray[np.float32]]

DEFAULT_MAX_BYTES = 2**30
# What the ranks together hold at most, as float32, before it is fetched; at least one prompt.
ROUND_BYTES = 2**28


def record_activations(
    llm: LLM,
    prompts: Sequence[PromptLike],
    layers: Sequence[int] | None = None,
    *,
    raw: bool = False,
    system: str | None = None,
    max_bytes: int = DEFAULT_MAX_BYTES,
) -> Activations:
    """The ``down_proj`` input at the last token of every prompt.

    Returns layer -> float32 [len(prompts), intermediate_size], rows in the order of ``prompts``.

    llm: an engine with ``additional_config={"cna": {"record": True}}``; other requests of the
    same engine are not touched. prompts: strings, lists of chat messages, lists of token ids, or
    ``Prompt``s. layers: which ones (default: all). raw, system: see ``encode``.
    max_bytes: limit of the result, 4 * len(prompts) * len(layers) * intermediate_size bytes;
    workers hold at most 256 MiB of it at a time, or one prompt's rows where those are larger.

    Raises DiscoveryError, before anything runs, when the result would be larger than
    ``max_bytes``, a prompt does not fit into the context, or a layer does not exist.
    """
    wanted = Dimensions.of(llm).layers(layers)
    ids = encode(llm, prompts, raw=raw, system=system)
    return dict(zip(wanted, record_token_rows(llm, ids, wanted, max_bytes=max_bytes), strict=True))


def record_token_rows(
    llm: LLM, prompts: Sequence[TokenIds], layers: Sequence[int], *, max_bytes: int
) -> NDArray[np.float32]:
    """``record_activations`` of token ids: [len(layers), len(prompts), intermediate_size]."""
    size = Dimensions.of(llm)
    per_prompt = 4 * len(layers) * size.intermediate_size
    check_bytes(len(prompts) * per_prompt, max_bytes)
    rows = np.zeros((len(layers), len(prompts), size.intermediate_size), np.float32)
    step = max(1, ROUND_BYTES // max(1, per_prompt))
    for first in range(0, len(prompts), step):
        chosen = range(first, min(first + step, len(prompts)))
        # The group of a request is its prompt's number: requests end in any order.
        reports = prefill(
            llm,
            [(prompts[i], str(i)) for i in chosen],
            {"row_layers": list(layers), "row_prompts": len(chosen)},
        )
        place_rows(reports, chosen, layers, size, rows)
    return rows


def check_bytes(needed: int, max_bytes: int) -> None:
    """Raises DiscoveryError when rows need more memory than allowed."""
    if needed > max_bytes:
        raise DiscoveryError(
            f"the activations of these prompts need {needed} bytes, over max_bytes = {max_bytes}; "
            "raise max_bytes, or take fewer prompts or layers"
        )


def place_rows(
    reports: Sequence[Mapping[str, Any]],
    expected: range,
    layers: Sequence[int],
    size: Dimensions,
    rows: NDArray[np.float32],
) -> None:
    """Writes all ranks' shares of the prompts ``expected`` into ``rows``.

    rows: [len(layers), prompts, intermediate_size]. Raises RuntimeError when a share is missing.
    """
    for report in reports:
        share = report["rows"]
        at = [int(name) for name in share["names"]]
        if sorted(at) != list(expected):
            raise RuntimeError(
                f"{len(at)} of {len(expected)} prompts were recorded; the recording is not usable"
            )
        shape = (len(at), len(share["layers"]), report["width"])
        values = np.frombuffer(share["rows"], dtype=np.float32).reshape(shape)
        for position, layer in enumerate(share["layers"]):
            rows[layers.index(layer), at, columns(report)] = values[:, position]
    require_all(reports, size, layers, "these prompts")
