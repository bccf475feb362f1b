# SPDX-License-Identifier: Apache-2.0
"""Parts of the run on a GPU: each a process of its own, with a time limit and a way to say rows."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, NoReturn

import psutil

ROOT: Final = Path(__file__).parents[2]
END: Final = "end"
_ERROR: Final = re.compile(r"\b(?:\w+Error|\w+Exception|SystemExit): .*\S")

Row = Mapping[str, Any]


def emit(row: Row) -> None:
    """In a part: a row of its results, printed and kept at once."""
    print(json.dumps(row), flush=True)


def finish(wrong: Sequence[str] = ()) -> NoReturn:
    """In a part, at its end, with what is not as it must be, if anything. Ends the process on the
    spot: one that had an engine may hang where Python ends."""
    emit({END: list(wrong)})
    os._exit(bool(wrong))


def rehearsing() -> bool:
    """In a part: whether to take small sizes, on the CPU."""
    return "--rehearse" in sys.argv[1:]


@dataclass(frozen=True)
class Part:
    """A module that emits rows and finishes.

    expected, limit: seconds on an H100 with 16 cores, and after how many it is ended.
    rehearsal: what a rehearsal has in its environment.
    """

    name: str
    module: str
    expected: int
    limit: int
    arguments: tuple[str, ...] = ()
    rehearsal: Mapping[str, str] = field(default_factory=dict)


class Runs:
    """Runs parts, also several at a time, and can end those that run."""

    def __init__(self, folder: Path, rehearse: bool) -> None:
        """folder: for their temporary files, and a log each of what they and their engines print
        besides rows."""
        self._folder, self._rehearse = folder, rehearse
        self._running: set[int] = set()

    def run(self, part: Part, take: Callable[[Row], None]) -> list[str]:
        """Hands every row to ``take`` when it is said. Returns why the part failed, or nothing."""
        log = self._folder / f"{part.name}.log"
        command = [sys.executable, "-m", part.module, *part.arguments]
        environment = {
            "VLLM_LOGGING_LEVEL": "WARNING",
            "VLLM_LOGGING_STREAM": "ext://sys.stderr",  # stdout is for rows
            "VLLM_NO_USAGE_STATS": "1",
            "HF_HUB_OFFLINE": "1",  # all models are made here
            **os.environ,
            "TMPDIR": str(self._folder),
        }
        if self._rehearse:
            command.append("--rehearse")
            environment.update(part.rehearsal)
        with log.open("a", encoding="utf-8") as output:
            process = subprocess.Popen(
                command,
                cwd=ROOT,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=output,
                text=True,
                start_new_session=True,
            )
            self._running.add(process.pid)
            late = threading.Event()

            def expire() -> None:
                late.set()
                _end(process.pid)

            timer = threading.Timer(part.limit, expire)
            timer.start()
            try:
                wrong = self._rows(process, output, take)
            finally:
                timer.cancel()
                _end(process.pid)
                self._running.discard(process.pid)
        status = process.wait()
        if wrong is None:
            over = f"took over {part.limit} s"
            wrong = [over if late.is_set() else f"ended with status {status}"]
        return [*wrong, f"its log, {log}, ends: {_reason(log)}"] if wrong else []

    def stop(self) -> None:
        """Ends all parts that run."""
        for group in tuple(self._running):
            _end(group)

    @staticmethod
    def _rows(
        process: subprocess.Popen[str], output: Any, take: Callable[[Row], None]
    ) -> list[str] | None:
        """What the part says is wrong; None when it ended without a word."""
        assert process.stdout is not None
        for line in process.stdout:
            try:
                row = json.loads(line) if line.startswith("{") else None
            except json.JSONDecodeError:
                row = None
            if row is None:
                output.write(line)
                output.flush()
            elif END in row:
                wrong: list[str] = row[END]
                return wrong
            else:
                take(row)
        return None


def _reason(log: Path) -> str:
    """The last errors of a log, the first of them nearest to the cause; or else its last line."""
    text = log.read_text(encoding="utf-8", errors="replace")
    errors = list(dict.fromkeys(_ERROR.findall(text)))[-3:]
    return "; then ".join(errors) or (text.strip().splitlines() or ["(empty)"])[-1]


def _end(group: int) -> None:
    """Ends a part and whatever it started; returns when their memory is free again."""
    deadline = time.monotonic() + 20
    with suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)
    while any(_lives_in(p, group) for p in psutil.process_iter()) and time.monotonic() < deadline:
        time.sleep(0.05)


def _lives_in(process: psutil.Process, group: int) -> bool:
    try:
        return os.getpgid(process.pid) == group and process.status() != psutil.STATUS_ZOMBIE
    except (ProcessLookupError, psutil.NoSuchProcess):
        return False
