# SPDX-License-Identifier: Apache-2.0
"""What importing the package, and asking the command for help, must not pull in."""

from __future__ import annotations

import subprocess
import sys

import pytest

HEAVY = ("vllm", "transformers", "torch", "numpy", "triton")
REPORT = f"; import sys; print(sorted(set({HEAVY!r}) & set(sys.modules)))"


def loaded_after(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code + REPORT], capture_output=True, text=True, check=True
    )
    return done.stdout.splitlines()[-1]


@pytest.mark.parametrize(
    "code",
    [
        "import cna_vllm",
        "import cna_vllm.text.prompts, cna_vllm.checkpoints.models",
        "from cna_vllm.cli import main; main(['--help'])",
        "from cna_vllm.cli import main; main(['--version'])",
        "from cna_vllm.cli import main; main(['inspect', 'none.json'])",
        "from cna_vllm.cli import main; main(['generate', 'm', '--circuit', 'x'])",
        "import cna_vllm.serving.plugin",
    ],
)
def test_stays_light(code: str) -> None:
    assert loaded_after(code) == "[]"


@pytest.mark.parametrize(
    "command", ["inspect", "compare", "discover", "generate", "bake", "demo", "doctor", "eval"]
)
def test_help_of_a_command_stays_light(command: str) -> None:
    code = (
        "from cna_vllm.cli import main\n"
        f"try: main([{command!r}, '--help'])\n"
        "except SystemExit as end: assert end.code == 0\n"
        "pass"
    )
    assert loaded_after(code) == "[]"
