# SPDX-License-Identifier: Apache-2.0
"""The process that watches a command, with commands that end in order, late, or not at all."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import psutil
import pytest

PRELUDE = """
import os, signal, subprocess, sys, time
from cna_vllm.cli.interrupt import going_on, watched

SLEEPER = "import time; print('asleep', flush=True); time.sleep(60)"

def child(code, **more):
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, **more)
    process.stdout.readline()
    return process

def ready(*_):
    print("ready", os.getpid(), flush=True)

"""
ORDERLY = """
def command():
    with going_on("advice"):
        ready()
        time.sleep(60)
"""
LATE = """
def command():
    with going_on("advice"):
        ready()
        # As in an import or another call that does not come back to the interpreter.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        time.sleep(60)
"""
DEAF = """
def command():
    code = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN);" + SLEEPER
    first = child(code)
    # Of no process that is known, in a session of its own.
    child(f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {code!r}], "
          "start_new_session=True)", start_new_session=True).wait()
    try:
        ready()
        first.wait()
    finally:
        first.wait()
"""
SPAWNED = """
def command():
    child("import signal; signal.signal(signal.SIGINT, lambda *_: print('heeded')); " + SLEEPER)
    ready()
    try:
        time.sleep(60)
    except KeyboardInterrupt:
        print("a bar", end="", file=sys.stderr)
        raise KeyboardInterrupt("message") from None
"""


def start(tmp_path: Path, command: str) -> subprocess.Popen[str]:
    script = tmp_path / "command.py"
    script.write_text(PRELUDE + textwrap.dedent(command) + "\nsys.exit(watched(command))\n")
    return subprocess.Popen(
        [sys.executable, str(script)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def processes(watcher: int) -> list[psutil.Process]:
    return [psutil.Process(watcher), *psutil.Process(watcher).children(recursive=True)]


@pytest.mark.parametrize("whom", ["group", "main"])
@pytest.mark.parametrize(
    ("command", "name", "said"),
    [
        (ORDERLY, "SIGINT", "interrupted: advice"),
        (ORDERLY, "SIGTERM", "ended by SIGTERM: advice"),
        (ORDERLY, "SIGHUP", "ended by SIGHUP: advice"),
        (LATE, "SIGINT", "interrupted"),
        (DEAF, "SIGINT", "interrupted"),
        (SPAWNED, "SIGINT", "interrupted: message"),
    ],
    ids=["INT", "TERM", "HUP", "late", "deaf", "spawned"],
)
def test_it_ends_in_time_and_leaves_nothing(
    tmp_path: Path, command: str, name: str, said: str, whom: str
) -> None:
    number = signal.Signals[name]
    process = start(tmp_path, command)
    assert process.stdout is not None and process.stdout.readline().startswith("ready")
    before = processes(process.pid)
    began = time.monotonic()
    (os.killpg if whom == "group" else os.kill)(process.pid, number)
    out, err = process.communicate(timeout=30)
    assert time.monotonic() - began <= 5
    assert process.returncode == 128 + number
    assert err.splitlines()[-1] == f"cna-vllm: {said}" and "Traceback" not in err
    assert "heeded" not in out
    assert [p for p in before if p.is_running()] == []


def test_a_second_one_ends_it_at_once(tmp_path: Path) -> None:
    process = start(tmp_path, DEAF)
    assert process.stdout is not None and process.stdout.readline().startswith("ready")
    before = processes(process.pid)
    began = time.monotonic()
    os.killpg(process.pid, signal.SIGINT)
    time.sleep(0.6)  # one Ctrl-C may come twice, but not so far apart
    os.killpg(process.pid, signal.SIGINT)
    process.communicate(timeout=30)
    assert time.monotonic() - began <= 2.4  # of the 2.5 that it would be given otherwise
    assert process.returncode == 130
    assert [p for p in before if p.is_running()] == []


def test_without_its_watcher_it_ends_too(tmp_path: Path) -> None:
    process = start(tmp_path, ORDERLY)
    assert process.stdout is not None and process.stdout.readline().startswith("ready")
    _, *before = processes(process.pid)
    process.kill()
    assert psutil.wait_procs(before, timeout=5)[1] == []


@pytest.mark.parametrize(
    ("command", "status", "said"),
    [
        ("command = lambda: 2", 2, ""),
        ("def command(): sys.exit(3)", 3, ""),
        ("def command(): os.kill(os.getpid(), signal.SIGKILL)", 137, "ended by SIGKILL"),
        ("def command(): raise RuntimeError('wrong')", 1, "RuntimeError: wrong"),
        ("def command(): return child(SLEEPER, start_new_session=True) and 0", 0, ""),
    ],
)
def test_how_it_ended_is_told(tmp_path: Path, command: str, status: int, said: str) -> None:
    process = start(tmp_path, command)
    _, err = process.communicate(timeout=30)
    assert process.returncode == status
    assert (err.splitlines() or [""])[-1].endswith(said) and bool(err) == bool(said)


def test_what_its_shell_had_started_is_left_alone(tmp_path: Path) -> None:
    start(tmp_path, "command = lambda: 0").communicate(timeout=30)
    script = f"sleep 60 & echo $!; exec {sys.executable} {tmp_path / 'command.py'} 2>&1"
    done = subprocess.Popen(["sh", "-c", script], stdout=subprocess.PIPE, text=True)
    assert done.stdout is not None
    other = psutil.Process(int(done.stdout.readline()))
    try:
        assert done.wait(timeout=30) == 0 and other.is_running()
    finally:
        other.kill()


def test_under_nohup_a_closed_terminal_is_no_end(tmp_path: Path) -> None:
    script = "def command():\n    ready()\n    time.sleep(1)\n    return 0"
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        process = start(tmp_path, script)
    finally:
        signal.signal(signal.SIGHUP, before)
    assert process.stdout is not None and process.stdout.readline().startswith("ready")
    os.killpg(process.pid, signal.SIGHUP)
    assert process.wait(timeout=30) == 0
