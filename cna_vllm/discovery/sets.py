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
    DiscoveryError,
    TokenIds,
    check_sets,
    chosen_layers,
    encode,
    prefill,
)
from cna_vllm.discovery.shares import Mean, assemble
from cna_vllm.discovery.universal import GROUP, ROUND_PROMPTS, membership
from cna_vllm.steering.layout import Layout
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
    """Activations of both sets, float32 [prompts, neurons of chosen layers]."""

    layers: list[int]
    positive: NDArray[np.float32]
    negative: NDArray[np.float32]


@dataclass(frozen=True)
class Recorded:
    """What selection needs, over all neurons of the model.

    positive, negative: with means of 0 in layers that were not recorded.
    universal: bool [neurons]; None without a filter. rows: None unless asked for.
    """

    positive: Mean
    negative: Mean
    universal: NDArray[np.bool_] | None
    rows: SetRows | None

    @property
    def delta(self) -> NDArray[np.float64]:
        """Mean over the positive minus mean over the negative prompts."""
        return self.positive.mean - self.negative.mean


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
    layout = method.layout
    means: dict[str, Mean] = {}
    rows: SetRows | None = None
    if method.bootstrap:
        layers, both = chosen_layers(layout, method.layers), [*sets.positive, *sets.negative]
        found = record_token_rows(llm, both, layers, max_bytes=max_bytes)
        count = len(sets.positive)
        rows = SetRows(layers, found.values[:count], found.values[count:])
        for name, values, reached in (
            (POSITIVE, rows.positive, found.reached[:count]),
            (NEGATIVE, rows.negative, found.reached[count:]),
        ):
            mean = _weighted_mean(values, layers, layout)
            means[name] = Mean(mean, len(values), reached.sum(0))
    k = method.rule.top(layout)
    members = np.zeros(layout.size, dtype=np.int64)
    left = list(sets.universal)
    while left or not means:
        diverse, left = left[:ROUND_PROMPTS], left[ROUND_PROMPTS:]
        requests = [(ids, GROUP) for ids in diverse]
        if not means:
            requests += [(ids, POSITIVE) for ids in sets.positive]
            requests += [(ids, NEGATIVE) for ids in sets.negative]
        plan = {"top": {GROUP: k}, "top_prompts": len(diverse)} if diverse else None
        reports = prefill(llm, requests, plan)
        if diverse:
            members += membership(reports, len(diverse), k, layout)
        if not means:
            counts = {POSITIVE: len(sets.positive), NEGATIVE: len(sets.negative)}
            means = assemble(reports, counts, layout)
    universal = None
    if sets.universal:
        universal = members >= method.rule.needed(len(sets.universal))
    return Recorded(means[POSITIVE], means[NEGATIVE], universal, rows)


def mean_difference(
    rows: SetRows,
    layout: Layout,
    weights: tuple[NDArray[np.float64], NDArray[np.float64]] | tuple[None, None] = (None, None),
) -> NDArray[np.float64]:
    """Mean over the positive minus mean over the negative rows, for all neurons of the model.

    weights: float64 [prompts] of each set, with sum 1; None for equal weights.
    """
    above, below = (
        _weighted_mean(values, rows.layers, layout, weight)
        for values, weight in zip((rows.positive, rows.negative), weights, strict=True)
    )
    return above - below


def _weighted_mean(
    values: NDArray[np.float32],
    layers: Sequence[int],
    layout: Layout,
    weights: NDArray[np.float64] | None = None,
) -> NDArray[np.float64]:
    count = len(values)
    shares = np.full(count, 1 / count) if weights is None else weights
    mean = np.zeros(values.shape[1])
    for prompt in np.flatnonzero(shares):  # no float64 copy of all rows
        mean += shares[prompt] * values[prompt].astype(np.float64)
    whole = np.zeros(layout.size)
    whole[layout.numbers(layers)] = mean
    return whole
