# SPDX-License-Identifier: Apache-2.0
"""`cna-vllm ab` and `discover --vectors` end to end on a real engine: one start, several runs."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from cna_vllm import Circuit
from cna_vllm.steering.vectors import VectorSet
from tests import tiny_models
from tests.forked_cli import run_lives
from tests.oracles import Arm, HookedModel, assert_token_exact
from tests.vector_files import random_vectors, save_vectors

pytestmark = [pytest.mark.engine, pytest.mark.slow]

MODEL_LENGTH = 64
VECTORS = random_vectors("mlp", range(tiny_models.LAYERS), 1, 0.5)
CONFIG = """
circuits: {f: c.json}
vectors: {v: v.safetensors}
arms: ["off=f@0:all", "caa=v@-1:all"]
multipliers: [1, 2]
scopes: [last, all]
prompts: ["short.txt:harmful", {file: long.txt, tag: benign}]
metrics: [perplexity, "perplexity:scale=nll", length, refusal]
effects: {length: 1}
sampling: {temperature: 0.8, max_tokens: 6, ignore_eos: true}
samples: 2
"""


def words(rng: random.Random, count: int) -> str:
    return " ".join(f"w{rng.randrange(6, tiny_models.VOCABULARY)}" for _ in range(count))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ab")
    tiny_models.add_tokenizer(tiny_models.llama(folder / "model"))
    channels = tiny_models.channels(tiny_models.LAYERS, tiny_models.WIDTH, 20, seed=1)
    (folder / "c.json").write_text(json.dumps(tiny_models.circuit_object(channels)))
    save_vectors(folder, {"v": VECTORS})
    rng = random.Random(0)
    (folder / "short.txt").write_text("".join(words(rng, 5 + i) + "\n" for i in range(6)))
    # The last one leaves no room for the answer and a token after it.
    (folder / "long.txt").write_text("".join(words(rng, n) + "\n" for n in (40, 55, 58)))
    (folder / "ab.yaml").write_text(CONFIG)
    return folder


@pytest.fixture(scope="module")
def runs(folder: Path) -> list[dict[str, Any]]:
    """A test; the same again; without an engine; with other settings; discarding what is there;
    and vectors found in the same engine.

    The folder of the first is kept as `sampled`, since another one takes its place.
    """
    engine = [str(folder / "model"), "--dtype", "float32", "--max-model-len", str(MODEL_LENGTH)]
    engine += ["--max-num-seqs", "8", "--kv-cache-memory-bytes", str(2**25)]
    recording = ["--additional-config", '{"cna": {"record": true}}']
    ab = ["ab", *engine, *recording, "--config", str(folder / "ab.yaml")]
    ab += ["--out", str(folder / "out")]
    greedy = ["--temperature", "0", "--samples", "1", "--metric", "length"]
    commands = [ab, ab, ["ab", "--from", str(folder / "out")], [*ab, *greedy]]
    restart = {
        "argv": [*ab, *greedy, "--restart"],
        "keep": [str(folder / "out"), str(folder / "sampled")],
    }
    sets = ["--positive", str(folder / "short.txt"), "--negative", str(folder / "long.txt")]
    found = ["--vectors", "mlp", "--layers", "1-3", "--out", str(folder / "found.safetensors")]
    discover = ["discover", *engine, *sets, *found]
    lives = run_lives([*({"argv": argv} for argv in commands), restart, {"argv": discover}])
    return [life for (life,) in lives]


@pytest.fixture(scope="module")
def oracle(folder: Path) -> HookedModel:
    return HookedModel(folder / "model")


def result(folder: Path, name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / name / "ab.json").read_text("utf-8"))
    return found


def rows(folder: Path, name: str) -> list[dict[str, Any]]:
    lines = (folder / name / "answers.jsonl").read_text("utf-8").splitlines()
    return [json.loads(line) for line in lines]


def prompt_ids(folder: Path, row: dict[str, Any]) -> list[int]:
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    ids: list[int] = tokenizer.encode(f"user {row['prompt']} assistant")
    return ids


def test_a_run_tells_what_it_found(runs: list[dict[str, Any]], folder: Path) -> None:
    assert runs[0]["status"] == 0, runs[0]["err"]
    assert "90 answers: 9 prompts, 5 arms, 2 each" in runs[0]["err"]
    for said in ("length on harmful", "perplexity on benign", "vs plain"):
        assert said in runs[0]["out"]
    found = result(folder, "sampled")
    arms = [arm["arm"] for arm in found["test"]["arms"]]
    assert arms == ["plain", "f@2", "f@2:all", "off", "caa"]
    circuit = Circuit.load(folder / "c.json")
    assert found["test"]["steering"]["f"]["digest"] == circuit.digest
    vectors = VectorSet.load(folder / "v.safetensors")
    assert found["test"]["steering"]["v"]["digest"] == vectors.digest
    # refusal has no score on benign prompts, so it has an outcome on the others only.
    assert [(o["metric"], o["prompt_set"]) for o in found["outcomes"]] == [
        *((m, s) for m in ("perplexity", "nll", "length") for s in ("harmful", "benign")),
        ("refusal", "harmful"),
    ]
    assert all(len(o["estimates"]) == 5 and len(o["differences"]) == 4 for o in found["outcomes"])


def test_arms_are_paired_by_seed(runs: list[dict[str, Any]], folder: Path) -> None:
    seeds: dict[tuple[int, int], set[int]] = {}
    for row in rows(folder, "sampled"):
        seeds.setdefault((row["index"], row["sample"]), set()).add(row["seed"])
    assert len(seeds) == 18 and all(len(found) == 1 for found in seeds.values())
    assert len(set.union(*seeds.values())) == 18


def test_perplexity_is_the_unsteered_models(
    runs: list[dict[str, Any]], folder: Path, oracle: HookedModel
) -> None:
    found = result(folder, "sampled")["scores"]
    unscored = 0
    for row in rows(folder, "sampled"):
        prompt, answer = prompt_ids(folder, row), row["token_ids"]
        place = row["arm"], row["index"], row["sample"]
        nll, perplexity = (found[m][place[0]][place[1]][place[2]] for m in ("nll", "perplexity"))
        if len(prompt) + len(answer) == MODEL_LENGTH:
            assert nll is None and perplexity is None  # no room for the engine's own token
            unscored += 1
            continue
        with torch.inference_mode():
            logits = oracle.model(torch.tensor([prompt + answer])).logits[0].double()
        logprobs = logits.log_softmax(-1)[len(prompt) - 1 : -1]
        expected = -float(logprobs[range(len(answer)), answer].mean())
        assert nll == pytest.approx(expected, rel=1e-4)
        assert perplexity == pytest.approx(math.exp(expected), rel=1e-3)
    assert unscored == 10


def test_run_again_nothing_is_answered_again(runs: list[dict[str, Any]], folder: Path) -> None:
    assert runs[1]["status"] == 0, runs[1]["err"]
    assert "90 answers are there" in runs[1]["err"]
    assert runs[1]["out"] == runs[0]["out"]
    assert runs[2]["status"] == 0, runs[2]["err"]
    assert runs[2]["out"] == runs[0]["out"]  # without an engine, from the saved scores


def test_another_test_is_not_mixed_in(runs: list[dict[str, Any]]) -> None:
    assert runs[3]["status"] == 2
    named = "holds a test with other settings (rows, sampling, seeds); name another folder, or add"
    assert named in runs[3]["err"]
    assert runs[4]["status"] == 0, runs[4]["err"]


def test_greedy_answers_are_those_of_their_arms(
    runs: list[dict[str, Any]], folder: Path, oracle: HookedModel
) -> None:
    channels = tiny_models.channels(tiny_models.LAYERS, tiny_models.WIDTH, 20, seed=1)
    arms = {
        "plain": Arm(),
        "f@2": Arm(((channels, 2.0),)),
        "f@2:all": Arm(((channels, 2.0),), "all"),
        "off": Arm(((channels, 0.0),), "all"),
        "caa": Arm((), "all", ((VECTORS, -1.0),)),
    }
    answered = rows(folder, "out")
    assert len(answered) == 45 and all("seed" not in row for row in answered)
    verdicts = [
        oracle.check(prompt_ids(folder, row), row["token_ids"], arms[row["arm"]])
        for row in answered
    ]
    assert_token_exact(verdicts, "cna-vllm ab")
    assert [m["name"] for m in result(folder, "out")["metrics"]] == ["length"]


def test_vectors_found_are_the_oracles(
    runs: list[dict[str, Any]], folder: Path, oracle: HookedModel
) -> None:
    assert runs[5]["status"] == 0, runs[5]["err"]
    found = VectorSet.load(folder / "found.safetensors")
    assert runs[5]["out"].splitlines()[0].startswith("model   'model' (LlamaForCausalLM, 4 layers")
    assert (found.form, list(found.vectors)) == ("mlp", [1, 2, 3])
    assert (found.prompts["positive"], found.prompts["negative"]) == (6, 3)
    means = []
    for name in ("short.txt", "long.txt"):
        prompts = [{"prompt": line} for line in (folder / name).read_text().splitlines()]
        outputs = [oracle.outputs(prompt_ids(folder, row), "mlp").double() for row in prompts]
        means.append(np.mean([one.numpy() for one in outputs], axis=0))
    expected = (means[0] - means[1])[1:]
    scale = np.abs(expected).max()
    assert np.abs(np.stack(list(found.vectors.values())) - expected).max() < 1e-5 * scale
