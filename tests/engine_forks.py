# SPDX-License-Identifier: Apache-2.0
"""Processes with vLLM already imported: forks of one that has, since the import takes longer than
most engines on tiny models live.

What the import reads from the environment is fixed for all forks: whether Triton is interpreted.
Everything else is read when an engine starts, from the environment that each fork is given; what
PyTorch and vLLM's logger read when imported is set from it again. tests/README.md says what forks
save and could hide.
"""

from __future__ import annotations

import atexit
import functools
import gc
import importlib
import json
import logging
import os
import runpy
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.processes import ROOT, SPAWN, Interpreters, Processes, python_path

_IMPORTS = (
    "transformers",
    "vllm",
    "vllm.entrypoints.openai.api_server",
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


@dataclass
class Fork:
    """A running fork."""

    pid: int
    ask: Callable[[Mapping[str, Any]], Any]
    status: int | None = None

    def poll(self) -> int | None:
        if self.status is None:
            self.status = self.ask({"status": self.pid})
        return self.status

    def wait(self, timeout: float) -> int:
        end = time.monotonic() + timeout
        while (status := self.poll()) is None:
            if time.monotonic() > end:
                raise subprocess.TimeoutExpired(f"fork {self.pid}", timeout)
            time.sleep(0.01)
        return status


class Forks(Processes):
    """A process that imports once and then runs each call in a fork."""

    def __init__(self, interpreted: bool) -> None:
        """interpreted: whether Triton's interpreter stands in for a GPU's compiler."""
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.engine_forks"],
            cwd=ROOT,
            env={
                **os.environ,
                "PYTHONPATH": python_path(),
                "VLLM_LOGGING_LEVEL": "WARNING",
                "OMP_NUM_THREADS": "1",  # a fork has none of the threads that OpenMP started
                **({"TRITON_INTERPRET": "1"} if interpreted else {}),
            },
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        atexit.register(self._end)

    def start(
        self, function: str, arguments: Sequence[Any], env: Mapping[str, str], log: Path
    ) -> Fork:
        """Raises ForksFailed: there is no process to fork any more."""
        job = {"function": function, "arguments": arguments, "env": dict(env), "log": str(log)}
        return Fork(self._ask({"start": job}), self._ask)

    def start_module(
        self,
        name: str,
        arguments: Sequence[str],
        env: Mapping[str, str],
        log: Path,
        folder: Path | None = None,
    ) -> Fork:
        call = [name, arguments, str(folder or ROOT)]
        return self.start("tests.engine_forks:run_module", call, env, log)

    def _end(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(60)

    def _ask(self, request: Mapping[str, Any]) -> Any:
        assert self._process.stdin is not None and self._process.stdout is not None
        print(json.dumps(request), file=self._process.stdin, flush=True)
        reply = self._process.stdout.readline()
        if not reply:
            raise ForksFailed(f"ended with {self._process.wait(60)}; its stderr says why")
        return json.loads(reply)


@functools.cache
def forks(interpreted: bool) -> Processes:
    """This process's, started when first asked for; or what does without them."""
    return Interpreters() if SPAWN else Forks(interpreted)


def _serve() -> None:
    requests, replies = os.fdopen(os.dup(0)), os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # vLLM logs to stdout
    if os.environ.get("TRITON_INTERPRET") == "1":
        from tests.engine_job import stand_in_driver

        stand_in_driver()
    for name in _IMPORTS:
        importlib.import_module(name)
    _need_no_imports()
    gc.collect()
    gc.freeze()  # or every fork would collect, and so copy, all that was imported
    for line in requests:
        request = json.loads(line)
        if "start" in request:
            reply = os.fork()
            if reply == 0:
                requests.close()
                replies.close()
                _run(request["start"])
                return
        else:
            pid, status = os.waitpid(request["status"], os.WNOHANG)
            reply = os.waitstatus_to_exitcode(status) if pid else None
        print(json.dumps(reply), file=replies, flush=True)


def _need_no_imports() -> None:
    """What vLLM would do in processes that import everything once more, is done in forks (API
    servers, engine cores, workers) or on the spot (a look at a model's class)."""
    from multiprocessing import context, popen_fork

    from vllm.entrypoints.launchers import launcher
    from vllm.model_executor.models import registry

    context.SpawnProcess._Popen = staticmethod(popen_fork.Popen)
    registry._run_in_subprocess = lambda look: look()
    # A fork has the server's socket too, so a server that stops would find it in a process that
    # ends at that moment.
    launcher.find_process_using_port = lambda port: None


def _run(job: Mapping[str, Any]) -> None:
    import torch

    os.setsid()  # one group with whatever processes it starts
    log = os.open(job["log"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.environ.clear()
    os.environ.update(job["env"])
    torch._dynamo.config.disable = os.environ.get("TORCH_COMPILE_DISABLE") == "1"
    logger = logging.getLogger("vllm")
    for at in (logger, *logger.handlers):
        at.setLevel(os.environ.get("VLLM_LOGGING_LEVEL", "INFO"))
    module, _, function = job["function"].partition(":")
    getattr(importlib.import_module(module), function)(*job["arguments"])


def run_module(name: str, arguments: Sequence[str], folder: str) -> None:
    """As `python -m name` does in ``folder``, but for what takes a process long that has all
    imported and that, as the one that watches the command `cna-vllm`, would have nothing
    imported."""
    os.chdir(folder)
    sys.argv = [name, *arguments]
    leader = os.getpid()
    try:
        runpy.run_module(name, run_name="__main__", alter_sys=True)
    except SystemExit as end:
        if os.getpid() == leader and isinstance(end.code, int):
            os._exit(end.code)
        raise


if __name__ == "__main__":
    _serve()
