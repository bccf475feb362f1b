# SPDX-License-Identifier: Apache-2.0
"""How many neurons a layer has, read from a configuration before any weights are."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from cna_vllm.checkpoints.models import ModelError, model_dimensions, neurons_per_layer
from cna_vllm.serving.seams.model import served_model
from cna_vllm.serving.worker.gated_mlp import UnsupportedModelError
from tests import tiny_models
from tests.architectures import ARCHITECTURES, COMMON


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_covered_architecture_has_one_size(name: str) -> None:
    architecture = ARCHITECTURES[name]
    config = architecture.config(**{**COMMON, **architecture.changes})
    assert neurons_per_layer(config) == tiny_models.WIDTH


CASES: list[tuple[dict[str, Any], int | None]] = [
    ({"intermediate_size": 7}, 7),
    ({"intermediate_size": 7, "shared_expert_intermediate_size": 5}, 5),
    ({"intermediate_size": 7, "shared_expert_intermediate_size": 0}, 7),
    ({"intermediate_size": 7, "shared_intermediate_size": 3}, 3),
    ({"intermediate_size": [7, 7]}, None),
    ({"intermediate_size": None}, None),
    ({"ffn_dim": 9}, 9),
    ({"ffn_hidden_size": 9, "hidden_size": 2, "model_type": "falcon"}, 9),
    ({"n_inner": None, "hidden_size": 2, "model_type": "gpt2"}, 8),
    ({"n_inner": 9, "hidden_size": 2, "model_type": "gpt2"}, 9),
    ({"hidden_size": 2, "model_type": "mamba2"}, None),
    ({}, None),
]


@pytest.mark.parametrize(("fields", "width"), CASES)
def test_of_the_shared_expert_if_there_is_one(fields: dict[str, Any], width: int | None) -> None:
    assert neurons_per_layer(SimpleNamespace(**fields)) == width


def test_a_model_without_one_size_is_refused_by_name(tmp_path: Any) -> None:
    config = SimpleNamespace(model="some/model", hf_text_config=SimpleNamespace())
    with pytest.raises(UnsupportedModelError, match=r"some/model.*no single intermediate_size"):
        served_model(config)
    (tmp_path / "config.json").write_text(
        '{"model_type": "mamba2", "architectures": ["Mamba2ForCausalLM"]}'
    )
    with pytest.raises(ModelError, match="no single intermediate_size"):
        model_dimensions(str(tmp_path))
