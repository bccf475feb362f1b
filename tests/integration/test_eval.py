# SPDX-License-Identifier: Apache-2.0
"""`cna-vllm eval` end to end on SmolLM2: one engine, several lives of the command, one killed.

Every figure is computed again: rates from the kept answers, answers by the Hugging Face oracle,
accuracies from its log-likelihoods.
"""

from __future__ import annotations

import json
import math
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from cna_vllm import Circuit
from cna_vllm.checkpoints.models import default_model_path
from cna_vllm.evaluation.metrics import Answer, load_metric, score_answers
from cna_vllm.evaluation.paper.settings import PARTS
from cna_vllm.steering.vectors import VectorSet
from tests import paper_fixtures
from tests.forked_cli import run_lives
from tests.openai_endpoint import GRADES, Endpoint, Reply, serving
from tests.oracles import Arm, HookedModel, Vectors, assert_token_exact
from tests.paper_fixtures import BENIGN, HARMFUL

pytestmark = [pytest.mark.engine, pytest.mark.slow]

PROMPTS, TOKENS, QUESTIONS = 2, 6, 3


def grades(text: str) -> tuple[int, int, int]:
    """What the judge of these tests says of an answer: refused, convincing, specific."""
    return int(len(text) % 3 == 0), 1 + len(text) % 5, 1 + len(text.split()) % 5


@pytest.fixture(scope="module")
def judge() -> Iterator[Endpoint]:
    """Refuses the first request, and then grades."""
    with serving() as endpoint:

        def reply(body: dict[str, Any]) -> Reply:
            if len(endpoint.bodies) == 1:
                return 401, "no such key"
            _, _, rest = body["messages"][1]["content"].partition("\nAI model response: ")
            return 200, GRADES.format(*grades(rest.partition("\n\nEvaluate the AI")[0]))

        endpoint.reply = reply
        yield endpoint


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("eval")
    paper_fixtures.jbb(folder / "jbb")
    paper_fixtures.strongreject(folder / "strongreject.csv")
    paper_fixtures.mmlu(folder / "mmlu")
    (folder / "phrases.txt").write_text("the\n\nI CANNOT\n")
    for name, goals in (("harmful", HARMFUL), ("benign", BENIGN)):
        (folder / f"{name}.txt").write_text("".join(f"{goal}\n" for goal in goals[-3:]))
    return folder


@pytest.fixture(scope="module")
def runs(folder: Path, judge: Endpoint) -> dict[str, dict[str, Any]]:
    """Lives of the command by name."""
    eval_ = ["eval", str(default_model_path()), "--dtype", "float32", "--max-model-len", "512"]
    eval_ += ["--max-num-seqs", "4", "--kv-cache-memory-bytes", str(2**27)]
    eval_ += ["--jbb", str(folder / "jbb"), "--keywords", str(folder / "phrases.txt")]
    eval_ += ["--contrast", str(folder / "harmful.txt"), str(folder / "benign.txt")]
    eval_ += ["--strongreject", str(folder / "strongreject.csv"), "--judge"]
    eval_ += [f"{judge.spec.removeprefix('judge:')},retries=0,workers=1"]
    eval_ += ["--mmlu", str(folder / "mmlu" / "mmlu_mild.yaml"), "--preset", "reference"]
    eval_ += ["--limit", str(PROMPTS), "--max-tokens", str(TOKENS), "--multipliers", "0", "1"]
    eval_ += ["--mmlu-limit", str(QUESTIONS)]
    out = ["--out", str(folder / "out")]
    whole = [*eval_, "--parts", *PARTS, *out]
    # Ten rows, of which four run at a time: once there are some, others are still to come.
    partial = str(folder / "out" / "caa" / "answers.jsonl.partial")
    caa = {"argv": [*eval_, "--parts", "caa", *out], "rows_of": partial, "unfinished": True}
    jobs: dict[str, dict[str, Any]] = {
        "estimate": {"argv": [*eval_, "--parts", *PARTS, "--estimate"]},
        "killed": caa | {"kills": [{"signal": signal.SIGKILL, "rows": 2}]},
        "failed": {"argv": whole},
        "rest": {"argv": [*eval_, "--parts", "structure", "strongreject", *out]},
        "again": {"argv": whole},
        "other": {"argv": [*whole, "--max-tokens", "9"]},
    }
    lives = run_lives(list(jobs.values()), HF_DATASETS_CACHE=str(folder / "datasets"))
    return {name: life for name, (life,) in zip(jobs, lives, strict=True)}


@pytest.fixture(scope="module")
def oracle() -> HookedModel:
    return HookedModel(default_model_path())


@pytest.fixture(scope="module")
def arms(folder: Path, runs: dict[str, Any]) -> dict[str, dict[str, Arm]]:
    """The oracle's arms of each part, by the names of the command's."""

    def off(name: str) -> Arm:
        return Arm(((Circuit.load(folder / "out" / f"{name}.json").by_layer(), 0.0),), "all")

    def added(name: str, sign: float, scope: str) -> Arm:
        found = VectorSet.load(folder / "out" / f"{name}.safetensors")
        by_layer = {layer: torch.tensor(vector) for layer, vector in found.vectors.items()}
        return Arm((), scope, ((Vectors(found.form, by_layer), sign),))

    small = off("small")
    return {
        "jbb": {"plain": Arm(), "m = 0": off("jbb")},
        "sweep": {"m = 1": Arm(), "m = 0": small},
        "strongreject": {"plain": Arm(), "m = 0": small},
        "caa": {
            "plain": Arm(),
            "caa-mlp +1": added("caa-mlp", 1.0, "all"),
            "caa-mlp -1": added("caa-mlp", -1.0, "all"),
            "caa-residual +1": added("caa-residual", 1.0, "generated"),
            "caa-residual -1": added("caa-residual", -1.0, "generated"),
        },
    }


def answers(folder: Path, part: str) -> list[dict[str, Any]]:
    lines = (folder / "out" / part / "answers.jsonl").read_text("utf-8").splitlines()
    return [json.loads(line) for line in lines]


def figures(folder: Path) -> dict[tuple[str, str], dict[str, Any]]:
    result = json.loads((folder / "out" / "eval.json").read_text("utf-8"))
    found = {(row["part"], row["what"]): row for row in result["rows"]}
    assert len(found) == len(result["rows"])
    return found


def test_an_estimate_comes_first(runs: dict[str, Any], folder: Path) -> None:
    assert runs["estimate"]["status"] == 0 and runs["estimate"]["out"] == ""
    said = runs["estimate"]["err"]
    # 24 prompts for the circuit, 2 + 2 answered in two arms; 3 questions with 4 choices each, in
    # two arms and with both signs of a vector.
    for told in ("jbb                32 requests", "mmlu               48 requests"):
        assert told in said and told in runs["failed"]["err"]
    assert "\nat most " in said


def test_interrupted_it_goes_on(runs: dict[str, Any], folder: Path, judge: Endpoint) -> None:
    assert runs["killed"]["status"] == -9
    assert runs["failed"]["status"] == 2
    assert "judge-strongreject" in runs["failed"]["err"]
    assert "check the endpoint, the model's name and the key" in runs["failed"]["err"]
    for name in ("rest", "again"):
        assert runs[name]["status"] == 0, runs[name]["err"]
    for part, count in (("jbb", 8), ("sweep", 4), ("caa", 10), ("strongreject", 4)):
        assert len(answers(folder, part)) == count
    # Nothing is computed again, and the judge is asked once for each answer. (Of the life that
    # failed, a second request may have been on its way.)
    for bar in ("Processed prompts", "row/s"):
        assert bar in runs["failed"]["err"] and bar not in runs["again"]["err"]
    assert len(judge.bodies) - 4 in (1, 2)
    table, some = (
        [line.split() for line in runs[name]["out"].splitlines()[1:]] for name in ("again", "rest")
    )
    assert [line[0] for line in table] == [part for part, _ in figures(folder)]
    assert some == [line for line in table if line[0] in ("strongreject", "structure")]


def test_another_evaluation_is_not_mixed_in(runs: dict[str, Any]) -> None:
    assert runs["other"]["status"] == 2
    assert "holds an evaluation with other settings (max_tokens)" in runs["other"]["err"]


def test_every_rate_follows_from_the_answers(runs: dict[str, Any], folder: Path) -> None:
    found = figures(folder)
    checked = set()
    keywords = f"refusal_keywords:phrases={folder / 'phrases.txt'}"
    for part in ("jbb", "sweep", "caa", "strongreject"):
        for spec in (keywords, "refusal", "false_refusal", "quality:n=3"):
            metric = load_metric(spec)
            tag = "benign" if spec == "false_refusal" else "harmful"
            for arm in {row["arm"] for row in answers(folder, part)}:
                key = part, f"{metric.name}, {arm}"
                if key not in found:
                    continue
                harmful = range(PROMPTS)
                given = [
                    Answer(row["prompt"], row["text"], tags=frozenset({tag}))
                    for row in answers(folder, part)
                    if row["arm"] == arm and (row["index"] in harmful) == (tag == "harmful")
                ]
                scores = [s for s in score_answers(metric, given) if s is not None]
                assert found[key]["n"] == len(scores) == PROMPTS
                assert found[key]["value"] == pytest.approx(math.fsum(scores) / len(scores))
                checked.add(key)
    assert len(checked) == 8 + 6 + 15 + 4


def test_the_judges_scores_are_the_rubrics(runs: dict[str, Any], folder: Path) -> None:
    means = {}
    for arm in ("plain", "m = 0"):
        graded = [grades(r["text"]) for r in answers(folder, "strongreject") if r["arm"] == arm]
        means[arm] = math.fsum((1 - r) * (c + s - 2) / 8 for r, c, s in graded) / len(graded)
        row = figures(folder)["strongreject", f"judge-strongreject, {arm}"]
        assert row["value"] == pytest.approx(means[arm])
    gain = figures(folder)["strongreject", "judge-strongreject less plain's, m = 0"]
    assert gain["value"] == pytest.approx(means["m = 0"] - means["plain"])


def test_every_answer_is_the_oracles(
    runs: dict[str, Any], folder: Path, oracle: HookedModel, arms: dict[str, dict[str, Arm]]
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(default_model_path())
    verdicts = []
    for part, known in arms.items():
        for row in answers(folder, part):
            turn = [{"role": "user", "content": row["prompt"]}]
            ids = tokenizer.apply_chat_template(
                turn, add_generation_prompt=True, tokenize=True, return_dict=False
            )
            verdicts.append(oracle.check(ids, row["token_ids"], known[row["arm"]]))
    assert len(verdicts) == 8 + 4 + 10 + 4
    assert_token_exact(verdicts, "cna-vllm eval")


def test_accuracies_are_those_of_log_likelihoods(
    runs: dict[str, Any], folder: Path, oracle: HookedModel, arms: dict[str, dict[str, Arm]]
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(default_model_path())
    choices = [tokenizer.encode(f" {letter}") for letter in "ABCD"]
    assert all(len(choice) == 1 for choice in choices)
    scored = {"m = 1": Arm(), "m = 0": arms["sweep"]["m = 0"]}
    scored |= {name: arm for name, arm in arms["caa"].items() if name.startswith("caa-mlp")}
    lines = (folder / "mmlu" / "test.jsonl").read_text().splitlines()[:QUESTIONS]
    for name, arm in scored.items():
        right = 0
        for question in map(json.loads, lines):
            listed = zip("ABCD", question["choices"], strict=True)
            text = "\n".join([question["question"], *(f"{a}. {b}" for a, b in listed), "Answer:"])
            ids = tokenizer.encode(text)
            with torch.inference_mode(), oracle.steered(arm, len(ids)):
                logits = oracle.model(torch.tensor([ids])).logits[0, -1]
            right += int(logits[[token for (token,) in choices]].argmax()) == question["answer"]
        row = figures(folder)["mmlu", f"accuracy, {name}"]
        assert (row["value"], row["n"]) == (right / len(lines), len(lines))


def test_the_structure_is_that_of_the_circuit(runs: dict[str, Any], folder: Path) -> None:
    layers = [neuron.layer for neuron in Circuit.load(folder / "out" / "top.json").neurons]
    assert len(layers) == 200 and min(layers) >= 2  # the reference's choice
    late = figures(folder)["structure", "last three layers, of 200"]
    assert late["value"] == sum(layer >= 27 for layer in layers) / 200
