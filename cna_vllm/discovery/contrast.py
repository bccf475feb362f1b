# SPDX-License-Identifier: Apache-2.0
"""Selecting neurons by the difference of mean activations (arXiv 2605.12290)."""

from __future__ import annotations

import math
from collections.abc import Collection
from fractions import Fraction
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from cna_vllm.circuit import Neuron

Sign = Literal["both", "positive", "negative"]
SIGNS: tuple[Sign, ...] = ("both", "positive", "negative")


def circuit_size(num_layers: int, intermediate_size: int, fraction: float) -> int:
    """k = max(1, floor(fraction * num_layers * intermediate_size))."""
    # Exact arithmetic on the fraction as written: 0.29 * 100 is 28.999... in floating point.
    return max(1, math.floor(Fraction(repr(float(fraction))) * num_layers * intermediate_size))


def select_neurons(
    delta: NDArray[np.float64],
    k: int,
    *,
    sign: Sign = "both",
    layers: Collection[int] | None = None,
) -> list[Neuron]:
    """The k neurons of largest |delta| over all layers together, strongest first.

    delta: [layers, intermediate_size], mean over positive minus mean over negative prompts.
    sign: keep only neurons whose delta is positive, negative, or either. layers: keep only these.
    Ties go to the lower layer, then to the lower index. Neurons with delta 0 tell nothing apart
    and are never selected, so fewer than k may come back. Raises ValueError for an unknown sign,
    a layer out of range, or non-finite deltas.
    """
    if sign not in SIGNS:
        raise ValueError(f"sign must be one of {', '.join(SIGNS)}, got {sign!r}")
    if not np.isfinite(delta).all():
        raise ValueError("activations are not finite; try --dtype float32 or bfloat16")
    num_layers, width = delta.shape
    strength = np.abs(delta)
    if sign == "positive":
        strength = np.where(delta > 0, strength, 0.0)
    elif sign == "negative":
        strength = np.where(delta < 0, strength, 0.0)
    if layers is not None:
        outside = sorted(layer for layer in layers if not 0 <= layer < num_layers)
        if outside:
            raise ValueError(f"layers {outside} are not in 0..{num_layers - 1}")
        kept = np.zeros(num_layers, dtype=bool)
        kept[list(layers)] = True
        strength = np.where(kept[:, None], strength, 0.0)
    flat = strength.reshape(-1)
    # A stable sort keeps equal strengths in (layer, index) order.
    order = np.argsort(-flat, kind="stable")[:k]
    return [
        Neuron(int(i) // width, int(i) % width, float(delta.reshape(-1)[i]))
        for i in order
        if flat[i] > 0
    ]
