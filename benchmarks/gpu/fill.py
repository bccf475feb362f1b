# SPDX-License-Identifier: Apache-2.0
"""The host's part of a step, by benchmarks/fill.py, which keeps figures of its own as well."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from gpu.parts import emit, finish, rehearsing

SCRIPT = Path(__file__).parents[1] / "fill.py"


def main() -> None:
    command = [sys.executable, str(SCRIPT), *(["--rounds", "10"] if rehearsing() else ["--record"])]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.stdout:
        emit({"lines": done.stdout.splitlines()})
    if done.returncode:
        sys.exit(done.returncode)
    finish()


if __name__ == "__main__":
    main()
