# SPDX-License-Identifier: Apache-2.0
"""Processes that hold one engine each and measure what they are asked to, one job at a time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any


class Worker:
    """A script in a process of its own; it says a JSON object when it is up, and one a job.

    script: a file, or "-m" when the first argument names a module.
    plugins: VLLM_PLUGINS; "" for vLLM as it is, None for the environment's own.
    environment: what differs from this process's, and from the engine in the worker's own process.
    """

    def __init__(
        self,
        script: str,
        arguments: Sequence[str],
        plugins: str | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        env = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "ERROR"}
        env.update(environment or {})
        env.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
        # Where the memory of a process came to lie decides some percent of its speed.
        env.setdefault("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1")
        if plugins is not None:
            env["VLLM_PLUGINS"] = plugins
        self.process = subprocess.Popen(
            [sys.executable, script, *arguments],
            env=env,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.hello = self._answer()

    def ask(self, job: Any) -> dict[str, Any]:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        return self._answer()

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(timeout=60)

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        while line := self.process.stdout.readline():
            if line.startswith("{"):
                return json.loads(line)
        raise RuntimeError(f"the worker's process ended with {self.process.wait()}")
