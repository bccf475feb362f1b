# SPDX-License-Identifier: Apache-2.0
"""Selecting neurons by the difference of mean activations (arXiv 2605.12290)."""

from __future__ import annotations

import math
from collections.abc import Collection
from fractions import Fraction
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from cna_vllm.discovery.prefill import chosen_layers
from cna_vllm.steering.circuit import Neuron
from cna_vllm.steering.layout import Layout
from cna_vllm.steering.shape import Shape

Sign = Literal["both", "positive", "negative"]
SIGNS: tuple[Sign, ...] = ("both", "positive", "negative")


def as_written(share: float) -> Fraction:
    """A share as its decimal digits say: 0.29 * 100 is 28.999... in floating point."""
    return Fraction(repr(float(share)))


def circuit_size(neurons: int, fraction: float) -> int:
    """k = max(1, floor(fraction * neurons)), of all neurons of the model: those of every MLP, and
    of every routed expert."""
    return max(1, math.floor(as_written(fraction) * neurons))


def select_neurons(
    delta: NDArray[np.float64],
    k: int,
    *,
    sign: Sign = "both",
    layers: Collection[int] | None = None,
    excluded: NDArray[np.bool_] | None = None,
    layout: Layout | None = None,
) -> list[Neuron]:
    """The k neurons of largest |delta| over all layers together, strongest first.

    delta: mean over positive minus mean over negative prompts, of every neuron of ``layout``; or,
    of a model whose layers have one MLP of one width, [layers, intermediate_size].
    sign: keep only neurons whose delta is positive, negative, or either. layers: keep only these.
    excluded: bool, shape of delta: neurons that may not be selected.
    Ties go to the lower layer, then to the dense or shared MLP, the lower expert and the lower
    index. Neurons with delta 0 tell nothing apart and are never selected, so fewer than k may come
    back. Raises ValueError for an unknown sign, a layer out of range, or non-finite deltas.
    """
    if sign not in SIGNS:
        raise ValueError(f"sign must be one of {', '.join(SIGNS)}, got {sign!r}")
    if not np.isfinite(delta).all():
        raise ValueError("activations are not finite; try --dtype float32 or bfloat16")
    if layout is None:
        layout = Layout(Shape.of(*delta.shape))
    flat = delta.reshape(-1)
    signed = {"both": np.abs(flat), "positive": flat, "negative": -flat}[sign]
    strength = np.zeros(layout.size)
    for layer in chosen_layers(layout, layers):
        place = layout.layer(layer)
        strength[place] = np.maximum(signed[place], 0.0)
    if excluded is not None:
        strength[excluded.reshape(-1)] = 0.0
    candidates = np.flatnonzero(strength)
    if len(candidates) > k:
        weakest = np.partition(strength[candidates], -k)[-k]
        candidates = candidates[strength[candidates] >= weakest]
    # A stable sort keeps equal strengths in the order of their numbers.
    chosen = candidates[np.argsort(-strength[candidates], kind="stable")[:k]]
    return layout.neurons(chosen, flat[chosen])
