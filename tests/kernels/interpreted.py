# SPDX-License-Identifier: Apache-2.0
"""Programs whose kernels run in Triton's interpreter, which is chosen before Triton is imported."""

import os
import subprocess
import sys


def run_interpreted(program: str) -> str:
    """What the Python file ``program`` prints, in a process of its own that must succeed."""
    worker = subprocess.run(
        [sys.executable, program],
        env={
            **os.environ,
            "TRITON_INTERPRET": "1",
            "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert worker.returncode == 0, worker.stderr[-4000:]
    return worker.stdout
