# SPDX-License-Identifier: Apache-2.0
"""Processes with vLLM already imported: forks of one that has, since the import takes longer than
most engines on tiny models live.

What the import reads from the environment is fixed for all forks: whether Triton is interpreted.
vLLM reads everything else when an engine starts, from the environment that each fork is given.
"""

from __future__ import annotations

import atexit
import functools
import gc
import importlib
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent

_IMPORTS = (
    "transformers",
    "vllm",
    "vllm.v1.engine.async_llm",
    "vllm.v1.engine.core",
    "vllm.v1.engine.llm_engine",
    "vllm.v1.executor.uniproc_executor",
    "vllm.v1.worker.cpu_worker",
    "vllm.model_executor.models.llama",
    "cna_vllm.discovery",
    "cna_vllm.serving.control",
    "cna_vllm.serving.seams.worker",
)


class ForksFailed(AssertionError):
    """The process that is forked ended by itself."""


@dataclass(frozen=True)
class Ended:
    """How a fork ended: exit status (minus a signal), and what it and its children printed."""

    status: int
    output: str


class Forks:
    """A process that imports once and then runs each call in a fork."""

    def __init__(self, interpreted: bool) -> None:
        """interpreted: whether Triton's interpreter stands in for a GPU's compiler."""
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.engine_forks"],
            cwd=ROOT,
            env={
                **os.environ,
                "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")]),
                "VLLM_LOGGING_LEVEL": "WARNING",
                **({"TRITON_INTERPRET": "1"} if interpreted else {}),
            },
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        atexit.register(self._end)

    def run(
        self, function: str, arguments: Sequence[Any], env: Mapping[str, str], timeout: int
    ) -> Ended:
        """Calls ``module:function`` with JSON ``arguments`` in a fork with the environment ``env``.

        Raises:
            TimeoutError: it ran longer than ``timeout`` seconds and was killed, with its children.
            ForksFailed: there is no process to fork any more.
        """
        with tempfile.NamedTemporaryFile("r", errors="replace") as log:
            job = {"function": function, "arguments": arguments, "env": dict(env), "log": log.name}
            assert self._process.stdin is not None
            self._process.stdin.write(json.dumps(job) + "\n")
            self._process.stdin.flush()
            child = self._reply(timeout)["pid"]
            try:
                return Ended(self._reply(timeout)["status"], log.read())
            except TimeoutError:
                os.killpg(child, signal.SIGKILL)
                self._reply(60)
                raise

    def _end(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(60)

    def _reply(self, timeout: int) -> dict[str, int]:
        assert self._process.stdout is not None
        ready, _, _ = select.select([self._process.stdout], [], [], timeout)
        if not ready:
            raise TimeoutError(f"no end after {timeout} s")
        line = self._process.stdout.readline()
        if not line:
            raise ForksFailed(f"ended with {self._process.wait(60)}; its stderr says why")
        reply: dict[str, int] = json.loads(line)
        return reply


@functools.cache
def forks(interpreted: bool) -> Forks:
    """This process's, started when first asked for."""
    return Forks(interpreted)


def _serve() -> None:
    requests, replies = os.fdopen(os.dup(0)), os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # vLLM logs to stdout
    if os.environ.get("TRITON_INTERPRET") == "1":
        from tests.engine_job import stand_in_driver

        stand_in_driver()
    for name in _IMPORTS:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()  # or every fork would collect, and so copy, all that was imported
    for line in requests:
        job = json.loads(line)
        child = os.fork()
        if child == 0:
            requests.close()
            replies.close()
            _run(job)
            return
        print(json.dumps({"pid": child}), file=replies, flush=True)
        _, status = os.waitpid(child, 0)
        reply = {"status": os.waitstatus_to_exitcode(status)}
        print(json.dumps(reply), file=replies, flush=True)


def _run(job: Mapping[str, Any]) -> None:
    os.setsid()  # one group with whatever processes it starts
    log = os.open(job["log"], os.O_WRONLY)
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.environ.clear()
    os.environ.update(job["env"])
    module, _, function = job["function"].partition(":")
    getattr(importlib.import_module(module), function)(*job["arguments"])


if __name__ == "__main__":
    _serve()
