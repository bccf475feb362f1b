# SPDX-License-Identifier: Apache-2.0
"""`cna-vllm generate` with real engines: killed at random, its file is an uninterrupted run's.

The runs mix greedy rows, rows sampled with seeds, several samples, rows with settings of their
own, and arms in all scopes, on a tiny random model.
"""

from __future__ import annotations

import json
import random
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from tests import oracles, tiny_models
from tests.forked_cli import random_kills, run_lives
from tests.oracles import HookedModel, assert_token_exact

pytestmark = [pytest.mark.engine, pytest.mark.slow]

KILLS = 20
ARMS = {
    "plain": ("plain", None, "last"),
    "f@0": ("f@0", 0.0, "last"),
    "f@1": ("f@1", 1.0, "last"),
    "all": ("all=f@-1:all", -1.0, "all"),
}
EOS = 2
Rows = Sequence[dict[str, Any]]


def words(rng: random.Random, count: int) -> str:
    return " ".join(f"w{rng.randrange(6, tiny_models.VOCABULARY)}" for _ in range(count))


def prompt_rows() -> list[dict[str, Any]]:
    """60 prompts, 20 of each: greedy, sampled twice, and chats sampled with a seed of their own."""
    rng = random.Random(0)
    rows: list[dict[str, Any]] = []
    for i in range(20):
        text = words(rng, rng.randrange(3, 70))
        longest = rng.randrange(1, 9)
        rows.append({"prompt": text, "id": f"greedy{i}", "sampling": {"max_tokens": longest}})
        sampled = {"temperature": 0.8, "n": 2, "top_p": 0.9, "max_tokens": longest}
        rows.append({"prompt": text, "tags": ["sampled"], "sampling": sampled})
        chat = [{"role": "system", "content": "w9"}, {"role": "user", "content": text}]
        rows.append({"messages": chat, "sampling": {"temperature": 1, "seed": i}})
    return rows


def write_rows(path: Path, rows: Rows) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("generate")
    tiny_models.add_tokenizer(tiny_models.llama(folder / "model"))
    channels = tiny_models.channels(tiny_models.LAYERS, tiny_models.WIDTH, 20, seed=1)
    (folder / "c.json").write_text(json.dumps(tiny_models.circuit_object(channels)))
    write_rows(folder / "in.jsonl", prompt_rows())
    good = {"prompt": "w7 w8"}
    write_rows(folder / "bias.jsonl", [good, good | {"sampling": {"logit_bias": {"512": 1.0}}}])
    return folder


def command(folder: Path, output: str, *more: str, prompts: str = "in.jsonl") -> dict[str, Any]:
    argv = ["generate", str(folder / "model"), "--dtype", "float32"]
    argv += ["--max-num-seqs", "4", "--block-size", "32", "--distributed-executor-backend", "uni"]
    argv += ["--kv-cache-memory-bytes", str(2**25)]
    argv += ["--circuit", f"f={folder / 'c.json'}"]
    argv += [part for text, _, _ in ARMS.values() for part in ("--arm", text)]
    argv += ["--input", str(folder / prompts), "--output", str(folder / output)]
    return {
        "argv": [*argv, "--max-tokens", "6", *more],
        "rows_of": str(folder / f"{output}.partial"),
    }


@pytest.fixture(scope="module")
def lives(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """All runs of this module, by the name of their output."""
    interrupt = [{"signal": signal.SIGINT, "rows": 3}]
    jobs = {
        "whole.jsonl": command(folder, "whole.jsonl"),
        "killed.jsonl": command(folder, "killed.jsonl") | {"kills": random_kills(KILLS, 12, 7)},
        "interrupted.jsonl": command(folder, "interrupted.jsonl") | {"kills": interrupt},
        "refused.jsonl": command(folder, "refused.jsonl", prompts="bias.jsonl"),
    }
    return dict(zip(jobs, run_lives(list(jobs.values())), strict=True))


def read_rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def test_killed_at_random_it_ends_with_the_whole_file(
    folder: Path, lives: dict[str, list[dict[str, Any]]]
) -> None:
    *killed, last = lives["killed.jsonl"]
    assert [life["status"] for life in killed] == [-signal.SIGKILL] * KILLS
    assert last["status"] == 0, last["err"]
    went_on = [line for line in last["err"].splitlines() if line.startswith("going on: ")]
    assert len(went_on) == 1
    assert (folder / "killed.jsonl").read_bytes() == (folder / "whole.jsonl").read_bytes()
    assert not list(folder.glob("*.partial"))


def test_interrupted_it_says_how_to_go_on(
    folder: Path, lives: dict[str, list[dict[str, Any]]]
) -> None:
    interrupted, last = lives["interrupted.jsonl"]
    assert interrupted["status"] == 130
    line = interrupted["err"].splitlines()[-1]
    assert line.startswith("cna-vllm: interrupted: ")
    assert "run the same command again to go on" in line and "Traceback" not in line
    assert last["status"] == 0, last["err"]
    assert (folder / "interrupted.jsonl").read_bytes() == (folder / "whole.jsonl").read_bytes()


def test_the_whole_file(folder: Path, lives: dict[str, list[dict[str, Any]]]) -> None:
    (whole,) = lives["whole.jsonl"]
    assert whole["status"] == 0, whole["err"]
    assert "320/320" in whole["err"] and "tokens/s" in whole["err"]
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    prompts, rows = prompt_rows(), read_rows(folder / "whole.jsonl")
    planned = [
        (index, arm, sample)
        for index, prompt in enumerate(prompts)
        for sample in ((0, 1) if prompt["sampling"].get("n") else (None,))
        for arm in ARMS
    ]
    assert [(row["index"], row["arm"], row.get("sample")) for row in rows] == planned
    for row in rows:
        prompt = prompts[row["index"]]
        for key in ("prompt", "messages", "id", "tags"):
            assert row.get(key) == prompt.get(key)
        name, multiplier, scope = ARMS[row["arm"]]
        steering = (row["circuit"], row["multiplier"], row["scope"])
        assert steering == ((None, None, None) if name == "plain" else ("f", multiplier, scope))
        longest = prompt["sampling"].get("max_tokens", 6)
        if row["finish_reason"] == "stop":
            assert row["token_ids"][-1] == EOS and len(row["token_ids"]) <= longest
        else:
            assert row["finish_reason"] == "length" and len(row["token_ids"]) == longest
        kept = [token for token in row["token_ids"] if token != EOS]
        assert row["text"].strip() == tokenizer.decode(kept).strip()
        assert ("seed" in row) == ("temperature" in prompt["sampling"])
    # The same seeds in every arm: a multiplier of 1 draws what the plain model draws.
    answers: dict[str, list[Any]] = {arm: [] for arm in ARMS}
    for row in rows:
        answers[row["arm"]].append((row.get("seed"), row["token_ids"]))
    assert answers["f@1"] == answers["plain"] != answers["f@0"]
    sampled = [row["token_ids"] for row in rows if row.get("sample") is not None]
    assert sampled[:4] != sampled[4:8]


def test_greedy_rows_equal_the_oracle(folder: Path, lives: dict[str, list[dict[str, Any]]]) -> None:
    assert lives["whole.jsonl"][-1]["status"] == 0
    oracle = HookedModel(folder / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    channels = tiny_models.channels(tiny_models.LAYERS, tiny_models.WIDTH, 20, seed=1)
    verdicts = []
    for row in read_rows(folder / "whole.jsonl"):
        if "seed" in row:
            continue
        ids = tokenizer.encode(f"user {row['prompt']} assistant")
        _, multiplier, scope = ARMS[row["arm"]]
        steered = multiplier is not None
        arm = oracles.Arm(((channels, multiplier),) if steered else (), scope)
        verdicts.append(oracle.check(ids, row["token_ids"], arm))
    assert len(verdicts) == 80
    assert_token_exact(verdicts, "generate, greedy rows")


def test_what_only_the_engine_knows_is_told_before_anything_is_generated(
    folder: Path, lives: dict[str, list[dict[str, Any]]]
) -> None:
    (life,) = lives["refused.jsonl"]
    assert life["status"] == 2
    line = life["err"].splitlines()[-1]
    assert line.startswith("cna-vllm: error: ")
    assert "bias.jsonl:2: sampling: token_id(s) [512] in logit_bias" in line
    assert "Traceback" not in life["err"] and "tokens/s" not in life["err"]
    assert not list(folder.glob("refused.jsonl*"))
