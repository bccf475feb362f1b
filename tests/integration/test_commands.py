# SPDX-License-Identifier: Apache-2.0
"""Subcommands, started for real on a tiny model: whatever vLLM moves, one of them notices.

`ab`, `eval` and `doctor` have files of their own beside this one.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

import httpx
import pytest

from cna_vllm import Circuit
from tests import tiny_models
from tests.engine_forks import forks
from tests.engine_job import V1_HERE, environment
from tests.server import KEY, serve

pytestmark = pytest.mark.engine

ENGINE = ["--dtype=float32", "--max-model-len=128", "--max-num-seqs=8"]


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with a tokenizer and a chat template, prompts, and what commands leave."""
    folder = tmp_path_factory.mktemp("commands")
    tiny_models.add_tokenizer(tiny_models.llama(folder / "model"))
    # A base model, for the second half of the same weights' tokens as plain text.
    tiny_models.add_tokenizer(tiny_models.llama(folder / "base"), chat_template=None)
    draw = random.Random(0)
    for name in ("positive", "negative", "asked"):
        lines = [" ".join(f"w{draw.randrange(6, 500)}" for _ in range(4 + i)) for i in range(8)]
        (folder / f"{name}.txt").write_text("\n".join(lines))
    return folder


def run(work: Path, *argv: str, status: int = 0) -> str:
    """One command that starts in `work`; returns what it printed."""
    env = environment(**V1_HERE, VLLM_LOGGING_LEVEL="ERROR")
    ended = forks(interpreted=False).run_module("cna_vllm", argv, env, timeout=300, folder=work)
    assert ended.status == status, ended.output[-6000:]
    return ended.output


SETS = ["--positive=positive.txt", "--negative=negative.txt", "--universal=none"]


@pytest.fixture(scope="module")
def found(work: Path) -> Circuit:
    """What `discover` finds, which the other commands use."""
    asked = ["--top-k=12", "--holdout=0.25", "--control=r.json", "--out=c.json"]
    told = run(work, "discover", "model", *ENGINE, *SETS, *asked)
    assert "on 2 positive and 2 negative prompts that selection did not see" in told
    return Circuit.load(work / "c.json")


def test_a_circuit_file_says_what_was_done(work: Path, found: Circuit) -> None:
    assert (found.prompts["positive"], found.prompts["negative"]) == (6, 6)
    assert (found.method["holdout"]["positive"], found.method["chat_template"]) == (2, True)
    assert Circuit.load(work / "r.json").prompts == {}
    asked = ["--top-k=12", "--out=base.json"]
    run(work, "discover", "base", *ENGINE, *SETS, *asked)
    base = Circuit.load(work / "base.json")
    assert base.method["chat_template"] is False, "a model without a template"
    assert (base.prompts["positive"], base.prompts["negative"]) == (8, 8)


def test_reading_and_baking(work: Path, found: Circuit) -> None:
    assert "promotes" in run(work, "inspect", "c.json", "--model", "model", "--with", "base.json")
    assert "overlap" in run(work, "compare", "c.json", "base.json")
    baked = run(work, "bake", "model", "c.json", "--multiplier=0", "--out=baked")
    assert "12 neurons at m = 0" in baked


def test_generate_with_a_file_of_flags(work: Path, found: Circuit) -> None:
    settings = {"circuit": {"c+d": "c.json"}, "max_tokens": 3, "dtype": "float32"}
    (work / "run.yaml").write_text(json.dumps({**settings, "max-model-len": 128}))
    arms = ["--arm=plain", "--arm=off=c+d@0", "--input=asked.txt", "--output=o.jsonl"]
    run(work, "generate", "model", "--config", "run.yaml", *arms)
    rows = [json.loads(line) for line in (work / "o.jsonl").read_text().splitlines()]
    assert len(rows) == 16
    assert {(row["circuit"], row["multiplier"]) for row in rows} == {(None, None), ("c+d", 0.0)}


def test_demo(work: Path) -> None:
    """On a random model nothing is French, which is what it must say."""
    told = run(work, "demo", "model", "--max-model-len=128", status=1)
    assert "plain requests in the same batch unchanged" in told and "FAIL" in told


def test_serve_with_circuits_from_three_places(work: Path, found: Circuit) -> None:
    """Each is served, and the log says at start what was loaded."""
    config = work / "serve.yaml"
    config.write_text(json.dumps({"adapter": {"c-off": "c@0"}, "max-model-len": 128}))
    more = {"cna": {"circuits": {"d+e": str(work / "c.json")}, "adapters": {}}}
    arguments = ["--config", str(config), "--circuit", f"c={work / 'c.json'}"]
    arguments += ["--additional-config", json.dumps(more), "--served-model-name=m"]
    arguments += ["--adapter=both=c@0.5+d+e@0.5"]
    log = work / "log"
    with serve(str(work / "model"), arguments, log) as server:
        headers = {"Authorization": f"Bearer {KEY}"}
        body = {"prompt": "w7 w8", "max_tokens": 4, "temperature": 0}
        fields = {"cna_circuit": "d+e", "cna_multiplier": 0.0}
        texts = []
        for one in ({"model": "c-off"}, {"model": "m", "vllm_xargs": fields}, {"model": "both"}):
            reply = httpx.post(
                f"{server.url}/v1/completions", json={**body, **one}, headers=headers, timeout=60
            )
            assert reply.status_code == 200, reply.text
            texts.append(reply.json()["choices"][0]["text"])
        assert texts[0] == texts[1]
    written = log.read_text()
    assert f"cna-vllm: circuits d+e ({work / 'c.json'}), c ({work / 'c.json'})" in written
    assert "adapters c-off = c@0.0, both = c@0.5+d+e@0.5" in written
    assert "12 neurons are in more than one of its circuits (c, d+e)" in written
