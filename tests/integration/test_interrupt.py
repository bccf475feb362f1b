# SPDX-License-Identifier: Apache-2.0
"""Ctrl-C at ten moments of each command that has an engine: it ends within five seconds, says one
line last, and leaves no process."""

from __future__ import annotations

import functools
import json
import random
import re
import socket
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

from tests import tiny_models
from tests.engine_job import V1, environment
from tests.interrupting import EXIT, Ended, Interrupted, Moment, interrupt_all

pytestmark = [pytest.mark.engine, pytest.mark.slow]

SECONDS = 5.0  # that the issue of this test allows
SIDE_BY_SIDE = 4
WORKER = "vllm.v1.worker.cpu_worker:CPUWorker"
WRITTEN = "os:replace"  # into its place, atomically
LINE = "cna-vllm: interrupted"
AGAIN = r"; run the same command again to go on"
KEPT = rf"{LINE}: what is finished is kept in \S+{AGAIN}"
ROWS = rf"{LINE}: \d+ of \d+ rows are kept in \S+{AGAIN}"

# The signal is on its way while the command goes on: what it interrupts may be the next thing.
ADVICE = rf"(?:{KEPT}|{ROWS})"
ALL_DONE = rf"(?:{KEPT}|{ROWS}|{LINE})"
# In eval, all that is said from when the folder is claimed is how to go on.
CLAIMED = {"engine process", "configuration", "weights", "memory"}
START = {
    "imports": Moment(mapped="libtorch_cpu"),
    "engine process": Moment(child="--multiprocessing-fork"),
    "configuration": Moment("vllm.engine.arg_utils:EngineArgs.create_engine_config"),
    "weights": Moment(f"{WORKER}.load_model"),
    "memory": Moment(f"{WORKER}.determine_available_memory"),
}
MOMENTS = {
    "discover": START
    | {
        "device": Moment(f"{WORKER}.init_device"),
        "first step": Moment(f"{WORKER}.execute_model"),
        "third step": Moment(f"{WORKER}.execute_model", nth=3),
        "writing": Moment(WRITTEN),
        "exit": Moment(EXIT),
    },
    "generate": START
    | {
        "first step": Moment(f"{WORKER}.execute_model", line=ROWS),
        "later step": Moment(f"{WORKER}.execute_model", nth=30, line=ROWS),
        "row": Moment("cna_vllm.batch.partial:PartialFile.append", nth=5, line=ROWS),
        "writing": Moment(WRITTEN, line=rf"{LINE}(?:: rows are kept in \S+{AGAIN})?"),
        "exit": Moment(EXIT),
    },
    "ab": START
    | {
        "first step": Moment(f"{WORKER}.execute_model", line=ADVICE),
        "later step": Moment(f"{WORKER}.execute_model", nth=30, line=ADVICE),
        "scoring": Moment("cna_vllm.evaluation.ab:evaluate", line=ADVICE),
        "report": Moment("cna_vllm.evaluation.report:write_report", line=ALL_DONE),
        "exit": Moment(EXIT),
    },
    "eval": {
        name: replace(moment, line=ADVICE if name in CLAIMED else ALL_DONE)
        for name, moment in START.items()
    }
    | {
        "first step": Moment(f"{WORKER}.execute_model", line=ADVICE),
        "part": Moment("cna_vllm.evaluation.paper.run:evaluate", line=ADVICE),
        "row": Moment("cna_vllm.batch.partial:PartialFile.append", nth=2, line=ADVICE),
        "table": Moment("cna_vllm.evaluation.paper.run:table", line=ALL_DONE),
        "exit": Moment(EXIT),
    },
    "serve": START
    | {
        "application": Moment("uvicorn.config:Config.load"),
        "idle": Moment(up=True),
        "answering": Moment(up=True, streams=True),
        "stopping": Moment("vllm.v1.engine.async_llm:AsyncLLM.shutdown", up=True),
        "exit": Moment(EXIT, up=True),
    },
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("interrupt")
    tiny_models.add_tokenizer(tiny_models.llama(folder / "model"))
    channels = tiny_models.channels(tiny_models.LAYERS, tiny_models.WIDTH, 20, seed=1)
    (folder / "c.json").write_text(json.dumps(tiny_models.circuit_object(channels)))
    rng = random.Random(0)
    (folder / "data").mkdir()
    for name in ("harmful", "benign"):
        lines = [" ".join(f"w{rng.randrange(6, 512)}" for _ in range(12)) for _ in range(12)]
        text = "".join(f"{line}\n" for line in lines)
        (folder / f"{name}.txt").write_text(text)
        (folder / "data" / f"{name}-behaviors.csv").write_text(f"Goal\n{text}")
    return folder


def command(name: str, folder: Path, out: Path) -> list[str]:
    argv = [name, str(folder / "model"), "--dtype", "float32", "--max-model-len", "256"]
    argv += ["--max-num-seqs", "4", "--kv-cache-memory-bytes", str(2**25)]
    texts = [str(folder / f"{part}.txt") for part in ("harmful", "benign")]
    steered = ["--circuit", f"f={folder / 'c.json'}"]
    if name == "discover":
        sets = ["--positive", texts[0], "--negative", texts[1]]
        return [*argv, "--max-num-batched-tokens", "32", *sets, "--out", str(out / "found.json")]
    if name == "generate":
        steered += ["--multiplier", "0", "1", "--input", texts[0], "--max-tokens", "40"]
        return [*argv, *steered, "--output", str(out / "rows.jsonl")]
    if name == "ab":
        steered += ["--arm", "f@0", "--arm", "plain", "--prompts", texts[0]]
        steered += ["--metric", "length", "--max-tokens", "40"]
        return [*argv, *steered, "--out", str(out / "ab")]
    if name == "eval":
        parts = ["--jbb", str(folder), "--contrast", *texts, "--parts", "jbb", "--limit", "3"]
        return [*argv, *parts, "--max-tokens", "9", "--out", str(out / "eval")]
    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    return [*argv, *steered, "--host", "127.0.0.1", "--port", str(port)]


@pytest.fixture(scope="module")
def ended(folder: Path) -> functools._lru_cache_wrapper[dict[str, Ended]]:
    """How a command ended, by moment."""

    @functools.cache
    def run(name: str) -> dict[str, Ended]:
        found: dict[str, Ended] = {}
        env = environment(**V1, OMP_NUM_THREADS="1")
        left = list(MOMENTS[name].items())
        while left:
            some, left = left[:SIDE_BY_SIDE], left[SIDE_BY_SIDE:]
            commands = []
            for moment, when in some:
                out = folder / f"{name} {moment}".replace(" ", "-")
                argv = command(name, folder, out)
                whom = "main" if len(found) % 2 else "group"
                commands.append(Interrupted(argv, when, out, env, whom))
            ends = interrupt_all(commands, timeout=300)
            found |= {moment: end for (moment, _), end in zip(some, ends, strict=True)}
        return found

    return run


@pytest.mark.parametrize(
    ("name", "moment"), [(name, moment) for name in MOMENTS for moment in MOMENTS[name]]
)
def test_it_ends_in_time_with_one_line_and_no_process(
    ended: functools._lru_cache_wrapper[dict[str, Ended]], name: str, moment: str
) -> None:
    end = ended(name)[moment]
    assert end.status == 130, end.output[-4000:]
    assert end.seconds <= SECONDS
    assert end.left == []
    assert re.fullmatch(MOMENTS[name][moment].line, end.output.splitlines()[-1])
    assert "Traceback" not in end.output
