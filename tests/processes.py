# SPDX-License-Identifier: Apache-2.0
"""How tests start processes that import vLLM: as forks of one that has (`tests.engine_forks`), or,
with CNA_TEST_SPAWN=1, each in an interpreter of its own, as users do. tests/README.md says what
that costs and what it could hide.

This is also the program that such an interpreter runs where it is not a module of the product.
"""

from __future__ import annotations

import importlib
import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

ROOT = Path(__file__).resolve().parent.parent
SPAWN = os.environ.get("CNA_TEST_SPAWN") == "1"
"""Whether tests do without any trick: the one place that asks."""


def python_path() -> str:
    """This checkout, and before what is installed whatever the tests themselves were given: the
    second lane's vLLM."""
    given = os.environ.get("PYTHONPATH")
    return os.pathsep.join([str(ROOT), str(ROOT / "kernels"), *([given] if given else [])])


class Process(Protocol):
    """A running process; what `subprocess.Popen` calls so."""

    @property
    def pid(self) -> int: ...
    def poll(self) -> int | None: ...
    def wait(self, timeout: float) -> int:
        """Raises `subprocess.TimeoutExpired`."""


@dataclass(frozen=True)
class Ended:
    """How a process ended: exit status (minus a signal), and what it and its children printed."""

    status: int
    output: str


class Processes(ABC):
    """Starts processes, each the leader of a session of its own."""

    @abstractmethod
    def start(
        self, function: str, arguments: Sequence[Any], env: Mapping[str, str], log: Path
    ) -> Process:
        """Calls ``module:function`` with JSON ``arguments`` in the environment ``env``; all that it
        prints is added to ``log``."""

    @abstractmethod
    def start_module(
        self,
        name: str,
        arguments: Sequence[str],
        env: Mapping[str, str],
        log: Path,
        folder: Path | None = None,
    ) -> Process:
        """`python -m name` in ``folder``, by default the one of the tests."""

    def run(
        self, function: str, arguments: Sequence[Any], env: Mapping[str, str], timeout: int
    ) -> Ended:
        """``start``, and waits for its end.

        Raises:
            TimeoutError: it ran longer than ``timeout`` seconds and was killed, with its children.
        """
        with tempfile.NamedTemporaryFile("r", errors="replace") as log:
            return _end(self.start(function, arguments, env, Path(log.name)), log, timeout)

    def run_module(
        self,
        name: str,
        arguments: Sequence[str],
        env: Mapping[str, str],
        timeout: int,
        folder: Path | None = None,
    ) -> Ended:
        """``start_module``, and as ``run``."""
        with tempfile.NamedTemporaryFile("r", errors="replace") as log:
            process = self.start_module(name, arguments, env, Path(log.name), folder)
            return _end(process, log, timeout)


class Interpreters(Processes):
    """Every process a new interpreter, and so is each that vLLM starts in it."""

    def start(
        self, function: str, arguments: Sequence[Any], env: Mapping[str, str], log: Path
    ) -> Process:
        return _popen(["tests.processes", function, json.dumps(arguments)], env, log, None)

    def start_module(
        self,
        name: str,
        arguments: Sequence[str],
        env: Mapping[str, str],
        log: Path,
        folder: Path | None = None,
    ) -> Process:
        module = [name, *arguments]
        if "TRITON_INTERPRET" in env:  # no module of the product stands in for a driver
            module = ["tests.processes", "tests.processes:run_module", json.dumps(module)]
        return _popen(module, env, log, folder)


def run_module(name: str, *arguments: str) -> None:
    """As `python -m name` does, but this module stays the one that spawned processes import."""
    sys.argv = [name, *arguments]
    runpy.run_module(name, run_name="__main__")


def _popen(
    module: Sequence[str], env: Mapping[str, str], log: Path, folder: Path | None
) -> subprocess.Popen[bytes]:
    with open(log, "ab") as output:
        return subprocess.Popen(
            [sys.executable, "-m", *module],
            cwd=folder,
            env={**env, "VLLM_WORKER_MULTIPROC_METHOD": "spawn"},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )


def _end(process: Process, log: Any, timeout: int) -> Ended:
    try:
        return Ended(process.wait(timeout), log.read())
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait(60)
        raise TimeoutError(f"no end after {timeout} s\n{log.read()[-20000:]}") from None


if __name__ in ("__main__", "__mp_main__") and os.environ.get("TRITON_INTERPRET") == "1":
    from tests.engine_job import stand_in_driver

    stand_in_driver()  # before vLLM looks for one, in this process and in those it spawns

if __name__ == "__main__":
    module, _, called = sys.argv[1].partition(":")
    getattr(importlib.import_module(module), called)(*json.loads(sys.argv[2]))
