# SPDX-License-Identifier: Apache-2.0
"""Adapters: their short form, their object, and the fields that a request gets."""

from __future__ import annotations

from typing import Any

import pytest

from cna_vllm.cli.serve import plugins_with_ours
from cna_vllm.serving.front.adapter import Adapter
from cna_vllm.steering.request import SteeringError


@pytest.mark.parametrize(
    ("text", "fields"),
    [
        ("a@0", {"cna_circuit": "a", "cna_multiplier": 0.0, "cna_scope": "last"}),
        ("a@-1.5:all", {"cna_circuit": "a", "cna_multiplier": -1.5, "cna_scope": "all"}),
        ("x:y@2", {"cna_circuit": "x:y", "cna_multiplier": 2.0, "cna_scope": "last"}),
        (
            "a@0+b@@2:generated",
            {"cna_circuit": ["a", "b@"], "cna_multiplier": [0.0, 2.0], "cna_scope": "generated"},
        ),
    ],
)
def test_the_short_form(text: str, fields: dict[str, Any]) -> None:
    adapter = Adapter.parse(text)
    assert dict(adapter.fields) == fields
    assert Adapter.from_dict(adapter.to_dict()) == adapter


@pytest.mark.parametrize("text", ["", "a", "a@", "@1", "a@x", "a@0+", "a@0+b", "a@0:first"])
def test_a_malformed_short_form_is_told(text: str) -> None:
    with pytest.raises(SteeringError, match="CIRCUIT@M"):
        Adapter.parse(text)


@pytest.mark.parametrize("value", [None, [], "a@0", {"cna_circuit": "a"}, {"lora": 1}, {1: 2}])
def test_a_malformed_object_is_told(value: Any) -> None:
    with pytest.raises(SteeringError):
        Adapter.from_dict(value)


def test_a_lora_adapter_travels_along() -> None:
    adapter = Adapter.from_dict({"circuit": "a", "multiplier": 0, "lora": "l"})
    assert adapter.lora == "l" and "cna_lora" not in adapter.fields
    assert Adapter.from_dict(adapter.to_dict()) == adapter


def test_our_plugin_joins_those_that_are_allowed() -> None:
    assert plugins_with_ours("x,y") == "x,y,cna"
    assert plugins_with_ours("cna") == "cna"
    assert "cna" in plugins_with_ours(None).split(",")
