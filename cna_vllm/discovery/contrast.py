# SPDX-License-Identifier: Apache-2.0
"""Selecting neurons by the difference of mean activations (arXiv 2605.12290)."""

from __future__ import annotations

import math
from collections.abc import Collection
from fractions import Fraction
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from cna_vllm.discovery.prefill import Dimensions
from cna_vllm.steering.circuit import Neuron

Sign = Literal["both", "positive", "negative"]
SIGNS: tuple[Sign, ...] = ("both", "positive", "negative")


def as_written(share: float) -> Fraction:
    """A share as its decimal digits say: 0.29 * 100 is 28.999... in floating point."""
    return Fraction(repr(float(share)))


def circuit_size(num_layers: int, intermediate_size: int, fraction: float) -> int:
    """k = max(1, floor(fraction * num_layers * intermediate_size))."""
    return max(1, math.floor(as_written(fraction) * num_layers * intermediate_size))


def select_neurons(
    delta: NDArray[np.float64],
    k: int,
    *,
    sign: Sign = "both",
    layers: Collection[int] | None = None,
    excluded: NDArray[np.bool_] | None = None,
) -> list[Neuron]:
    """The k neurons of largest |delta| over all layers together, strongest first.

    delta: [layers, intermediate_size], mean over positive minus mean over negative prompts.
    sign: keep only neurons whose delta is positive, negative, or either. layers: keep only these.
    excluded: bool, shape of delta: neurons that may not be selected.
    Ties go to the lower layer, then to the lower index. Neurons with delta 0 tell nothing apart
    and are never selected, so fewer than k may come back. Raises ValueError for an unknown sign,
    a layer out of range, or non-finite deltas.
    """
    if sign not in SIGNS:
        raise ValueError(f"sign must be one of {', '.join(SIGNS)}, got {sign!r}")
    if not np.isfinite(delta).all():
        raise ValueError("activations are not finite; try --dtype float32 or bfloat16")
    num_layers, width = delta.shape
    signed = {"both": np.abs(delta), "positive": delta, "negative": -delta}
    kept = np.zeros(num_layers, dtype=bool)
    kept[Dimensions(num_layers, width).layers(layers)] = True
    strength = np.where(kept[:, None], np.maximum(signed[sign], 0.0), 0.0)
    if excluded is not None:
        strength = np.where(excluded, 0.0, strength)
    flat = strength.reshape(-1)
    # A stable sort keeps equal strengths in (layer, index) order.
    order = np.argsort(-flat, kind="stable")[:k]
    return [
        Neuron(int(i) // width, int(i) % width, float(delta.reshape(-1)[i]))
        for i in order
        if flat[i] > 0
    ]
