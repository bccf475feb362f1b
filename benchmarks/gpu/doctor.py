# SPDX-License-Identifier: Apache-2.0
"""`cna-vllm doctor` on a tiny Llama: what works on this machine."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from gpu.parts import emit, finish, rehearsing
from tests import tiny_models

ON_GPU = ("--kv-cache-memory-bytes=268435456", "--gpu-memory-utilization=0.05")


def main() -> None:
    folder = Path(tempfile.mkdtemp(prefix="doctor-"))
    model = tiny_models.llama(folder / "model", head_dim=64, intermediate_size=320)
    tiny_models.add_tokenizer(model)
    command = [sys.executable, "-m", "cna_vllm", "doctor", str(model), "--json"]
    command += ["--dtype=float32", "--max-model-len=512", "--max-num-seqs=64"]
    command += [] if rehearsing() else ON_GPU
    # Its other lines, and the engine's, go to this process's log.
    doctor = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert doctor.stdout is not None
    lines: list[str] = []
    for line in doctor.stdout:
        lines.append(line)
        if line == "}\n":  # the report is whole; nobody waits for an engine that hangs at its end
            break
    else:
        finish([f"doctor ended with status {doctor.wait()} and no report"])
    report = json.loads("".join(lines))
    emit(
        {
            "ok": report["ok"],
            "engine": report["engine"],
            "machine": report["machine"],
            "checks": report["checks"],
        }
    )
    finish([f"{c['claim']}: {c['seen']}" for c in report["checks"] if not c["holds"]])


if __name__ == "__main__":
    main()
