# SPDX-License-Identifier: Apache-2.0
"""The activations themselves, prompt by prompt, for notebooks, bootstraps and held-out scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from cna_vllm.discovery.prefill import (
    DiscoveryError,
    TokenIds,
    chosen_layers,
    encode,
    layout_of,
    prefill,
)
from cna_vllm.discovery.shares import require_all, require_routed
from cna_vllm.steering.layout import Layout, Places
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
    """The down projections' inputs at the last token of every prompt.

    Returns layer -> float32 [len(prompts), neurons], rows in the order of ``prompts``. The neurons
    of a layer are those of its dense or shared MLP, then those of its routed experts, expert by
    expert; they are 0 where the token was not routed to their expert. A layer may have none.

    llm: an engine with ``additional_config={"cna": {"record": True}}``; other requests of the
    same engine are not touched. prompts: strings, lists of chat messages, lists of token ids, or
    ``Prompt``s. layers: which ones (default: all). raw, system: see ``encode``.
    max_bytes: limit of the result, 4 * len(prompts) * neurons bytes; workers hold at most 256 MiB
    of it at a time, or one prompt's rows where those are larger.

    Raises DiscoveryError, before anything runs, when the result would be larger than
    ``max_bytes``, a prompt does not fit into the context, or a layer does not exist.
    """
    layout = layout_of(llm)
    wanted = chosen_layers(layout, layers)
    ids = encode(llm, prompts, raw=raw, system=system)
    rows = record_token_rows(llm, ids, wanted, max_bytes=max_bytes)
    return dict(zip(wanted, rows.by_layer(), strict=True))


@dataclass(frozen=True)
class TokenRows:
    """Activations of some layers, one row a prompt.

    Attributes:
        widths: of each layer.
        values: float32 [prompts, neurons of all these layers].
        reached: bool [prompts, MLPs of the model]: whether the token was routed there.
    """

    widths: tuple[int, ...]
    values: NDArray[np.float32]
    reached: NDArray[np.bool_]

    def by_layer(self) -> list[NDArray[np.float32]]:
        """A view [prompts, neurons] for each layer."""
        ends = zip(self.widths, accumulate(self.widths), strict=True)
        return [self.values[:, end - width : end] for width, end in ends]


def record_token_rows(
    llm: LLM, prompts: Sequence[TokenIds], layers: Sequence[int], *, max_bytes: int
) -> TokenRows:
    """``record_activations`` of token ids. layers: in ascending order."""
    layout = layout_of(llm)
    per_prompt = 4 * layout.width(layers)
    check_bytes(len(prompts) * per_prompt, max_bytes)
    rows = TokenRows(
        tuple(layout.width([layer]) for layer in layers),
        np.zeros((len(prompts), layout.width(layers)), np.float32),
        np.zeros((len(prompts), layout.mlps), bool),
    )
    step = max(1, ROUND_BYTES // max(1, per_prompt))
    for first in range(0, len(prompts), step):
        chosen = range(first, min(first + step, len(prompts)))
        # The group of a request is its prompt's number: requests end in any order.
        reports = prefill(
            llm,
            [(prompts[i], str(i)) for i in chosen],
            {"row_layers": list(layers), "row_prompts": len(chosen)},
        )
        place_rows(reports, chosen, layers, layout, rows)
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
    layout: Layout,
    rows: TokenRows,
) -> None:
    """Writes all ranks' shares of the prompts ``expected`` into ``rows``.

    Raises RuntimeError when a share is missing.
    """
    column = np.full(layout.size, -1, dtype=np.int64)  # of each neuron of these layers
    column[layout.numbers(layers)] = range(sum(rows.widths))
    places = []
    for report in reports:
        share = report["rows"]
        at = np.array(share["names"], dtype=np.int64)
        if sorted(at) != list(expected):
            raise RuntimeError(
                f"{len(at)} of {len(expected)} prompts were recorded; the recording is not usable"
            )
        place = Places.of(report["parts"], layout, share["layers"])
        values = np.frombuffer(share["rows"], dtype=np.float32).reshape(len(at), -1)
        rows.values[np.ix_(at, column[place.neurons])] = values
        reached = np.frombuffer(share["reached"], dtype=np.uint8).reshape(len(at), -1)
        rows.reached[np.ix_(at, Places.of(report["parts"], layout).mlps)] = reached > 0
        places.append(place)
    require_all(places, layout, layers, "these prompts")
    require_routed(rows.reached[expected].sum(0), len(expected), layout, layers, "these prompts")
