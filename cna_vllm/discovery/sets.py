# SPDX-License-Identifier: Apache-2.0
"""The prompts of one discovery as token ids, and what the engine recorded of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from cna_vllm.discovery.activations import record_token_rows
from cna_vllm.discovery.contrast import as_written
from cna_vllm.discovery.options import Method
from cna_vllm.discovery.prefill import (
    NEGATIVE,
    POSITIVE,
    Dimensions,
    DiscoveryError,
    TokenIds,
    assemble,
    check_sets,
    encode,
    prefill,
)
from cna_vllm.discovery.universal import GROUP, ROUND_PROMPTS, membership
from cna_vllm.text.prompts import Prompt

if TYPE_CHECKING:
    from vllm import LLM


@dataclass(frozen=True)
class PromptSets:
    """Token ids of all prompts, those to learn from apart from those held out.

    learned, held: the prompts of both sets, positive ones first, in these two parts.
    """

    positive: list[TokenIds]
    negative: list[TokenIds]
    universal: list[TokenIds]
    held_positive: list[TokenIds]
    held_negative: list[TokenIds]
    learned: list[Prompt]
    held: list[Prompt]


@dataclass(frozen=True)
class SetRows:
    """Activations of both sets, float32 [layers, prompts, intermediate_size], of chosen layers."""

    layers: list[int]
    positive: NDArray[np.float32]
    negative: NDArray[np.float32]


@dataclass(frozen=True)
class Recorded:
    """What selection needs, over all layers of the model.

    delta: float64 [layers, intermediate_size], 0 in layers that were not recorded.
    universal: bool, the same shape; None without a filter. rows: None unless asked for.
    """

    delta: NDArray[np.float64]
    universal: NDArray[np.bool_] | None
    rows: SetRows | None


def encode_sets(
    llm: LLM, positive: Sequence[Prompt], negative: Sequence[Prompt], method: Method
) -> PromptSets:
    """Raises DiscoveryError when a prompt does not fit, or a set is empty or equals the other."""

    def ids(prompts: Sequence[Prompt], what: str) -> list[TokenIds]:
        return encode(llm, prompts, what=what, raw=method.raw, system=method.system)

    above, below = ids(positive, POSITIVE), ids(negative, NEGATIVE)
    check_sets("CNA", above, below)
    diverse = ids(method.prompts, GROUP)
    both = [*zip(positive, above, strict=True)], [*zip(negative, below, strict=True)]
    above, held_above = split(above, method.holdout, method.seed)
    below, held_below = split(below, method.holdout, method.seed)
    out = [set(map(tuple, held)) for held in (held_above, held_below)]
    parts: dict[bool, list[Prompt]] = {False: [], True: []}
    for pairs, held in zip(both, out, strict=True):
        for prompt, tokens in pairs:
            parts[tuple(tokens) in held].append(prompt)
    if not above or not below or bool(method.holdout) != bool(held_above and held_below):
        raise DiscoveryError(
            f"holdout = {method.holdout} of {len(positive)} positive and {len(negative)} negative "
            "prompts leaves a part of them empty; give more prompts or another share"
        )
    return PromptSets(
        above, below, diverse, held_above, held_below, learned=parts[False], held=parts[True]
    )


def split(
    prompts: Sequence[TokenIds], fraction: float, seed: int
) -> tuple[list[TokenIds], list[TokenIds]]:
    """(kept, held out), in their order: a random ``fraction`` of the distinct prompts is held out.

    Equal prompts go to the same side, so that no held-out prompt was learned from.
    """
    distinct = list(dict.fromkeys(map(tuple, prompts)))
    count = round(as_written(fraction) * len(distinct))
    order = np.random.default_rng(seed).permutation(len(distinct))
    held = {distinct[i] for i in order[:count]}
    return (
        [ids for ids in prompts if tuple(ids) not in held],
        [ids for ids in prompts if tuple(ids) in held],
    )


def record_sets(llm: LLM, sets: PromptSets, method: Method, max_bytes: int) -> Recorded:
    """Prefills all prompts but those held out: in one pass, unless rows are kept for a bootstrap.

    max_bytes: limit of those rows.
    """
    size = method.size
    delta: NDArray[np.float64] | None = None
    rows: SetRows | None = None
    if method.bootstrap:
        layers, both = size.layers(method.layers), [*sets.positive, *sets.negative]
        values = record_token_rows(llm, both, layers, max_bytes=max_bytes)
        count = len(sets.positive)
        rows = SetRows(layers, values[:, :count], values[:, count:])
        delta = mean_difference(rows, size)
    k = method.rule.top(size)
    members = np.zeros((size.num_layers, size.intermediate_size), dtype=np.int64)
    left = list(sets.universal)
    while left or delta is None:
        diverse, left = left[:ROUND_PROMPTS], left[ROUND_PROMPTS:]
        requests = [(ids, GROUP) for ids in diverse]
        if delta is None:
            requests += [(ids, POSITIVE) for ids in sets.positive]
            requests += [(ids, NEGATIVE) for ids in sets.negative]
        plan = {"top": {GROUP: k}, "top_prompts": len(diverse)} if diverse else None
        reports = prefill(llm, requests, plan)
        if diverse:
            members += membership(reports, len(diverse), k, size)
        if delta is None:
            counts = {POSITIVE: len(sets.positive), NEGATIVE: len(sets.negative)}
            means = assemble(reports, counts, size)
            delta = means[POSITIVE] - means[NEGATIVE]
    needed = method.rule.needed(len(sets.universal))
    return Recorded(delta, members >= needed if sets.universal else None, rows)


def mean_difference(
    rows: SetRows,
    size: Dimensions,
    weights: tuple[NDArray[np.float64], NDArray[np.float64]] | None = None,
) -> NDArray[np.float64]:
    """Mean over the positive minus mean over the negative rows, over all layers of the model.

    weights: float64 [prompts] of each set, with sum 1; None for equal weights.
    """
    delta = np.zeros((size.num_layers, size.intermediate_size))
    for sign, values, which in ((1.0, rows.positive, 0), (-1.0, rows.negative, 1)):
        count = values.shape[1]
        shares = np.full(count, 1 / count) if weights is None else weights[which]
        for prompt in np.flatnonzero(shares):  # no float64 copy of all rows
            delta[rows.layers] += sign * shares[prompt] * values[:, prompt].astype(np.float64)
    return delta
