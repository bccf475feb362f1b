# SPDX-License-Identifier: Apache-2.0
"""Rows of models that stock vLLM runs in bfloat16 only: no oracle has its roundings, so a neuron
scaled by m is compared with a column of the down projection scaled by m (``scaled_columns``)."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from cna_vllm import Circuit, Neuron
from cna_vllm.checkpoints.shapes import model_shape
from tests import tiny_models
from tests.models_experts import AnyExpertModel, Mlp
from tests.models_zoo import HIDDEN

MULTIPLIERS = (0.0, -1.0, 2.0, 0.5)
REQUESTS = [
    {"prompt": prompt, "params": {"max_tokens": 12, "ignore_eos": True}}
    for prompt in tiny_models.prompts(6, longest=40)
]

Parts = Mapping[float, Mapping[Mlp, Sequence[int]]]


def parts(oracle: AnyExpertModel) -> Parts:
    """Of every MLP, an eighth of its neurons for each multiplier."""
    draw = random.Random(3)
    held = {
        mlp: draw.sample(range(width), width // 8 * 4) for mlp, width in oracle.widths().items()
    }
    return {
        multiplier: {mlp: sorted(neurons[at::4]) for mlp, neurons in held.items()}
        for at, multiplier in enumerate(MULTIPLIERS)
    }


def circuits(architecture: str, folder: Path) -> dict[str, str]:
    """The files of a circuit for each multiplier, by name, in their order."""
    oracle = AnyExpertModel(folder / "model")
    text = oracle.model.config.get_text_config()
    shape = model_shape(text, text.num_hidden_layers)
    assert shape is not None
    files = {}
    for number, by_mlp in enumerate(parts(oracle).values()):
        neurons = [
            Neuron(mlp, i, 1.0) if isinstance(mlp, int) else Neuron(mlp[0], i, 1.0, mlp[1])
            for mlp, held in by_mlp.items()
            for i in held
        ]
        files[f"part-{number}"] = str(folder / f"part-{number}.json")
        Circuit("test", architecture, **shape.fields(), neurons=neurons).save(
            files[f"part-{number}"]
        )
    return files


def steered() -> list[dict[str, Any]]:
    """``REQUESTS`` with all circuits, in scope ``all``."""
    fields = {
        "cna_circuit": [f"part-{number}" for number in range(len(MULTIPLIERS))],
        "cna_multiplier": [*MULTIPLIERS],
        "cna_scope": "all",
    }
    return [{**r, "params": {**r["params"], "extra_args": fields}} for r in REQUESTS]


@torch.no_grad()
def save_scaled(folder: Path) -> None:
    """Puts the checkpoint whose columns are scaled into the place of the one that is not."""
    oracle = AnyExpertModel(folder / "model")
    downs, experts = oracle.down_projections(), oracle.experts()
    for multiplier, by_mlp in parts(oracle).items():
        for mlp, neurons in by_mlp.items():
            if isinstance(mlp, int):
                weight: Any = downs[mlp].weight
                weight[:, list(neurons)] *= multiplier
                continue
            weight = experts[mlp[0]].down_proj[mlp[1]]
            rows = weight if weight.shape[1] == HIDDEN else weight.T
            rows[list(neurons)] *= multiplier
    config = (folder / "model" / "config.json").read_text()
    oracle.model.save_pretrained(folder / "model")
    (folder / "model" / "config.json").write_text(config)


def same(served: Mapping[str, Any], outputs: Sequence[Mapping[str, Any]]) -> str:
    """Why ``outputs`` of the scaled checkpoint do not prove that circuits act, or ""."""
    plain, found, wanted = (
        [output["token_ids"] for output in many]
        for many in (served["plain"], served["outputs"], outputs)
    )
    if found != wanted:
        return "steered text is not that of scaled columns"
    return "the multipliers hardly change the text" if plain == found else ""
