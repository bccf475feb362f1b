# SPDX-License-Identifier: Apache-2.0
"""Real servers under the same traffic: shared by what measures serving."""

from __future__ import annotations

import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil

OURS = ("-m", "cna_vllm", "serve")
STOCK = ("-m", "vllm.entrypoints.openai.api_server", "--model")


@dataclass(frozen=True)
class Server:
    """A running server; all its processes are one group."""

    process: subprocess.Popen[bytes]
    url: str

    def http(self) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=600)

    def memory(self) -> int:
        """Resident bytes of all its processes."""
        return sum(p.memory_info().rss for p in self._processes())

    def cpu_seconds(self) -> float:
        """What all its processes have used so far."""
        times = [p.cpu_times() for p in self._processes()]
        return sum(t.user + t.system for t in times)

    def _processes(self) -> list[psutil.Process]:
        first = psutil.Process(self.process.pid)
        return [first, *first.children(recursive=True)]


@contextmanager
def serve(
    program: Sequence[str], model: str, arguments: Sequence[str], log: Path
) -> Iterator[Server]:
    """``OURS`` or ``STOCK``, the latter without any plugin; what it prints goes to ``log``."""
    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    env = {**os.environ, "VLLM_LOGGING_LEVEL": "WARNING"}
    env.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    env.setdefault("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1")
    if program is STOCK:
        env["VLLM_PLUGINS"] = ""
    command = [sys.executable, *program, model, "--host=127.0.0.1", f"--port={port}", *arguments]
    with open(log, "ab") as output:
        process = subprocess.Popen(
            command, env=env, stdout=output, stderr=output, start_new_session=True
        )
    server = Server(process, f"http://127.0.0.1:{port}")
    try:
        while not _answers(server.url):
            if process.poll() is not None:
                raise RuntimeError(f"the server ended:\n{log.read_text()[-4000:]}")
            time.sleep(0.5)
        yield server
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGTERM)
            process.wait(timeout=60)


def _answers(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health").status_code == 200
    except httpx.TransportError:
        return False


@dataclass(frozen=True)
class Traffic:
    """The same requests for every server, but for the arms: ``clients`` threads, each sends
    ``requests`` one after the other and waits for the whole reply."""

    clients: int
    requests: int
    tokens: int
    seed: int = 0

    def run(
        self, server: Server, model: str, arms: Sequence[Mapping[str, Any]]
    ) -> dict[str, float]:
        """arms: bodies to be merged into requests, drawn at random.

        Returns tokens per second, the server's CPU time per token and latencies, in seconds; memory
        is the highest of all samples.
        """
        peak = _Peak(server)
        cpu = server.cpu_seconds()
        start = time.perf_counter()
        with ThreadPoolExecutor(self.clients) as pool:
            clients = [
                pool.submit(self._client, server, model, arms, n) for n in range(self.clients)
            ]
            latencies = sorted(second for client in clients for second in client.result())
        wall = time.perf_counter() - start
        tokens = len(latencies) * self.tokens
        return {
            "tokens_per_second": tokens / wall,
            "cpu_per_token": (server.cpu_seconds() - cpu) / tokens,
            "p50": latencies[len(latencies) // 2],
            "p99": latencies[min(len(latencies) - 1, len(latencies) * 99 // 100)],
            "peak_mib": peak.stop() / 2**20,
        }

    def _client(
        self, server: Server, model: str, arms: Sequence[Mapping[str, Any]], number: int
    ) -> list[float]:
        rng, dice = (random.Random(f"{self.seed} {number} {what}") for what in ("prompts", "arms"))
        latencies = []
        with server.http() as http:
            for _ in range(self.requests):
                prompt = [rng.randrange(100, 10_000) for _ in range(rng.randrange(8, 64))]
                body = {"model": model, "prompt": prompt, "max_tokens": self.tokens}
                body |= {"temperature": 0, "ignore_eos": True, **dice.choice(arms)}
                start = time.perf_counter()
                http.post("/v1/completions", json=body).raise_for_status()
                latencies.append(time.perf_counter() - start)
        return latencies


class Operator(threading.Thread):
    """Loads, replaces and unloads one circuit over HTTP without a pause, while it is entered.

    changes: how many of them were answered.
    """

    def __init__(self, server: Server, files: Sequence[str]) -> None:
        """files: paths in the server's circuit folder, each of other content."""
        super().__init__(daemon=True)
        self._server, self._files, self._done = server, files, threading.Event()
        self.changes = 0
        self._error: Exception | None = None

    def __enter__(self) -> Operator:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self.join()
        if self._error is not None:
            raise self._error

    def run(self) -> None:
        loads = [{"circuit_path": file, "load_inplace": True} for file in self._files]
        try:
            with self._server.http() as http:
                while not self._done.is_set():
                    for body in [*loads, None]:
                        route = f"/v1/{'unload' if body is None else 'load'}_cna_circuit"
                        reply = http.post(route, json={"circuit_name": "hot", **(body or {})})
                        reply.raise_for_status()
                        self.changes += 1
        except Exception as error:  # told where it was entered
            self._error = error


class _Peak(threading.Thread):
    """Highest memory seen, by looking twice a second."""

    def __init__(self, server: Server) -> None:
        super().__init__(daemon=True)
        self._server, self._done, self._peak = server, threading.Event(), server.memory()
        self.start()

    def run(self) -> None:
        while not self._done.wait(0.5):
            self._peak = max(self._peak, self._server.memory())

    def stop(self) -> int:
        self._done.set()
        self.join()
        return self._peak
