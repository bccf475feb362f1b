# SPDX-License-Identifier: Apache-2.0
"""Universal neurons: strong whatever the prompt says, so that no behaviour is theirs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cna_vllm.discovery.contrast import as_written, circuit_size
from cna_vllm.discovery.shares import require_all
from cna_vllm.steering.layout import Layout, Places
from cna_vllm.text.prompts import Prompt, read_prompts

GROUP = "universal"
# How many prompts' candidates a rank keeps until they are fetched: with k of them, 8 bytes each.
ROUND_PROMPTS = 256


@dataclass(frozen=True)
class UniversalRule:
    """A neuron is universal if it is among the ``fraction`` of all neurons with the largest
    |activation| (over all layers of a prompt together, routed experts included; ties: lower layer,
    expert, index) in at least the share ``threshold`` of the prompts. One of a routed expert has
    the activation 0 at a prompt that is not routed there."""

    fraction: float = 0.001
    threshold: float = 0.8

    def top(self, layout: Layout) -> int:
        """How many neurons of one prompt are its strongest."""
        return circuit_size(layout.size, self.fraction)

    def needed(self, prompts: int) -> int:
        """In how many of the prompts a universal neuron is among the strongest."""
        return max(1, math.ceil(as_written(self.threshold) * prompts))


def diverse_prompts() -> list[Prompt]:
    """The packaged prompts: many topics, tasks, languages and styles."""
    with resources.as_file(resources.files("cna_vllm") / "data" / "diverse" / "prompts.txt") as f:
        return read_prompts(f)


def membership(
    reports: Sequence[Mapping[str, Any]], prompts: int, k: int, layout: Layout
) -> NDArray[np.int64]:
    """In how many prompts each neuron of ``layout`` is among the k strongest: [neurons].

    reports: of all ranks, each with its own k strongest of every prompt, of which the whole
    model's are a part. Raises RuntimeError when a share is missing, ValueError when an activation
    is not finite.
    """
    keys: dict[str, list[NDArray[np.uint64]]] = {}
    places = [Places.of(report["parts"], layout) for report in reports]
    for report, place in zip(reports, places, strict=True):
        share = report["top"][GROUP]
        if len(share["names"]) != prompts:
            raise RuntimeError(
                f"{len(share['names'])} of {prompts} diverse prompts were recorded; the recording "
                "is not usable"
            )
        found = np.frombuffer(share["keys"], dtype=np.uint64).reshape(prompts, share["k"])
        for name, row in zip(share["names"], _whole_model_keys(found, place), strict=True):
            keys.setdefault(name, []).append(row)
    require_all(places, layout, range(layout.num_layers), "the diverse prompts")
    counts = np.zeros(layout.size, dtype=np.int64)
    for shares in keys.values():
        # Ranks that hold the same neurons have the same keys of them.
        strongest = np.unique(np.concatenate(shares))[-k:]
        magnitudes = (strongest >> np.uint64(32)).astype(np.uint32).view(np.float32)
        if len(strongest) < k or not np.isfinite(magnitudes).all():
            raise ValueError("activations are not finite; try --dtype float32 or bfloat16")
        counts[_neuron(strongest)] += 1
    return counts


def _whole_model_keys(keys: NDArray[np.uint64], places: Places) -> NDArray[np.uint64]:
    """Keys whose neuron is numbered in the model, not in the rank: see ``serving.sinks.Top``.

    A rank's neurons have the order that they have in the model, so ties stay as they were.
    """
    neuron = places.neurons[_neuron(keys)]
    magnitude = keys >> np.uint64(32) << np.uint64(32)
    return magnitude | (np.uint64(2**32 - 1) - neuron.astype(np.uint64))


def _neuron(keys: NDArray[np.uint64]) -> NDArray[np.int64]:
    return (np.uint64(2**32 - 1) - (keys & np.uint64(2**32 - 1))).astype(np.int64)
