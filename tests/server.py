# SPDX-License-Identifier: Apache-2.0
"""A real `cna-vllm serve` for tests: started on a free port, stopped whatever happens."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil

from tests import engine_job
from tests.engine_forks import forks
from tests.engine_job import V1
from tests.processes import Interpreters, Process

KEY = "secret"


@dataclass(frozen=True)
class Server:
    """A running server and how to reach it."""

    process: Process
    url: str

    def http(self, **options: Any) -> httpx.Client:
        """A client with the API key."""
        headers = {"Authorization": f"Bearer {KEY}"}
        return httpx.Client(base_url=self.url, headers=headers, timeout=120, **options)

    def openai(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=KEY, max_retries=0, timeout=120)

    def memory(self) -> dict[str, int]:
        """Resident bytes of every process of the server, by name and id."""
        first = psutil.Process(self.process.pid)
        processes = [first, *first.children(recursive=True)]
        return {f"{p.name()} {p.pid}": p.memory_info().rss for p in processes}

    def kill(self) -> None:
        """SIGKILL to every process of the server at once."""
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(timeout=60)


def environment(**more: str) -> dict[str, str]:
    """Of a server, on the V1 runner unless ``more`` says otherwise."""
    found = engine_job.environment(**{**V1, "VLLM_LOGGING_LEVEL": "INFO", **more})
    # Unless asked for, the server's engine is a process of its own; V1 is about the model runner.
    if "VLLM_ENABLE_V1_MULTIPROCESSING" not in more:
        found.pop("VLLM_ENABLE_V1_MULTIPROCESSING", None)
    return found


@contextmanager
def serve(
    model: str,
    arguments: Sequence[str],
    log: Path,
    *,
    spawned: bool = False,
    module: str = "cna_vllm",
    **env: str,
) -> Iterator[Server]:
    """`cna-vllm serve` in a process group of its own; its output goes to ``log``.

    spawned: started by a shell's means, and so are its own processes; else all are forks of one
    that has everything imported, which takes a fifth of the time. module: what is run.
    """
    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    argv = ["serve", model, "--host", "127.0.0.1", "--port", str(port)]
    argv += ["--api-key", KEY, "--dtype", "float32", *arguments]
    processes = Interpreters() if spawned else forks("TRITON_INTERPRET" in env)
    process = processes.start_module(module, argv, environment(**env), log)
    server = Server(process, f"http://127.0.0.1:{port}")
    try:
        _wait_until_up(server, log)
        yield server
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGTERM)
            try:
                process.wait(timeout=30)
            except subprocess.TimeoutExpired:
                server.kill()


def _wait_until_up(server: Server, log: Path) -> None:
    for _ in range(600):
        if server.process.poll() is not None:
            raise AssertionError(f"the server ended before it was up:\n{log.read_text()[-4000:]}")
        try:
            if httpx.get(f"{server.url}/health").status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.5)
    raise AssertionError(f"the server did not come up in five minutes:\n{log.read_text()[-4000:]}")
