# SPDX-License-Identifier: Apache-2.0
"""The whole of CNA on one engine: record, contrast, select, and say where it came from."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import cna_vllm
from cna_vllm.circuit import Circuit
from cna_vllm.discovery.contrast import Sign, circuit_size, select_neurons
from cna_vllm.discovery.record import record_means
from cna_vllm.prompts import Prompt, prompts_digest

if TYPE_CHECKING:
    from vllm import LLM


class DiscoveryError(ValueError):
    """The prompts or options cannot give a circuit; one line with the reason and the fix."""


def discover(
    llm: LLM,
    positive: Sequence[Prompt],
    negative: Sequence[Prompt],
    *,
    fraction: float = 0.001,
    top_k: int | None = None,
    sign: Sign = "both",
    layers: Collection[int] | None = None,
    raw: bool = False,
) -> Circuit:
    """Finds the neurons whose mean activation differs most between two sets of prompts.

    delta = mean over ``positive`` - mean over ``negative`` of the ``down_proj`` input at the last
    prompt token; the circuit is the ``top_k`` (default: ``fraction`` of all) neurons of largest
    |delta|. llm: an engine with ``additional_config={"cna": {"record": True}}``.
    Raises DiscoveryError when a set is empty, when both are the same, or an option is out of
    range.
    """
    import torch
    import transformers
    import vllm

    if not positive or not negative:
        raise DiscoveryError(
            f"CNA needs at least one positive and one negative prompt, got {len(positive)} and "
            f"{len(negative)}"
        )
    if top_k is None and not 0 < fraction <= 1:
        raise DiscoveryError(f"fraction must be above 0 and at most 1, got {fraction}")
    if top_k is not None and top_k < 1:
        raise DiscoveryError(f"top_k must be at least 1, got {top_k}")
    recorded = record_means(llm, {"positive": positive, "negative": negative}, raw=raw)
    delta = recorded.means["positive"] - recorded.means["negative"]
    num_layers, width = delta.shape
    k = top_k if top_k is not None else circuit_size(num_layers, width, fraction)
    neurons = select_neurons(delta, k, sign=sign, layers=layers)
    if not neurons:
        raise DiscoveryError(
            "no neuron differs between the two prompt sets; they must differ in the behaviour"
        )
    config = llm.llm_engine.model_config
    return Circuit(
        model=config.model,
        architecture=config.architectures[0],
        num_layers=num_layers,
        intermediate_size=width,
        neurons=tuple(neurons),
        dtype=str(config.dtype).removeprefix("torch."),
        method={
            "name": "cna",
            "fraction": None if top_k is not None else fraction,
            "k": k,
            "sign": sign,
            "layers": None if layers is None else sorted(layers),
            "chat_template": not raw,
            "position": "last prompt token",
        },
        prompts={
            "positive": len(positive),
            "negative": len(negative),
            "digest": prompts_digest([*positive, *negative]),
        },
        tools={
            "cna_vllm": cna_vllm.__version__,
            "vllm": vllm.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        created=datetime.now(UTC).isoformat(timespec="seconds"),
    )
