# SPDX-License-Identifier: Apache-2.0
"""Which tensor of a checkpoint holds the down projection of which MLP, and how it lies there."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

Mlp = tuple[int, int | None]
"""A layer, and the routed expert; None for the layer's dense or shared MLP."""

_NAME = re.compile(
    r"(?P<prefix>(?:.*\.)?)(?:layers|h)\.(?P<layer>\d+)\."
    r"(?P<owner>(?:mlp\.|feed_forward\.|mixer\.|block_sparse_moe\.)?"
    r"(?:experts\.(?:(?P<expert>\d+)\.)?|shared_experts?\.|shared_mlp\.)?)"
    r"(?P<linear>down_proj|w2|output_linear|dense_4h_to_h|fc2|fc_out|c_proj)(?:\.weight)?"
)
# Other stacks of layers than the text model's: drafts, images, sound.
_OTHERS = re.compile(r"(?:^|\.)(?:mtp|visual|\w*vision\w*|\w*audio\w*)\.")
# Whose experts are [experts, width, hidden_size], also where both are equal.
_TRANSPOSED = frozenset(("gpt_oss", "llama4_text", "qwen3_vl_moe_text"))


class Found(NamedTuple):
    """A tensor's name, and whether it holds all experts of its layer."""

    name: str
    stacked: bool


class DownProj(NamedTuple):
    """Where one down projection is.

    Attributes:
        name: of the tensor.
        part: index of its first axis where it holds several experts, else None.
        axis: of the neurons in what is left: 1 for [hidden_size, width], 0 for the other way.
    """

    name: str
    part: int | None
    axis: int


def find(names: Iterable[str]) -> dict[str, dict[Mlp, Found]]:
    """Prefix of a decoder -> MLP -> the tensor of its down projection; all experts of a layer that
    are one tensor have the expert -1."""
    found: dict[str, dict[Mlp, Found]] = {}
    for name in names:
        match = _NAME.fullmatch(name)
        if match is None or _OTHERS.search(match["prefix"]):
            continue
        last = match["owner"].split(".")[-2:-1]
        stacked = last == ["experts"] or (
            last == ["block_sparse_moe"] and match["linear"] == "output_linear"
        )
        expert = int(match["expert"]) if match["expert"] else -1 if stacked else None
        found.setdefault(match["prefix"], {})[int(match["layer"]), expert] = Found(name, stacked)
    return found


def neuron_axis(shape: Sequence[int], hidden: int, width: int, model_type: str) -> int | None:
    """`DownProj.axis` of a tensor of this shape; None where it has none, or does not tell."""
    straight, turned = list(shape[-2:]) == [hidden, width], list(shape[-2:]) == [width, hidden]
    if len(shape) == 2:
        return 1 if straight else 0 if turned and model_type == "gpt2" else None
    if straight and turned:
        return 0 if model_type in _TRANSPOSED else None
    return 1 if straight else 0 if turned else None
