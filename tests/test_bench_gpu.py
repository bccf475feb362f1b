# SPDX-License-Identifier: Apache-2.0
"""`make bench-gpu` as far as a machine without a GPU can show it: a rehearsal through the same
code, parts that fail, and the table of what a GPU showed before."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch

ROOT = Path(__file__).parent.parent
BENCHMARKS = ROOT / "benchmarks"


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    path = [str(BENCHMARKS), *(entry for entry in sys.path if entry)]
    return subprocess.run(
        [sys.executable, "-m", *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path)},
        capture_output=True,
        text=True,
        check=False,
    )


def gpu(module: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A module of the benchmark."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module(f"gpu.{module}")


@pytest.mark.slow
def test_a_rehearsal_of_the_kernels_parts(tmp_path: Path) -> None:
    """Through the interpreter; rows go where they are told to, the table is made of them."""
    results = tmp_path / "rows.jsonl"
    kept = (BENCHMARKS / "results" / "gpu.jsonl").read_bytes()
    parts = ("kernel_check", "kernel_bench", "fill")
    done = run("gpu", "--rehearse", "--results", str(results), "--only", *parts)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [json.loads(line) for line in results.read_text().splitlines()]
    assert [row["part"] for row in rows].count("kernel_check") == 2 * 3 + 1
    assert all(row["device"] and row["versions"]["torch"] for row in rows)
    by_case = {(row["dtype"], row["activation"]): row for row in rows if "gates" in row}
    assert all(row["ours"]["max_units"] <= 1 for case, row in by_case.items() if "16" in case[0])
    # The check can fail: torch's own GELU loses its tail.
    gelu = by_case["float32", "gelu"]
    assert gelu["torch"]["max_units"] > 100 * gelu["ours"]["max_units"]
    steered = next(row for row in rows if "cases" in row)
    assert steered["to_the_bit"] == steered["cases"] == 2 * 2 * 3
    times = next(row for row in rows if row["part"] == "kernel_bench")["variants"]
    assert set(times) > {"vllm", "idle", "one arm", "distinct arms"}
    assert times["vllm"]["ratio"] == 1 and all(cell["us"] > 0 for cell in times.values())
    assert "Steered rows: 12 of 12 cases to the bit." in done.stdout
    assert (BENCHMARKS / "results" / "gpu.jsonl").read_bytes() == kept


def test_a_rehearsal_is_no_result() -> None:
    done = run("gpu", "--rehearse", "--results", str(BENCHMARKS / "results" / "gpu.jsonl"))
    assert done.returncode == 2 and "are no figures" in done.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu() -> None:
    done = run("gpu")
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("bench-gpu needs a GPU; here there is none: torch ")


PARTS = {
    "dies": "print('{\"n\": 1}', flush=True); raise ValueError('no such chip')",
    "hangs": """
import subprocess, sys, time
print('{"n": 2}', flush=True)
subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
time.sleep(600)
""",
    "lingers": """
import atexit, time
from gpu.parts import emit, finish
atexit.register(time.sleep, 600)
emit({"n": 3})
print("not a row")
finish(["a claim that does not hold"])
""",
    "works": "from gpu.parts import emit, finish; emit({'n': 4}); finish()",
}


def test_parts_that_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is named with its reason, gives the rows it had, and leaves no process."""
    parts = gpu("parts", monkeypatch)
    for name, source in PARTS.items():
        (tmp_path / f"{name}.py").write_text(source)
    path = [str(tmp_path), str(BENCHMARKS), *(entry for entry in sys.path if entry)]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(path))
    runs = parts.Runs(tmp_path, rehearse=False)
    rows: list[dict[str, int]] = []
    begin = time.monotonic()
    wrong = {
        name: runs.run(parts.Part(name, name, 1, 2 if name == "hangs" else 60), rows.append)
        for name in PARTS
    }
    assert time.monotonic() - begin < 60, "nothing waits for a part that hangs"
    assert rows == [{"n": 1}, {"n": 2}, {"n": 3}, {"n": 4}]
    assert wrong["dies"][0] == "ended with status 1"
    assert "ValueError: no such chip" in wrong["dies"][1]
    assert wrong["hangs"][0] == "took over 2 s"
    assert wrong["lingers"][0] == "a claim that does not hold"
    assert wrong["lingers"][1].endswith("ends: not a row")
    assert wrong["works"] == []
    left = [p for p in psutil.process_iter(["environ"]) if _of(p, tmp_path)]
    assert left == []


def _of(process: psutil.Process, folder: Path) -> bool:
    environment = process.info["environ"] or {}
    alive = process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return alive and environment.get("TMPDIR") == str(folder)


def test_the_table_of_the_first_run() -> None:
    """From the rows that are kept, whichever run was the last."""
    done = run("gpu.table", "--run", "2026-11-26 first run")
    assert done.returncode == 0, done.stderr
    for row in (
        "| bfloat16 silu | 65,280 | 17 (17 tiny) | 17 (17 tiny) | 17 (17 tiny) |",
        "| float16 silu | 14,336 | 8,192 | 232.0 | 535.0 (2.31) | 614.0 (2.65) |",
        "| compiled |  | 112 |  | 26 (gap up to 0.007) |",
    ):
        assert row in done.stdout
    assert "main at 47355c1" in done.stdout
    assert "there are ['2026-11-26 first run'" in run("gpu.table", "--run", "none").stderr


def test_float64_is_rounded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Halfway between two neighbours, and so little beside that float32 cannot tell."""
    rounded = gpu("kernel_check", monkeypatch).rounded
    bit = 2.0**-40
    for dtype in (torch.bfloat16, torch.float16):
        numbers = torch.arange(0x3000, 0x4000, dtype=torch.int16).view(dtype).double()
        lower, upper = numbers[:-1], numbers[1:]
        middle = (lower + upper) / 2
        for sign in (1, -1):
            for value, expected in (
                (middle * (1 + bit), upper),
                (middle * (1 - bit), lower),
                (numbers, numbers),
            ):
                assert torch.equal(rounded(sign * value, dtype).double(), sign * expected)
        twice = (middle * (1 + bit)).to(dtype).double()
        assert not torch.equal(twice, upper), "torch rounds twice, or this proves nothing"
    values = torch.randn(10_000, dtype=torch.float64) * torch.logspace(-9, 4, 10_000, 10)
    assert torch.equal(
        rounded(values, torch.float16), torch.from_numpy(values.numpy().astype(np.float16))
    )
