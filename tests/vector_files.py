# SPDX-License-Identifier: Apache-2.0
"""Random steering vectors for the tiny models: as the oracle takes them, and as a file."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch

from cna_vllm.steering.vectors import VectorSet
from tests.oracles import Vectors
from tests.tiny_models import LAYERS

HIDDEN = 64


def random_vectors(form: str, layers: Iterable[int], seed: int, scale: float) -> Vectors:
    """Gaussian vectors of standard deviation ``scale`` for the given layers."""
    generator = torch.Generator().manual_seed(seed)
    return Vectors(
        form, {layer: scale * torch.randn(HIDDEN, generator=generator) for layer in layers}
    )


def vector_set(vectors: Vectors, architecture: str = "LlamaForCausalLM") -> VectorSet:
    """The same as users hold it."""
    return VectorSet(
        form=vectors.form,  # type: ignore[arg-type]
        model="test",
        architecture=architecture,
        num_layers=LAYERS,
        hidden_size=HIDDEN,
        vectors={layer: vector.numpy() for layer, vector in vectors.by_layer.items()},
    )


def save_vectors(
    folder: Path, named: Mapping[str, Vectors], architecture: str = "LlamaForCausalLM"
) -> dict[str, str]:
    """Name -> file."""
    files = {}
    for name, vectors in named.items():
        files[name] = str(folder / f"{name}.safetensors")
        vector_set(vectors, architecture).save(files[name])
    return files
