# SPDX-License-Identifier: Apache-2.0
"""The table of models is that of this vLLM, says what it promises, and is true of a few."""

from __future__ import annotations

import re
from collections import Counter
from importlib.metadata import distributions

import pytest

from tests.models_table import (
    ABSENT,
    ASKED_FOR,
    DISCOVERED,
    EXACT,
    MEANINGS,
    REFUSED,
    TABLE,
    examine,
    read,
)
from tests.models_zoo import architectures
from tests.pages import ROOT

pytestmark = pytest.mark.engine

# What ``test_architectures`` does not have: activations without a gate, a decoder layer that is its
# own MLP, a gate that vLLM leaves unfused, towers beside routed experts, and refusals.
QUICK = (
    "ApertusForCausalLM",
    "BloomForCausalLM",
    "GPT2LMHeadModel",
    "GlmForCausalLM",
    "Llama4ForConditionalGeneration",
    "MambaForCausalLM",
    "MixtralForCausalLM",
    "NemotronForCausalLM",
    "OPTForCausalLM",
)


def test_every_architecture_has_a_row() -> None:
    """None failed; at least 60 are exact or refused, at least 35 of them exact."""
    rows = read()
    assert sorted(rows) == architectures(), "make models"
    counts = Counter(row.outcome for row in rows.values())
    assert set(counts) <= set(MEANINGS)
    assert counts[EXACT] >= 35
    assert counts[EXACT] + counts[REFUSED] >= 60
    assert all(row.detail for row in rows.values())
    versions = {d.version.partition("+")[0] for d in distributions() if d.name.startswith("vllm")}
    assert any(f"of vLLM {version}," in TABLE.read_text() for version in versions), "make models"


def test_the_readme_says_what_the_table_does() -> None:
    """Counts, and that the twenty families people ask for most are exact."""
    rows, told = read(), (ROOT / "README.md").read_text()
    counts = Counter(row.outcome for row in rows.values())
    assert f"Of the {len(rows)} architectures" in told
    for outcome in (EXACT, REFUSED):
        assert re.search(rf"\b{counts[outcome]} are {outcome}\b", told), outcome
    assert re.search(rf"\b{counts[DISCOVERED]} are discovered only\b", told)
    assert re.search(rf"\b{counts[ABSENT]} could not be built or run\b", told)
    assert len(ASKED_FOR) == 20
    exact = told.partition("Exact are ")[2].partition(".\n")[0].partition(". Prompts")[0]
    for family, architecture in ASKED_FOR.items():
        assert rows[architecture].outcome == EXACT, family
        name, _, version = family.partition(" ")
        assert name in exact and version in exact, family


@pytest.mark.parametrize("architecture", QUICK)
def test_the_table_is_true(architecture: str) -> None:
    assert examine(architecture) == read()[architecture], "make models"
