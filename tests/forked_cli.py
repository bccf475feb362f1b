# SPDX-License-Identifier: Apache-2.0
"""The command `cna-vllm`, run again and again and killed, in forks of a process that has an engine.

Each life is a whole run of the command. What is done once, before the fork, is what would take
most of a short run's time: the imports and, unless a life shall start its own, the engine's start.
With CNA_TEST_SPAWN=1 nothing is: each life is a `python -m cna_vllm` with an engine of its own.
"""

from __future__ import annotations

import contextlib
import gc
import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import psutil

from tests.engine_forks import forks
from tests.engine_job import V1_HERE, environment
from tests.processes import SPAWN

START = 10.0 if SPAWN else 2.0
"""Seconds that a command takes about until its engine works."""


def run_lives(
    jobs: Sequence[Mapping[str, Any]], timeout: int = 300, **env: str
) -> list[list[dict[str, Any]]]:
    """Runs each job to its end; returns its lives: exit status (minus a signal), stdout and stderr.

    A job has `argv`, and optionally

    kills: each ends one life, after which the next one goes on: {"signal": 9, "rows": n} once n
        more rows are in the file `rows_of`, or {"signal": 9, "seconds": s} so long after the start
        of a life with an engine of its own. All others that are forks have the first job's
        engine, whose only life is none.
    unfinished: whether there is no life after the last kill.
    keep: (folder, copy) made before it starts.
    """
    env = environment(**{"VLLM_LOGGING_LEVEL": "ERROR", "OMP_NUM_THREADS": "1", **V1_HERE, **env})
    if SPAWN:
        return [_lives(job, partial(_interpreter, env, timeout)) for job in jobs]
    with tempfile.TemporaryDirectory() as folder:
        job, result = Path(folder) / "job.json", Path(folder) / "result.json"
        job.write_text(json.dumps([dict(j) for j in jobs]))
        ended = forks(interpreted=False).run(
            "tests.forked_cli:live", [str(job), str(result)], env, timeout
        )
        assert ended.status == 0, ended.output[-5000:]
        lives: list[list[dict[str, Any]]] = json.loads(result.read_text())
        return lives


def _lives(
    job: Mapping[str, Any],
    life: Callable[[Mapping[str, Any], Mapping[str, Any] | None], dict[str, Any]],
) -> list[dict[str, Any]]:
    if "keep" in job:
        shutil.copytree(*job["keep"])
    ends = [*job.get("kills", []), *([] if job.get("unfinished") else [None])]
    return [life(job, end) for end in ends]


def _interpreter(
    env: Mapping[str, str], timeout: int, job: Mapping[str, Any], kill: Mapping[str, Any] | None
) -> dict[str, Any]:
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        command = [sys.executable, "-m", "cna_vllm", *job["argv"]]
        streams: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": out, "stderr": err}
        process = subprocess.Popen(command, env=dict(env), start_new_session=True, **streams)
        if kill is not None:
            _wait_for(kill, Path(job["rows_of"]), process.pid)
            others = psutil.Process(process.pid).children(recursive=True)
            os.killpg(process.pid, kill["signal"])
            psutil.wait_procs(others, timeout)
        return {"status": process.wait(timeout), "out": _text(out), "err": _text(err)}


def _fork(engine: Any, job: Mapping[str, Any], kill: Mapping[str, Any] | None) -> dict[str, Any]:
    from tqdm import tqdm

    from cna_vllm.cli import engine_args

    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        child = os.fork()
        if child == 0:
            os.dup2(out.fileno(), 1)
            os.dup2(err.fileno(), 2)
            # Else one semaphore for all lives, which one that is killed while it draws keeps.
            tqdm.set_lock(threading.RLock())
            if "seconds" not in (kill or {}):
                engine_args.launch = lambda args: engine
            _command(job["argv"], watched=(kill or {}).get("signal") == signal.SIGINT)
        if kill is not None:
            _wait_for(kill, Path(job["rows_of"]), child)
            os.kill(child, kill["signal"])
        _, status = os.waitpid(child, 0)
        return {"status": os.waitstatus_to_exitcode(status), "out": _text(out), "err": _text(err)}


def _text(file: Any) -> str:
    file.seek(0)
    text: str = file.read().decode("utf-8", "replace")
    return text


def _first_life(job: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Runs a job in this process; returns its engine, and how it ended."""
    from cna_vllm.cli import engine_args, main

    launch, started = engine_args.launch, []

    def keep(args: Any) -> Any:
        started.append(launch(args))
        return started[0]

    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        engine_args.launch = keep
        status = main(list(job["argv"]))
        engine_args.launch = launch
    return started[0], {"status": status, "out": out.getvalue(), "err": err.getvalue()}


def _command(argv: Sequence[str], watched: bool) -> None:
    """watched: in a process of its own as by the command line, which alone makes of a signal an
    orderly end wherever it comes: vLLM turns a KeyboardInterrupt into another error here and there.
    """
    from cna_vllm.cli import main

    status = 70
    sys.argv = ["cna-vllm", *argv]
    try:
        status = main(None if watched else list(argv))
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _wait_for(kill: Mapping[str, Any], rows: Path, child: int) -> None:
    if "seconds" in kill:
        time.sleep(kill["seconds"])
        return
    wanted = _lines(rows) + kill["rows"]
    # A child that ended by itself stays a zombie until it is waited for: it can be looked at.
    while _lines(rows) < wanted and os.waitid(os.P_PID, child, _LOOK) is None:
        time.sleep(0.0005)


_LOOK = os.WEXITED | os.WNOHANG | os.WNOWAIT


def _lines(path: Path) -> int:
    """Rows and the header: a header that is not yet there counts, since the next life writes it."""
    try:
        return max(path.read_bytes().count(b"\n"), 1)
    except FileNotFoundError:
        return 1


def random_kills(count: int, most_rows: int, seed: int) -> list[dict[str, Any]]:
    """Kills after 1 to `most_rows` rows, and a tenth of them at any moment of an engine's start."""
    rng = random.Random(seed)
    return [
        {"signal": signal.SIGKILL, "seconds": rng.uniform(0.0, START)}
        if i % 10 == 4
        else {"signal": signal.SIGKILL, "rows": rng.randint(1, most_rows)}
        for i in range(count)
    ]


def live(job_path: str, result_path: str) -> None:
    """What `run_lives` has a fork do."""
    first, *others = json.loads(Path(job_path).read_text())
    engine, life = _first_life(first)
    gc.collect()
    gc.freeze()  # or every life would collect all that was imported
    lives = [[life], *(_lives(job, partial(_fork, engine)) for job in others)]
    Path(result_path).write_text(json.dumps(lives))
