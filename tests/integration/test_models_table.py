# SPDX-License-Identifier: Apache-2.0
"""The table of models is that of this vLLM, says what it promises, and is true of a few."""

from __future__ import annotations

from collections import Counter
from importlib.metadata import distributions

import pytest

from tests.models_table import EXACT, MEANINGS, REFUSED, TABLE, examine, read
from tests.models_zoo import architectures

pytestmark = pytest.mark.engine

# What ``test_architectures`` does not have: activations without a gate, a decoder layer that is its
# own MLP, a gate that vLLM leaves unfused, and refusals of each kind.
QUICK = (
    "ApertusForCausalLM",
    "BloomForCausalLM",
    "CohereForCausalLM",
    "GPT2LMHeadModel",
    "GPTNeoXForCausalLM",
    "Glm4ForCausalLM",
    "GlmForCausalLM",
    "MambaForCausalLM",
    "MixtralForCausalLM",
    "NemotronForCausalLM",
    "OPTForCausalLM",
    "Starcoder2ForCausalLM",
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


@pytest.mark.parametrize("architecture", QUICK)
def test_the_table_is_true(architecture: str) -> None:
    assert examine(architecture) == read()[architecture], "make models"
