# SPDX-License-Identifier: Apache-2.0
"""Reaches into vLLM's internals stand in the seams and nowhere else: read from syntax trees."""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path

import pytest

from tests.vllm_names import SEAMS, VllmName, outside_the_room, product_files, vllm_names

SPEC = importlib.util.find_spec("vllm")
assert SPEC is not None and SPEC.origin is not None
VLLM = Path(SPEC.origin).parent.parent
OUTSIDE = [file for file in product_files() if SEAMS not in file.parents]
NAMES = {name.dotted: name for name in vllm_names(product_files())}


def test_everything_else_uses_what_vllm_documents() -> None:
    assert [line for file in OUTSIDE for line in outside_the_room(file, VLLM)] == []


@pytest.mark.parametrize("name", NAMES.values(), ids=NAMES)
def test_every_name_is_there(name: VllmName) -> None:
    module = importlib.import_module(name.module)
    if name.name and not hasattr(module, name.name):
        importlib.import_module(name.dotted)


@pytest.mark.parametrize(
    "line",
    [
        "from vllm.entrypoints.openai import api_server",
        "def f():\n    from vllm.platforms import current_platform",
        "import vllm.config",
        "from vllm import envs",
        "m = import_module('vllm.entrypoints.cli.serve')",
        "n = llm.llm_engine.has_unfinished_requests()",
        "if TYPE_CHECKING:\n    from vllm.engine.arg_utils import EngineArgs",
    ],
)
def test_the_rule_sees_a_reach(line: str, tmp_path: Path) -> None:
    file = tmp_path / "careless.py"
    file.write_text("from vllm import LLM, SamplingParams\nimport vllm\nvllm.__version__\n")
    assert outside_the_room(file, VLLM) == []
    file.write_text(line)
    assert len(outside_the_room(file, VLLM)) == 1


def test_there_is_something_to_hold() -> None:
    assert len(OUTSIDE) > 100 and len(NAMES) > 30
