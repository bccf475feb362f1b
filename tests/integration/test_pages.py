# SPDX-License-Identifier: Apache-2.0
"""Every Python block of the pages runs as it is written; those of clients are run by
`serving/test_pages.py`, against a server."""

from __future__ import annotations

import runpy
import shutil
from pathlib import Path

import pytest

from tests.engine_forks import forks
from tests.engine_job import V1_HERE, environment
from tests.integration.conftest import Subject
from tests.pages import PAGES, Block, blocks

ENGINES = [block for block in blocks("python") if "import LLM" in block.text]
NOT_RUN = {"cna_vllm/serving/README.md": ["langchain-openai is not installed with this package"]}


def test_what_is_not_run_says_why() -> None:
    """A block more that is not run is one that nobody has seen run: think before adding it here."""
    for page in PAGES:
        reasons = [b.reason for b in blocks("python") if b.page == page and b.reason is not None]
        assert reasons == NOT_RUN.get(page, [])
    assert len(ENGINES) == 2 and not any(block.reason for block in ENGINES)


@pytest.mark.engine
@pytest.mark.slow
@pytest.mark.parametrize("block", ENGINES, ids=lambda block: block.name)
def test_blocks_with_an_engine(smollm2: Subject, tmp_path: Path, block: Block) -> None:
    """As a script; and imported by a process that vLLM starts, when it must do nothing."""
    shutil.copy(smollm2.files["one"], tmp_path / "french.json")
    (tmp_path / "block.py").write_text(block.text, "utf-8")
    ended = forks(interpreted=False).run(
        "tests.integration.test_pages:script", [str(tmp_path)], environment(**V1_HERE), timeout=600
    )
    assert ended.status == 0, ended.output[-6000:]


def script(folder: str) -> None:
    import os

    os.chdir(folder)
    assert "llm" not in runpy.run_path("block.py", run_name="__mp_main__")
    assert "llm" in runpy.run_path("block.py", run_name="__main__")
