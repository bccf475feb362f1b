# SPDX-License-Identifier: Apache-2.0
"""What steering is and costs on this machine's GPU, in under 10 minutes on one H100.

    make bench-gpu [ONLY="PART ..."]
    PYTHONPATH=benchmarks python -m gpu [--only PART ...] [--rehearse] [--results FILE]

Each part is a process of its own with a time limit. Its rows are printed and appended to
benchmarks/results/gpu.jsonl as they come; a part that fails is named with its reason, and the
others go on. At the end the table of the README is printed from the rows. Exit status 0: all
parts ended and all they checked holds; 1: some did not; 2: there is no GPU.

What checks runs side by side, what measures runs alone. Seconds on an H100 (PARTS has them and the
limits): the checks 140 (doctor 75, kernel_check 60, exactness 140), kernel_bench 60, fill 15,
engines-1b 130, engines-8b 180; 525 in all.

--rehearse goes through the same code on the CPU with small sizes, Triton's interpreter and tiny
engines. What it prints are no figures of a GPU, and it never writes to benchmarks/results.
"""

from __future__ import annotations

import argparse
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from provenance import FOLDER, provenance, record

from gpu.parts import Part, Row, Runs
from gpu.table import line, table

INTERPRETED = {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
ON_CPU = {"VLLM_CPU_KVCACHE_SPACE": "1", "TORCH_COMPILE_DISABLE": "1"}

# Stage by stage: the parts of a stage run at the same time.
PARTS = (
    (
        Part("doctor", "gpu.doctor", 75, 240, rehearsal=ON_CPU),
        Part("kernel_check", "gpu.kernel_check", 60, 180, rehearsal=INTERPRETED),
        Part("exactness", "gpu.exactness", 140, 300, rehearsal=ON_CPU),
    ),
    (Part("kernel_bench", "gpu.kernel_bench", 60, 150, rehearsal=INTERPRETED),),
    (Part("fill", "gpu.fill", 15, 60),),
    (Part("engines-1b", "gpu.engines", 130, 240, ("1b",), ON_CPU),),
    (Part("engines-8b", "gpu.engines", 180, 300, ("8b",), ON_CPU),),
)
NAMES = [part.name for stage in PARTS for part in stage]


def no_gpu() -> str | None:
    """Why nothing can be measured here."""
    if torch.cuda.is_available():
        return None
    if torch.version.cuda is None and torch.version.hip is None:
        return f"torch {torch.__version__} is built for CPUs"
    try:
        seen = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False)
        said = " ".join((seen.stdout + seen.stderr).split()) or "nothing"
    except OSError as error:
        said = str(error)
    return f"torch {torch.__version__} finds none; nvidia-smi -L says: {said}"


class Report:
    """Rows of one run, printed and appended as they come, each with where it comes from."""

    def __init__(self, results: Path | None) -> None:
        self._results, self._lock = results, threading.Lock()
        self._source = provenance()
        self._source["run"] = self._source["time"]
        self.rows: list[dict[str, Any]] = []

    def take(self, part: str, row: Row) -> None:
        whole = {"benchmark": "gpu", "part": part, **row, **self._source}
        with self._lock:
            self.rows.append(whole)
            print(line(whole), flush=True)
            if self._results is not None:
                record(self._results.stem, whole, self._results.parent)


def main() -> None:
    parser = argparse.ArgumentParser(prog="gpu", description=__doc__.split("\n")[0])
    parser.add_argument("--only", nargs="+", choices=NAMES, metavar="PART", help=", ".join(NAMES))
    parser.add_argument("--rehearse", action="store_true", help="small sizes on the CPU")
    parser.add_argument("--results", type=Path, help="JSONL to append to")
    options = parser.parse_args()
    kept = FOLDER / "results"
    if not options.rehearse:
        if (reason := no_gpu()) is not None:
            print(f"bench-gpu needs a GPU; here there is none: {reason}", file=sys.stderr)
            sys.exit(2)
        options.results = options.results or kept / "gpu.jsonl"
    elif options.results is not None and options.results.resolve().parent == kept.resolve():
        parser.error("a rehearsal's rows are no figures: --results must be outside of results/")
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    folder = Path(tempfile.mkdtemp(prefix="bench-gpu-"))
    runs = Runs(folder, options.rehearse)
    report = Report(options.results)
    seconds: dict[str, float] = {}
    failed: dict[str, list[str]] = {}

    def run(part: Part) -> None:
        begin = time.monotonic()
        print(f"{part.name}: about {part.expected} s on an H100", flush=True)
        wrong = runs.run(part, lambda row: report.take(part.name, row))
        seconds[part.name] = round(time.monotonic() - begin, 1)
        if wrong:
            failed[part.name] = wrong
        print(f"{part.name}: {'FAILED' if wrong else 'done'} in {seconds[part.name]} s", flush=True)

    for stage in PARTS:
        parts = [part for part in stage if not options.only or part.name in options.only]
        with ThreadPoolExecutor(len(stage)) as pool:
            try:
                for future in [pool.submit(run, part) for part in parts]:
                    future.result()
            finally:
                runs.stop()
    report.take("run", {"seconds": seconds, "failed": failed})
    print("\n" + table(report.rows), flush=True)
    for name, reasons in failed.items():
        for reason in reasons:
            print(f"FAILED {name}: {reason}", file=sys.stderr)
    if failed:
        sys.exit(1)
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
