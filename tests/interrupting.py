# SPDX-License-Identifier: Apache-2.0
"""Ctrl-C at chosen moments of the command `cna-vllm`.

A moment is the n-th call of a function, in whichever process of the command makes it: that process
sends the signal from within. Those commands are forks of one that has everything imported. What
comes before, imports and the start of the engine's process, is seen from outside, in processes that
are spawned.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import importlib
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil

from tests.engine_forks import forks, run_module
from tests.processes import ROOT, SPAWN, Interpreters, Process

EXIT = "exit"
"""The moment when the interpreter exits."""
UP = "Application startup complete"
HOOK = "CNA_TEST_MOMENT"
"""Where a process that is spawned finds the moment."""


@dataclass(frozen=True)
class Moment:
    """When the signal comes.

    Attributes:
        calls: `module:function` or `module:Class.method`, in a fork.
        nth: of the calls.
        mapped, child: what a process of a spawned command has in memory, or on its command line.
        up: a server is; if `calls` are named too, they come after that signal and bring another.
        streams: that server is answering a request.
        line: of what is said last, a regular expression.
    """

    calls: str = ""
    nth: int = 1
    mapped: str = ""
    child: str = ""
    up: bool = False
    streams: bool = False
    line: str = "cna-vllm: interrupted"


@dataclass
class Ended:
    """What a command did after the signal.

    Attributes:
        seconds: from the signal until it had ended.
        left: command lines of its processes that had not.
    """

    status: int
    seconds: float
    left: list[str]
    output: str


class Interrupted:
    """A running command that gets SIGINT at a moment."""

    def __init__(
        self, argv: Sequence[str], moment: Moment, folder: Path, env: Mapping[str, str], whom: str
    ) -> None:
        """whom: "group", as a terminal does, or "main", as other programs do."""
        folder.mkdir()
        (folder / "log").touch()
        self._moment, self._whom = moment, whom
        self._log, self._signalled = folder / "log", folder / "signalled"
        self._argv = argv
        self._stream: Stream | None = None
        self._ended: tuple[int, float] | None = None
        hook = [moment.calls, moment.nth, whom, str(self._signalled)]
        self._process: Process
        if moment.mapped or moment.child:
            self._process = Interpreters().start_module("cna_vllm", argv, env, self._log)
        elif SPAWN:
            hooked = {**env, HOOK: json.dumps(hook)}
            self._process = Interpreters().start_module(
                "tests.interrupting", argv, hooked, self._log
            )
        else:
            self._process = forks(interpreted=False).start(
                "tests.interrupting:live", [list(argv), hook], env, self._log
            )

    def has_ended(self) -> bool:
        """To be called often: it also sends what is sent from outside."""
        if self._ended is None and (status := self._process.poll()) is not None:
            self._ended = status, time.monotonic()
        elif self._ended is None and not self._signalled.exists() and self._is_reached():
            _interrupt(self._process.pid, self._whom, self._signalled)
        return self._ended is not None

    def end(self) -> Ended:
        """What became of it; kills what is left."""
        status, at = self._ended or (0, float("inf"))
        came, left = self._signalled.exists(), []
        signalled = json.loads(self._signalled.read_text()) if came else {"processes": []}
        before = [tuple(process) for process in signalled["processes"]]
        for process in psutil.process_iter():
            try:
                if _session(process) != self._process.pid and _key(process) not in before:
                    continue
                # A zombie has ended; without memory, and so without a command line, no code runs
                # in a process any more and the kernel is about to make it one.
                if process.status() != psutil.STATUS_ZOMBIE and process.cmdline():
                    left.append(" ".join(process.cmdline()))
                    process.kill()
            except psutil.NoSuchProcess:
                continue
        output = self._log.read_text("utf-8", "replace")
        assert came, f"{self._moment} did not come (status {status}):\n{output[-4000:]}"
        return Ended(status, at - signalled["at"], left, output)

    def _is_reached(self) -> bool:
        moment = self._moment
        if moment.up:
            return UP in self._log.read_text("utf-8", "replace") and (
                not moment.streams or self._is_streaming()
            )
        if not (moment.mapped or moment.child):
            return False
        for process in _processes(self._process.pid):
            try:
                if moment.child and moment.child in process.cmdline():
                    return True
                if moment.mapped and moment.mapped in Path(f"/proc/{process.pid}/maps").read_text():
                    return True
            except (OSError, psutil.NoSuchProcess):
                continue
        return False

    def _is_streaming(self) -> bool:
        if self._stream is None:
            port = self._argv[self._argv.index("--port") + 1]
            self._stream = Stream(f"http://127.0.0.1:{port}/v1/completions", self._argv[1])
            self._stream.start()
        return self._stream.began.is_set()


class Stream(threading.Thread):
    """A request whose answer begins and may not come to its end."""

    def __init__(self, url: str, model: str) -> None:
        super().__init__(daemon=True)
        self.began = threading.Event()
        self._url = url
        self._body = {"model": model, "prompt": "w7 w8", "max_tokens": 240, "stream": True}

    def run(self) -> None:
        body = self._body | {"ignore_eos": True}
        with (
            contextlib.suppress(httpx.TransportError),
            httpx.stream("POST", self._url, json=body, timeout=60) as answer,
        ):
            for _ in answer.iter_lines():
                self.began.set()


def interrupt_all(commands: Sequence[Interrupted], timeout: float) -> list[Ended]:
    """Waits for all of them, side by side, for `timeout` seconds at most."""
    until = time.monotonic() + timeout
    while not all([command.has_ended() for command in commands]) and time.monotonic() < until:
        time.sleep(0.05)
    return [command.end() for command in commands]


def live(argv: Sequence[str], hook: Sequence[Any]) -> None:
    """What a fork does: it leads the group and the session of the command."""
    _hook(*hook, leads=True)
    run_module("cna_vllm", argv, str(ROOT))


def _hook(calls: str, nth: int, whom: str, signalled: str, leads: bool) -> None:
    """leads: this is the process that watches the command, whose own child is what exits."""
    interrupt = functools.partial(_interrupt, os.getpgrp(), whom, Path(signalled))
    if calls == EXIT:
        if leads:
            leader = os.getpid()
            atexit.register(lambda: interrupt() if os.getpid() != leader else None)
    elif calls:
        _call_first(calls, nth, interrupt)


def _call_first(calls: str, nth: int, action: Callable[[], None]) -> None:
    """Has the function call `action` at its n-th call in a process."""
    module, _, path = calls.partition(":")
    owner: Any = importlib.import_module(module)
    *parents, name = path.split(".")
    for parent in parents:
        owner = getattr(owner, parent)
    function, count = getattr(owner, name), 0

    @functools.wraps(function)
    def counting(*args: Any, **kwargs: Any) -> Any:
        nonlocal count
        count += 1
        if count == nth:
            action()
        return function(*args, **kwargs)

    setattr(owner, name, counting)


def _interrupt(leader: int, whom: str, signalled: Path) -> None:
    processes = [_key(process) for process in _processes(leader)]
    if not signalled.exists():
        record = {"at": time.monotonic(), "processes": processes}
        signalled.write_text(json.dumps(record))
    (os.killpg if whom == "group" else os.kill)(leader, signal.SIGINT)


def _processes(session: int) -> list[psutil.Process]:
    return [process for process in psutil.process_iter() if _session(process) == session]


def _session(process: psutil.Process) -> int:
    try:
        return os.getsid(process.pid)
    except ProcessLookupError:
        return -1


def _key(process: psutil.Process) -> tuple[int, float]:
    return process.pid, process.create_time()


if __name__ in ("__main__", "__mp_main__"):
    _hook(*json.loads(os.environ[HOOK]), leads=__name__ == "__main__")

if __name__ == "__main__":
    from cna_vllm.cli import main

    sys.exit(main())
