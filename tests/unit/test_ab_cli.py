# SPDX-License-Identifier: Apache-2.0
"""`cna-vllm ab`: bad input is one line and status 2 before any engine; --from needs none."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cna_vllm import Circuit, Neuron
from cna_vllm.cli import main
from cna_vllm.cli.ab_options import arms_of, flags, parser, steering_of
from cna_vllm.evaluation.ab import compare
from cna_vllm.evaluation.answers import collect
from cna_vllm.evaluation.metrics import load_metric
from cna_vllm.evaluation.outcomes import Analysis
from cna_vllm.evaluation.result import MetricInfo, write_json
from cna_vllm.steering.arms import Arm
from cna_vllm.steering.vectors import VectorSet
from tests.simulated_ab import ARMS, describe, prompt_sets, rows

AB = "ab m --circuit f=c.json --multiplier 0 --prompts p.txt --metric length --out o"

THREE = "--vector u=v.st --vector v=v.st --vector w=v.st"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    Circuit("org/tiny", "LlamaForCausalLM", 2, 8, (Neuron(1, 3, -2.0),)).save(tmp_path / "c.json")
    ones = np.ones(4, dtype=np.float32)
    VectorSet("mlp", "org/tiny", "LlamaForCausalLM", 2, 4, {1: ones}).save(tmp_path / "v.st")
    (tmp_path / "p.txt").write_text("a\nb\n")
    (tmp_path / "q.txt").write_text("c\n")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "p.txt").write_text("d\n")
    (tmp_path / "file").write_text("")
    (tmp_path / "bad.yaml").write_text("arms: [1")
    (tmp_path / "list.yaml").write_text("- a\n")
    for name, text in CONFIGS.items():
        (tmp_path / f"{name}.yaml").write_text(text)
    monkeypatch.chdir(tmp_path)
    return tmp_path


CONFIGS = {
    "key": "arm: [plain]",
    "arms": "arms: plain",
    "arm": "arms: [plain, 3]",
    "scope": "scopes: [first]",
    "multiplier": "multipliers: [a]",
    "prompts": "prompts: [{file: p.txt, label: x}]",
    "nofile": "prompts: [{tag: x}]",
    "metrics": "metrics: []",
    "effects": "effects: {length: large}",
    "huge": f"multipliers: [1{'0' * 400}]",
    "confidence": "confidence: 95",
    "samples": "samples: 0",
    "seed": "sampling: {seed: 3}",
    "sampling": "sampling: {temperatur: 1}",
    "raw": "raw: perhaps",
    "circuits": "circuits: c.json",
}


def said(capsys: pytest.CaptureFixture[str], line: str) -> str:
    assert main(line.split()) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("cna-vllm: error: ") and captured.err.count("\n") == 1
    return captured.err


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("ab m", "--out DIR is missing"),
        ("ab m --out o", "name prompts"),
        ("ab m --out o --prompts p.txt", "name metrics"),
        ("ab m --out o --prompts p.txt --metric length", "name arms"),
        ("ab m --out o --prompts p.txt --metric length --multiplier 0", "needs a --circuit"),
        (f"{AB} --circuit g", "--circuit 'g': write it as NAME=FILE"),
        (f"{AB} --circuit f=c.json", "'f' is given twice"),
        (f"{AB} --circuit g=none.json", "none.json: cannot be read"),
        (f"{AB} --vector v=none.safetensors", "none.safetensors: cannot be read"),
        (f"{AB} --vector v=c.json", "c.json: is not a safetensors file"),
        (f"{AB} --vector v", "--vector 'v': write it as NAME=FILE"),
        (f"{AB} --vector v=v.st --vector v=v.st", "--vector: the name 'v' is given twice"),
        (f"{AB} --vector f=v.st", "--vector: 'f' is also a circuit; rename one of them"),
        (f"{AB} --vector v=v.st --arm x=w@1", "no circuit is named 'w'; add --circuit or --vector"),
        (f"{AB} --vector v=v.st --arm x=v@nan", "cna_coefficient: must be finite"),
        (f"{AB} --vector v=v.st --arm x=v@1e4", "cna_coefficient: 10000 is over the limit"),
        (f"{AB} {THREE} --arm x=u@1+v@1+w@1", "cna_vector: 3 vectors on one request"),
        (f"{AB} --arm x=g@0", "no circuit is named 'g'"),
        (f"{AB} --arm f@0", "'f@0' is given twice"),
        (f"{AB} --arm x=f", "is not CIRCUIT@M"),
        (f"{AB} --multiplier nan", "cna_multiplier: must be finite"),
        (f"{AB} --scope first", "invalid choice: 'first'"),
        (f"{AB} --control off", "control: 'off' is not an arm; use one of f@0"),
        ("ab m --arm plain --prompts p.txt --metric length --out o", "there is only the control"),
        (f"{AB} --prompts none.txt", "none.txt: cannot be read"),
        (f"{AB} --prompts sub/p.txt", "another set is called 'p'"),
        (f"{AB} --prompts q.csv", "q.csv: cannot be read"),
        (f"{AB} --metric refusals", "unknown metric 'refusals'"),
        (f"{AB} --metric length:unit=tokens", "metric length: asked for twice"),
        (f"{AB} --effect length", "is not METRIC=X"),
        (f"{AB} --effect refusal=0.1", "effect refusal: no such metric; the metrics are length"),
        (f"{AB} --effect length=0", "must be a finite number other than 0"),
        (f"{AB} --confidence 95", "'95' is not a number between 0 and 1"),
        (f"{AB} --samples 2", "samples of a greedy row would all be alike"),
        (f'{AB} --sampling {{"seed":1}}', "'seed' is the run's"),
        (f"{AB} --out file", "file: is a file"),
        (f"{AB} --config none.yaml", "none.yaml: cannot be read"),
        (f"{AB} --config bad.yaml", "bad.yaml: is not YAML"),
        (f"{AB} --config list.yaml", "list.yaml: must hold keys and values"),
        (f"{AB} --config key.yaml", "key.yaml: unknown key 'arm'; known are circuits, vectors"),
        (f"{AB} --config arms.yaml", "arms.yaml: arms: must be a list"),
        (f"{AB} --config arm.yaml", "arm.yaml: arms: 1: must be a text, not 3"),
        (f"{AB} --config scope.yaml", "scopes: 0: must be one of last, all"),
        (f"{AB} --config multiplier.yaml", "multipliers: 0: must be a finite number, not 'a'"),
        (f"{AB} --config prompts.yaml", "prompts: 0: unknown key 'label'; known are file, tag"),
        (f"{AB} --config nofile.yaml", "prompts: 0: 'file' is missing"),
        (f"{AB} --config metrics.yaml", "metrics: must be a list with something in it"),
        (f"{AB} --config effects.yaml", "effects: length: must be a finite number"),
        (f"{AB} --config huge.yaml", "multipliers: 0: must be a finite number, not 1000"),
        (f"{AB} --config confidence.yaml", "confidence: must lie between 0 and 1, not 95"),
        (f"{AB} --config samples.yaml", "samples: must be a whole number of at least 1"),
        (f"{AB} --config seed.yaml", "'seed' is the run's"),
        (f"{AB} --config raw.yaml", "raw: must be true or false"),
        (f"{AB} --config circuits.yaml", "circuits: must hold names and values"),
        ("ab --from none", "none/ab.json: cannot be read"),
        ("ab --from done --arm plain", "--from: takes no --arm"),
        ("ab --from done --temperature 1", "--from: takes no --temperature"),
        ("ab --from done m", "--from: takes no 'm'"),
    ],
)
def test_bad_input(folder: Path, capsys: pytest.CaptureFixture[str], line: str, says: str) -> None:
    assert says in said(capsys, line)
    assert not (folder / "o").exists()


def test_arms_of_circuits_and_vectors(folder: Path) -> None:
    line = "--circuit f=c.json --multiplier 1 0 --scope last all --vector v=v.st --arm caa=v@-1:all"
    given = flags(parser().parse_args([*line.split(), "--arm", "both=f@0+v@0.5"]))
    section, steering = steering_of(given)
    assert section == {
        "circuits": {"f": str(folder / "c.json")},
        "vectors": {"v": str(folder / "v.st")},
        "max_vectors": 1,
    }
    assert steering["v"] == {
        "file": str(folder / "v.st"),
        "digest": VectorSet.load("v.st").digest,
    }
    assert arms_of(given) == [
        Arm("plain"),
        Arm("f@0", (("f", 0.0),)),
        Arm("f@0:all", (("f", 0.0),), "all"),
        Arm("caa", (), "all", (("v", -1.0),)),
        Arm("both", (("f", 0.0),), "last", (("v", 0.5),)),
    ]


@pytest.fixture
def done(folder: Path) -> Path:
    """The folder of a finished test, with a metric that only an engine can compute."""
    dice = random.Random(0)
    where, sets = folder / "done", prompt_sets()
    where.mkdir()
    made = rows(ARMS, sets)
    test = describe(ARMS, sets)
    info = MetricInfo.of("perplexity", load_metric("perplexity"))
    collect(made, test.arm_names, test.prompt_sets, 1)
    scores = {
        "perplexity": {
            name: [[2 + dice.random()] for _ in range(test.prompts)] for name in test.arm_names
        }
    }
    compare(test, [info], scores, Analysis(resamples=199)).save(where / "ab.json")
    (where / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in made))
    return where


def read(where: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((where / "ab.json").read_text("utf-8"))
    return found


def test_from_scores_anew_and_keeps_what_it_cannot_compute(
    done: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = read(done)
    line = "ab --from done --metric refusal --metric false_refusal --effect refusal=0.1"
    assert main([*line.split(), "--confidence", "0.9"]) == 0
    after, out = read(done), capsys.readouterr().out
    assert [m["name"] for m in after["metrics"]] == ["perplexity", "refusal", "false_refusal"]
    assert after["scores"]["perplexity"] == before["scores"]["perplexity"]
    assert after["analysis"]["confidence"] == 0.9
    assert after["test"] == before["test"]
    assert "refusal on harmful" in out and "perplexity on benign" in out
    assert (done / "report.html").stat().st_size > 50_000
    # The same again, from the scores alone.
    assert main(["ab", "--from", "done"]) == 0
    assert read(done) == after


def test_from_with_another_control(done: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ab", "--from", "done", "--control", "refusal@0"]) == 0
    arms = {d["arm"] for o in read(done)["outcomes"] for d in o["differences"]}
    assert "plain" in arms and "refusal@0" not in arms


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ("--metric perplexity", "metric perplexity: is computed by the engine, and none runs here"),
        ("--control off", "control: 'off' is not an arm; use one of plain"),
        ("--effect refusal=1", "effect refusal: no such metric; the metrics are perplexity"),
    ],
)
def test_from_refuses(
    done: Path, capsys: pytest.CaptureFixture[str], arguments: str, says: str
) -> None:
    before = (done / "ab.json").read_bytes()
    assert says in said(capsys, f"ab --from done {arguments}")
    assert (done / "ab.json").read_bytes() == before


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda lines: lines[:-1], "is missing; run the test to its end"),
        (lambda lines: [*lines, lines[0]], "is there twice"),
        (lambda lines: [*lines[:-1], lines[-1][:40]], "is not a row of JSON"),
        (lambda lines: [lines[0].replace("topic 0", "topic 9"), *lines[1:]], "other arms"),
        (lambda lines: [line.replace("topic 0", "topic 9") for line in lines], "are not the test"),
        (lambda lines: [lines[0].replace('"plain"', '"odd"'), *lines[1:]], "is not part of this"),
        (lambda lines: ["[]", *lines[1:]], "is not an object"),
        (lambda lines: ['{"index": 0}', *lines[1:]], "a row is malformed"),
    ],
)
def test_from_with_answers_that_are_not_the_tests(
    done: Path, capsys: pytest.CaptureFixture[str], damage: Any, says: str
) -> None:
    path = done / "answers.jsonl"
    path.write_text("\n".join(damage(path.read_text().splitlines())) + "\n")
    assert says in said(capsys, "ab --from done")


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("format", "other", "'format' is not 'cna-ab'"),
        ("version", 2, "'version' is 2; this program reads 1"),
        ("test", {}, "is incomplete or malformed"),
        ("scores", {"perplexity": {}}, "does not fit the arms"),
    ],
)
def test_from_with_another_file(
    done: Path, capsys: pytest.CaptureFixture[str], key: str, value: Any, says: str
) -> None:
    (done / "ab.json").write_text(json.dumps({**read(done), key: value}))
    assert says in said(capsys, "ab --from done")


def test_json_of_any_text(tmp_path: Path) -> None:
    """Text stays as it is; a lone surrogate, which UTF-8 does not have, is escaped."""
    write_json(tmp_path / "a.json", {"é": "\ud800 \\"})
    raw = (tmp_path / "a.json").read_text("utf-8")
    assert "é" in raw and "\\ud800" in raw
    assert json.loads(raw) == {"é": "\ud800 \\"}
