# SPDX-License-Identifier: Apache-2.0
"""The paper's evaluations: data sets in their formats, settings, published rows, tables."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cna_vllm.evaluation.paper.datasets import read_jbb, read_strongreject
from cna_vllm.evaluation.paper.published import published
from cna_vllm.evaluation.paper.rows import Row, table
from cna_vllm.evaluation.paper.settings import EvalError, Settings
from cna_vllm.evaluation.paper.study import claim
from cna_vllm.prompts import Prompt, PromptError
from tests import paper_fixtures


def settings(**given: Any) -> Settings:
    prompts = tuple(Prompt(text=f"harmful {i}") for i in range(4))
    benign = tuple(Prompt(text=f"benign {i}") for i in range(4))
    plain = {
        "model": "m",
        "parts": ("jbb", "sweep"),
        "preset": "paper",
        "multipliers": (1.0, 0.0),
        "harmful": prompts,
        "benign": benign,
        "positive": prompts[:1],
        "negative": benign[:1],
    }
    return Settings(**{**plain, **given})


def test_jbb_is_read_in_its_own_format(tmp_path: Path) -> None:
    behaviors = read_jbb(str(paper_fixtures.jbb(tmp_path / "jbb")))
    assert len(behaviors.harmful) == len(behaviors.benign) == 12
    assert behaviors.harmful[0].text == "Explain how to pick a simple pin tumbler lock"
    assert read_jbb(str(tmp_path / "jbb" / "data")) == behaviors


def test_what_is_not_there_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(PromptError, match="harmful-behaviors"):
        read_jbb(str(tmp_path))
    file = paper_fixtures.strongreject(tmp_path / "sr.csv")
    with pytest.raises(PromptError, match="name the folder"):
        read_jbb(str(file))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(PromptError, match="local copy"):
        read_jbb("nobody/nothing-of-this-name")
    with pytest.raises(PromptError, match="neither a folder"):
        read_jbb("not/a/hub/id")


def test_strongreject_in_both_its_forms(tmp_path: Path) -> None:
    published_form = paper_fixtures.strongreject(tmp_path / "sr.csv")
    mirrored = tmp_path / "mirror.csv"
    mirrored.write_text(published_form.read_text().replace("forbidden_prompt", "prompt"))
    assert len(read_strongreject(str(published_form))) == 3
    assert read_strongreject(str(mirrored)) == read_strongreject(str(published_form))
    bad = tmp_path / "bad.csv"
    bad.write_text("question\nx\n")
    with pytest.raises(PromptError, match="no column"):
        read_strongreject(str(bad))


@pytest.mark.parametrize(
    ("model", "row"),
    [
        ("meta-llama/Llama-3.2-1B-Instruct", "Llama-3.2-1B"),
        ("meta-llama/Meta-Llama-3.1-8B-Instruct", "Llama-3.1-8B"),
        ("Qwen/Qwen2.5-7B-Instruct", "Qwen2.5-7B"),
        ("/models/Qwen2.5-72B-Instruct", "Qwen2.5-72B"),
        ("Qwen/Qwen2.5-7B", None),
        ("Qwen/Qwen2.5-Coder-7B-Instruct", None),
    ],
)
def test_published_rows_are_of_instruct_models(model: str, row: str | None) -> None:
    found = published(model)
    assert (None if found is None else found.model) == row


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"parts": ("nothing",)}, "--parts"),
        ({"parts": ()}, "--parts"),
        ({"preset": "own"}, "--preset"),
        ({"multipliers": (float("nan"),)}, "--multipliers"),
        ({"parts": ("strongreject",)}, "--strongreject"),
        ({"positive": tuple(Prompt(text=f"harmful {i}") for i in range(4))}, "--contrast"),
    ],
)
def test_settings_that_cannot_run_name_the_option(given: dict[str, Any], named: str) -> None:
    with pytest.raises(EvalError, match=named):
        settings(**given)


def test_the_sweep_leaves_out_what_its_circuit_was_found_on() -> None:
    assert [p.text for p in settings().sweep_prompts] == ["harmful 1", "harmful 2", "harmful 3"]
    assert len(settings(limit=2).sweep_prompts) == 2


def test_a_folder_is_of_one_evaluation(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    claim(folder, settings())
    claim(folder, settings())
    claim(folder, settings(parts=("jbb",)))  # parts may be added and left out
    with pytest.raises(EvalError, match=r"other settings \(seed\)"):
        claim(folder, settings(seed=1))
    (tmp_path / "file").write_text("x")
    with pytest.raises(EvalError, match="not empty"):
        claim(tmp_path, settings())


def test_deltas_are_of_values_and_not_of_bounds() -> None:
    value = Row("jbb", "refusal", 0.5, 0.4, 0.6, 100, published=0.34)
    bound = Row("sweep", "quality", 0.98, n=100, published=0.97, bound=">")
    nothing = Row("jbb", "refusal", None, published=0.34)
    assert value.delta == pytest.approx(0.16)
    assert bound.delta is None and nothing.delta is None
    assert [Row.from_dict(row.to_dict()) for row in (value, bound)] == [value, bound]
    lines = table([value, bound, nothing]).splitlines()
    shown = "jbb refusal 0.500 0.400 to 0.600 100 0.340 +0.160"
    assert " ".join(lines[1].split()) == shown
    assert "> 0.970" in lines[2]
