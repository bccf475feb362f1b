# SPDX-License-Identifier: Apache-2.0
"""The whole of CNA on one engine: record, contrast, select, and say where it came from."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from cna_vllm.discovery.activations import DEFAULT_MAX_BYTES, ROUND_BYTES, record_token_rows
from cna_vllm.discovery.contrast import Sign, select_neurons
from cna_vllm.discovery.options import Method, Preset, Universal
from cna_vllm.discovery.prefill import (
    NEGATIVE,
    POSITIVE,
    DiscoveryError,
    TokenIds,
    as_prompts,
    layout_of,
    origin,
    templated,
)
from cna_vllm.discovery.sets import PromptSets, Recorded, encode_sets, record_sets
from cna_vllm.discovery.stability import bootstrap as bootstrapped
from cna_vllm.discovery.stability import mean_signed_activation, separation
from cna_vllm.discovery.universal import UniversalRule
from cna_vllm.steering.circuit import Circuit, Neuron
from cna_vllm.steering.layout import Layout
from cna_vllm.text.prompts import PromptLike, prompts_digest

if TYPE_CHECKING:
    from vllm import LLM

DEFAULT_RULE = UniversalRule()


def discover(
    llm: LLM,
    positive: Sequence[PromptLike],
    negative: Sequence[PromptLike],
    *,
    preset: Preset = "paper",
    fraction: float | None = None,
    top_k: int | None = None,
    sign: Sign = "both",
    layers: Collection[int] | None = None,
    universal: Universal | None = None,
    rule: UniversalRule = DEFAULT_RULE,
    raw: bool = False,
    system: str | None = None,
    holdout: float = 0.0,
    bootstrap: int = 0,
    seed: int = 0,
    max_bytes: int = DEFAULT_MAX_BYTES,
) -> Circuit:
    """Finds the neurons whose mean activation differs most between two sets of prompts.

    delta = mean over ``positive`` - mean over ``negative`` of the down projection's input at the
    last prompt token; the circuit is the ``top_k`` (or ``fraction`` of all) neurons of largest
    |delta| that are not universal. A prompt that is written twice counts twice.

    All neurons are those of every dense and shared MLP and of every routed expert. A routed
    neuron's activation is 0 at a token that was not routed to its expert, and means are over all
    prompts; what they are over the routed ones, and how many these are, ``method["routed"]`` says.

    positive, negative: strings, lists of chat messages, lists of token ids, or ``Prompt``s.
    llm: an engine with ``additional_config={"cna": {"record": True}}``.
    preset: ``paper``: 0.1% of all neurons, every layer, universal neurons excluded; ``reference``:
        what the published code does: 200 neurons, not from layers 0 and 1, no exclusion. Options
        given explicitly take its place.
    universal: prompts of the universal-neuron filter, "default" for the packaged ones, "none".
    rule: what makes a neuron universal.
    raw: send text as it is. system: a system message before every prompt.
    holdout: share of the distinct prompts of each set that selection does not see; they are
        scored afterwards (AUROC in ``method["holdout"]``).
    bootstrap: how many times to repeat the selection on resampled prompts
        (``method["bootstrap"]``); keeps every prompt's activations, at most ``max_bytes`` bytes
        (4 * prompts * neurons of the layers).
    seed: of the split and of the resampling.

    Raises DiscoveryError when a set is empty, both are the same, a prompt does not fit into the
    context, or an option is out of range: all before the engine runs; and when no neuron differs.
    """
    positive, negative = as_prompts(positive, POSITIVE), as_prompts(negative, NEGATIVE)
    method = Method(
        layout_of(llm),
        preset=preset,
        fraction=fraction,
        top_k=top_k,
        sign=sign,
        layers=layers,
        universal=universal,
        rule=rule,
        raw=raw,
        system=system,
        holdout=holdout,
        bootstrap=bootstrap,
        seed=seed,
    )
    sets = encode_sets(llm, positive, negative, method)
    recorded = record_sets(llm, sets, method, max_bytes)
    layout, delta = method.layout, recorded.delta
    select_any = partial(
        select_neurons, k=method.k, sign=method.sign, layers=method.layers, layout=layout
    )
    select = partial(select_any, excluded=recorded.universal)
    neurons = select(delta)
    if not neurons:
        raise DiscoveryError(
            "no neuron differs between the two prompt sets; they must differ in the behaviour"
        )
    found = method.describe(
        templated(llm, [*positive, *negative], raw=method.raw, system=method.system)
    )
    if len(neurons) < method.k:
        found["selected"] = len(neurons)  # the others of k would differ by nothing
    if recorded.universal is not None:
        found["universal"] = _describe_filter(method, recorded.universal, select_any(delta))
    if layout.shape.is_routed:
        found["routed"] = _describe_routed(layout, recorded, neurons)
    if recorded.rows is not None:
        jaccard, frequency = bootstrapped(
            recorded.rows, layout, neurons, select, method.bootstrap, method.seed
        )
        found["bootstrap"] = {
            "resamples": method.bootstrap,
            "seed": method.seed,
            "mean_jaccard": jaccard,
            "frequency": list(frequency.values()),
        }
    circuit = Circuit(
        neurons=tuple(neurons),
        **layout.shape.fields(),
        method=found,
        **origin(llm, sets.learned, len(sets.positive)),
    )
    if method.holdout:
        found["holdout"] = _describe_held_out(llm, circuit, sets, method)
    return replace(circuit, method=found)


def _describe_filter(
    method: Method, excluded: NDArray[np.bool_], unfiltered: Sequence[Neuron]
) -> dict[str, Any]:
    return {
        "source": method.source,
        "prompts": len(method.prompts),
        "digest": prompts_digest(method.prompts),
        "fraction": method.rule.fraction,
        "threshold": method.rule.threshold,
        "found": int(excluded.sum()),
        "kept_out": sum(bool(excluded[method.layout.number(n)]) for n in unfiltered),
    }


def _describe_routed(
    layout: Layout, recorded: Recorded, neurons: Sequence[Neuron]
) -> dict[str, Any]:
    """Of each neuron in the circuit's order: how many prompts of a set were routed to its expert,
    and the difference of the means over only those; None where there is none, or no expert. late:
    what share of the routed neurons, and of the others, is in the last quarter of the layers."""
    ordered = sorted(neurons, key=lambda neuron: neuron.place)
    numbers = np.array([layout.number(neuron) for neuron in ordered])
    sets = recorded.positive, recorded.negative
    above, below = (mean.over_routed(layout, numbers) for mean in sets)
    positive, negative = (mean.routed[layout.mlp_of(numbers)].tolist() for mean in sets)

    def routed(values: Sequence[Any]) -> list[Any]:
        pairs = zip(ordered, values, strict=True)
        return [None if n.expert is None or value != value else value for n, value in pairs]

    first_late = layout.num_layers - -(-layout.num_layers // 4)

    def late(chosen: list[Neuron]) -> float | None:
        return sum(n.layer >= first_late for n in chosen) / len(chosen) if chosen else None

    return {
        "absent": 0,
        "late": {
            "first_layer": first_late,
            "routed": late([n for n in ordered if n.expert is not None]),
            "others": late([n for n in ordered if n.expert is None]),
        },
        "positive": routed(positive),
        "negative": routed(negative),
        "delta": routed((above - below).tolist()),
    }


def _describe_held_out(
    llm: LLM, circuit: Circuit, sets: PromptSets, method: Method
) -> dict[str, Any]:
    held = sets.held_positive, sets.held_negative
    scored = separation(*(_scores(llm, circuit, prompts) for prompts in held))
    return {
        "fraction": method.holdout,
        "seed": method.seed,
        "positive": len(sets.held_positive),
        "negative": len(sets.held_negative),
        "digest": prompts_digest(sets.held),
        "auroc": scored.auroc,
        "p_value": scored.p_value,
    }


def _scores(llm: LLM, circuit: Circuit, prompts: list[TokenIds]) -> NDArray[np.float64]:
    """Each prompt's mean signed activation; rows of a few prompts are held at a time."""
    layers = sorted({neuron.layer for neuron in circuit.neurons})
    per_prompt = 4 * layout_of(llm).width(layers)
    step = max(1, ROUND_BYTES // per_prompt)
    scores = []
    for first in range(0, len(prompts), step):
        chosen = prompts[first : first + step]
        rows = record_token_rows(llm, chosen, layers, max_bytes=len(chosen) * per_prompt)
        by_layer = dict(zip(layers, rows.by_layer(), strict=True))
        scores.append(mean_signed_activation(circuit, by_layer))
    return np.concatenate(scores)
