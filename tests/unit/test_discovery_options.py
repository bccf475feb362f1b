# SPDX-License-Identifier: Apache-2.0
"""Presets, what overrides them, and what is refused before an engine runs."""

from __future__ import annotations

from typing import Any

import pytest

from cna_vllm.discovery.options import Method
from cna_vllm.discovery.prefill import DiscoveryError
from cna_vllm.discovery.universal import UniversalRule
from cna_vllm.steering.layout import Layout
from cna_vllm.steering.shape import Shape
from cna_vllm.text.prompts import Prompt

SIZE = Layout(Shape.of(10, 1000))
DEFAULTS: dict[str, Any] = {
    "preset": "paper",
    "fraction": None,
    "top_k": None,
    "sign": "both",
    "layers": None,
    "universal": None,
    "rule": UniversalRule(),
    "raw": False,
    "system": None,
    "holdout": 0.0,
    "bootstrap": 0,
    "seed": 0,
}


def method(**changes: Any) -> Method:
    return Method(SIZE, **{**DEFAULTS, **changes})


def test_the_paper_as_stated() -> None:
    found = method()
    assert (found.fraction, found.k, found.layers) == (0.001, 10, None)
    assert len(found.prompts) == 40 and found.source == "packaged"
    assert found.rule == UniversalRule(0.001, 0.8)
    assert "differs" not in found.describe(True)


def test_the_reference_as_its_code_does() -> None:
    found = method(preset="reference")
    assert (found.fraction, found.k, found.layers) == (None, 200, tuple(range(2, 10)))
    assert found.prompts == ()
    assert "bfloat16" in found.describe(True)["differs"]


def test_what_is_given_takes_the_presets_place() -> None:
    found = method(preset="reference", fraction=0.01, layers=[3, 1, 3], universal="default")
    assert (found.fraction, found.k, found.layers) == (0.01, 100, (1, 3))
    assert len(found.prompts) == 40
    assert method(top_k=7).k == 7
    assert method(top_k=7).fraction is None
    own = method(universal=[Prompt(text="a")])
    assert (own.prompts, own.source) == ((Prompt(text="a"),), "given")
    assert method(universal="none").prompts == ()


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"preset": "mine"}, "preset must be one of paper, reference"),
        ({"fraction": 0.1, "top_k": 3}, "not both"),
        ({"fraction": 0.0}, "fraction must be above 0"),
        ({"fraction": float("nan")}, "fraction must be above 0"),
        ({"rule": UniversalRule(fraction=2.0)}, "universal fraction"),
        ({"rule": UniversalRule(threshold=0.0)}, "universal threshold"),
        ({"top_k": 0}, "top_k must be at least 1"),
        ({"sign": "up"}, "sign must be one of"),
        ({"layers": [10]}, r"layers \[10\] are not in 0..9"),
        ({"layers": []}, "no layer is left"),
        ({"holdout": 1.0}, "holdout"),
        ({"bootstrap": -1}, "bootstrap"),
        ({"seed": -1}, "seed"),
        ({"universal": "all"}, "'default' or 'none'"),
        ({"universal": []}, "at least one prompt"),
    ],
)
def test_refusals(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(DiscoveryError, match=says):
        method(**changes)


def test_a_model_without_a_third_layer_has_no_reference_circuit() -> None:
    with pytest.raises(DiscoveryError, match="no layer is left"):
        Method(Layout(Shape.of(2, 8)), **{**DEFAULTS, "preset": "reference"})
