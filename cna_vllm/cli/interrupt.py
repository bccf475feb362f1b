# SPDX-License-Identifier: Apache-2.0
"""Ctrl-C: the command runs in a child process, and this one ends it and all it started, in time.

Left to itself, vLLM waits for an engine that starts until it has started, sets signal handlers of
its own, and imports and compiled code keep Python from heeding a signal at all. The process that
watches does nothing else: it imports nothing, waits for signals, and adopts whatever a process
below it leaves behind.

- A terminal sends SIGINT and SIGHUP to all processes at once. The command and everything it starts
  have them blocked, so that none ends before, or prints, or tells the command that it failed.
- The first signal reaches the command as SIGTERM, and raises KeyboardInterrupt there or what vLLM's
  server does instead. What is left after the grace, or at a second signal, is killed.
- The line for the user comes last, when no process is left that could print another one.
"""

from __future__ import annotations

import atexit
import ctypes
import math
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from typing import NoReturn

GRACE = 2.5  # seconds for an orderly end
_LINGER = 0.5  # seconds for multiprocessing's resource trackers, which free shared memory
_KILLED = 1.0  # seconds for killed processes to be gone
_NEWBORN = 2.0  # seconds in which a process that Python starts does nothing yet that is missed
_REPEAT = 0.5  # seconds in which one Ctrl-C can arrive twice: from the terminal and forwarded
_LONGEST = 4096  # bytes of a message: a pipe takes them at once

_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36
_TERMINAL = (signal.SIGINT, signal.SIGHUP)
_ADVICE = ContextVar("_ADVICE", default="")


@contextmanager
def going_on(advice: str) -> Iterator[None]:
    """Within, a KeyboardInterrupt that says nothing says `advice`; a command that does not end in
    time and is killed has said it too."""
    before = _ADVICE.set(advice)
    try:
        yield
    except KeyboardInterrupt as interrupt:
        raise KeyboardInterrupt(str(interrupt) or advice) from None
    finally:
        _ADVICE.reset(before)


def watched(command: Callable[[], int], *, grace: float = GRACE) -> int:
    """Runs `command` in a child process; returns the exit status, in both processes.

    A KeyboardInterrupt's message goes into the line that is printed after a signal; the status is
    then 128 + the signal.

    grace: seconds from a signal until all is killed.
    """
    signals = {signal.SIGINT, signal.SIGTERM, signal.SIGCHLD}
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # it is under nohup
        signals.add(signal.SIGHUP)
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)
    others = _children_before()
    message, sender = os.pipe()
    watcher, child = os.getpid(), os.fork()
    if child == 0:
        os.close(message)
        mask = (mask | set(_TERMINAL)) - {signal.SIGTERM, signal.SIGCHLD}
        return _run(command, sender, mask, watcher)
    os.close(sender)
    status, first = _watch(child, signals, grace)
    _end_descendants(others)
    if first is not None:
        _say(first, _last(message))
        return 128 + first
    assert status is not None
    if os.WIFSIGNALED(status):
        name = signal.Signals(os.WTERMSIG(status)).name
        print(f"cna-vllm: error: ended by {name}", file=sys.stderr)
        return 128 + os.WTERMSIG(status)
    return os.waitstatus_to_exitcode(status)


def _run(command: Callable[[], int], sender: int, mask: set[int], watcher: int) -> int:
    """The command's process, up to what the interpreter does at its exit."""
    import logging
    import threading
    from multiprocessing import resource_tracker

    # Python 3.11 unblocks SIGINT when it starts this one: so it is started before the mask is set.
    # It need not tell that those who were killed have not freed what it frees.
    sys.warnoptions.append("ignore::UserWarning:multiprocessing.resource_tracker")
    resource_tracker.ensure_running()
    sys.warnoptions.pop()
    own, stopped = os.getpid(), False

    def stop(*_: object) -> None:
        nonlocal stopped
        if os.getpid() != own:  # forked, and without a handler of its own yet
            os._exit(128 + signal.SIGTERM)
        stopped = True
        signal.signal(signal.SIGTERM, _heed_not)
        # What fails from here on does so because of the signal.
        logging.disable()
        sys.unraisablehook = _heed_not
        threading.excepthook = _heed_not
        _tell(sender, _ADVICE.get())
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, stop)
    _prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != watcher:  # it ended before it could be told to us
        return 128 + signal.SIGTERM
    status = None
    try:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        status = command()
        signal.signal(signal.SIGTERM, _heed_not)
    except KeyboardInterrupt as interrupt:
        _tell(sender, str(interrupt))
    except Exception:
        if not stopped:
            raise
    if status is None:
        _leave()
    return status


def _leave() -> NoReturn:
    """Engines, temporary folders and the like are ended as the interpreter ends them. The rest of
    its way out takes seconds with all that vLLM imports, and frees only what the system frees."""
    with suppress(OSError):  # no one reads it any more
        sys.stdout.flush()
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())
    atexit._run_exitfuncs()
    os._exit(128 + signal.SIGTERM)


def _tell(sender: int, message: str) -> None:
    if message:
        os.write(sender, message.encode()[:_LONGEST] + b"\0")


def _last(messages: int) -> str:
    """What was told last."""
    os.set_blocking(messages, False)
    told = b""
    with suppress(BlockingIOError):  # a process that could not be ended holds the other end
        while part := os.read(messages, _LONGEST):
            told += part
    return told.rstrip(b"\0").rpartition(b"\0")[2].decode("utf-8", "replace")


def _heed_not(*_: object) -> None:
    """A handler: unlike SIG_IGN it is not passed on to other programs."""


def _watch(child: int, signals: set[signal.Signals], grace: float) -> tuple[int | None, int | None]:
    """Returns how the command ended, None if it has not in time, and the first signal, if any."""
    first, began = None, 0.0
    while True:
        left = began + grace - time.monotonic() if first is not None else 2.0**20
        got = signal.sigtimedwait(signals, max(left, 0.0))
        if got is None and first is not None:
            return None, first
        if got is None:
            continue
        if got.si_signo == signal.SIGCHLD:
            for pid, status in _reaped():
                if pid == child:
                    return status, first
        elif first is None:
            first, began = got.si_signo, time.monotonic()
            os.kill(child, signal.SIGTERM)
            _kill_newborn(child)
        elif time.monotonic() - began > _REPEAT:
            return None, first


def _kill_newborn(child: int) -> None:
    """A process that was being started is not told any more what to do, and would print that in
    its own way. Twice: one may have begun while the first look was taken."""
    for pause in (0.02, 0.0):
        for pid in _descendants(set()) - {child}:
            if b"--multiprocessing-fork" in _read(f"/proc/{pid}/cmdline") and _age(pid) < _NEWBORN:
                with suppress(ProcessLookupError, PermissionError):
                    os.kill(pid, signal.SIGKILL)
        time.sleep(pause)


def _age(pid: int) -> float:
    """Seconds since a process was started; infinite for one that has ended."""
    if not (stat := _stat(pid)):
        return math.inf
    ticks = int(stat[19])
    return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")


def _children_before() -> set[int]:
    """Those of a shell that was replaced by this command; they are none of the command's."""
    try:
        os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return set()
    return _descendants(set())


def _end_descendants(others: set[int]) -> None:
    """Kills what is left; trackers of shared memory end by themselves when no one uses it."""
    began, empty = time.monotonic(), 0
    while (passed := time.monotonic() - began) < _LINGER + _KILLED:
        try:
            for _ in _reaped():
                pass
        except ChildProcessError:  # none is left: orphans would be children of this process
            return
        left = _descendants(others)
        for pid in left:
            if passed > _LINGER or not _is_tracker(pid):
                try:
                    os.kill(pid, signal.SIGKILL)
                except (ProcessLookupError, PermissionError):
                    continue
        # A look at /proc misses what begins meanwhile, so that one without a process is not enough.
        empty = 0 if left else empty + 1
        if empty == 3:
            return
        time.sleep(0.02)


def _reaped() -> Iterator[tuple[int, int]]:
    """Children that have ended, and how. Raises ChildProcessError if there is none at all."""
    while (ended := os.waitpid(-1, os.WNOHANG))[0]:
        yield ended


def _descendants(others: set[int]) -> set[int]:
    """All but `others` and what is below those."""
    stats = {int(name): _stat(int(name)) for name in os.listdir("/proc") if name.isdecimal()}
    parents = {pid: int(stat[1]) for pid, stat in stats.items() if stat}
    found, wave = set[int](), {os.getpid()}
    while wave := {pid for pid, parent in parents.items() if parent in wave} - found - others:
        found |= wave
    return found


def _is_tracker(pid: int) -> bool:
    return b"multiprocessing.resource_tracker" in _read(f"/proc/{pid}/cmdline")


def _stat(pid: int) -> list[bytes]:
    """State, parent and so on; empty for one that has ended."""
    # PID (NAME) STATE PARENT ...; the name may hold anything.
    return _read(f"/proc/{pid}/stat").rpartition(b")")[2].split()


def _read(path: str) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read()
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return b""


def _say(first: int, message: str) -> None:
    """The last line. Processes may have left an open one: a progress bar, or nanobind's leaks."""
    what = "interrupted" if first == signal.SIGINT else f"ended by {signal.Signals(first).name}"
    line = f"cna-vllm: {what}: {message}" if message else f"cna-vllm: {what}"
    with suppress(OSError):  # the terminal is closed
        start = "\r\x1b[K" if sys.stderr.isatty() else "\n"
        print(start + line, file=sys.stderr, flush=True)


def _prctl(option: int, value: int) -> None:
    if ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl")
