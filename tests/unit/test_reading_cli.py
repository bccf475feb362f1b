# SPDX-License-Identifier: Apache-2.0
"""`inspect`, `compare` and `bake` on the command line: output, files, and refusals in one line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from cna_vllm import Circuit, Neuron
from cna_vllm.cli import main
from tests import checkpoints


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Circuits and models of several kinds in the working directory."""
    checkpoints.circuit().save(tmp_path / "c.json")
    checkpoints.circuit(Neuron(0, 3, 1.0), Neuron(1, 1, 2.0), model="org/other").save(
        tmp_path / "d.json"
    )
    Circuit("org/deep", "LlamaForCausalLM", 9, 16, (Neuron(0, 3),)).save(tmp_path / "deep.json")
    (tmp_path / "foreign.json").write_text('{"2": [3, 7]}')
    (tmp_path / "there.png").write_bytes(b"")
    checkpoints.add_tokenizer(checkpoints.write(tmp_path / "model"))
    checkpoints.write(tmp_path / "bare")
    checkpoints.write(tmp_path / "awq", quantization_config={"quant_method": "awq"})
    checkpoints.write(tmp_path / "wide", intermediate_size=32)
    (tmp_path / "pickle").mkdir()
    (tmp_path / "pickle" / "pytorch_model.bin").write_bytes(b"x")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def call(line: str) -> int:
    return main(line.split())


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("inspect c.json --top -1", "--top must be at least 0"),
        ("inspect c.json --tokens 0", "--tokens"),
        ("inspect c.json --plot p.pdf", "name it P.png"),
        ("inspect c.json --plot there.png", "there.png: exists"),
        ("inspect c.json --plot no/p.png", "does not exist"),
        ("inspect c.json --model ./none", "./none"),
        ("inspect c.json --model wide", "'intermediate_size' is 16 in the circuit of 'org/tiny'"),
        ("inspect c.json --model awq", "quantized (awq)"),
        ("inspect c.json --model bare", "cannot read the tokenizer of 'bare'"),
        ("discover m --positive p --negative p --out o.json --plot p.pdf", "name it P.png"),
        ("discover m --positive p --negative p --out o.json --plot there.png", "exists"),
        ("compare c.json", "required: B.json"),
        ("compare c.json none.json", "none.json: cannot be read"),
        ("compare c.json foreign.json", "does not say which model"),
        ("compare c.json d.json --plot there.png", "there.png: exists"),
        ("compare c.json d.json --plot p.svg", "name it P.png"),
        ("compare c.json deep.json", "'org/tiny'"),
        ("compare c.json deep.json", "'org/deep'"),
        ("bake model c.json --out o", "required: --multiplier"),
        ("bake model c.json --multiplier 0", "required: --out"),
        ("bake model c.json --multiplier x --out o", "invalid float value: 'x'"),
        ("bake model c.json --multiplier nan --out o", "must be finite"),
        ("bake model c.json --multiplier=-inf --out o", "must be finite"),
        ("bake model c.json --multiplier 1e39 --out o", "float32's range"),
        ("bake model c.json --multiplier 0 --out model", "model: exists"),
        ("bake model c.json --multiplier 0 --out no/o", "does not exist"),
        ("bake model none.json --multiplier 0 --out o", "none.json: cannot be read"),
        ("bake awq c.json --multiplier 0 --out o", "quantized (awq)"),
        ("bake pickle c.json --multiplier 0 --out o", "only .bin files"),
        ("bake c.json c.json --multiplier 0 --out o", "is a file"),
        ("bake wide c.json --multiplier 0 --out o", "'org/tiny' (LlamaForCausalLM"),
        ("bake wide c.json --multiplier 0 --out o", "'wide' (LlamaForCausalLM"),
    ],
)
def test_bad_input_is_one_line_and_status_2(
    folder: Path, capsys: pytest.CaptureFixture[str], line: str, says: str
) -> None:
    before = sorted(folder.rglob("*"))
    assert call(line) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("cna-vllm: error: ")
    assert captured.err.count("\n") == 1
    assert says in captured.err
    assert sorted(folder.rglob("*")) == before


def test_inspect_shows_the_items_of_a_model(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = "inspect c.json --model model --top 2 --tokens 34 --plot p.png"
    assert call(line) == 0
    printed = capsys.readouterr().out
    assert "    2      2  ####" in printed
    assert "last quarter 67% (evenly: 33%)" in printed
    rows = [row for row in printed.splitlines() if "  + " in row]
    assert [row.split()[:3] for row in rows] == [["2", "0", "-2"], ["0", "3", "+1.5"]]
    assert all("␣the" in row and "\\n\\n" in row and "中文" in row for row in rows)
    assert "sign(delta) * down_proj[:, index]" in printed
    assert (folder / "p.png").read_bytes().startswith(b"\x89PNG")


def test_inspect_writes_json(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("inspect c.json --model model --tokens 3 --json") == 0
    data = json.loads(capsys.readouterr().out)
    assert data["digest"] == Circuit.load("c.json").digest
    assert data["neurons_by_layer"] == [1, 0, 2]
    assert [share["neurons"] for share in data["late_layers"]] == [2, 3, 2]
    assert [len(neuron["promotes"]) for neuron in data["strongest"]] == [3, 3, 3]
    assert set(data["strongest"][0]["suppresses"][0]) == {"token", "text", "score"}
    assert call("inspect c.json --json") == 0
    assert set(json.loads(capsys.readouterr().out)["strongest"][0]) == {"layer", "index", "delta"}


def test_inspect_converts_with_the_configuration_alone(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The weights of a quantized or pickled model are not needed to name it."""
    assert call("inspect foreign.json --model awq --save own.json --plot p.png") == 0
    assert Circuit.load("own.json").by_layer() == {2: (3, 7)}
    assert call("inspect own.json --plot p.png --top 0 --overwrite") == 0
    assert "strongest" not in capsys.readouterr().out.split("digest", 2)[2]


def test_compare(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("compare c.json d.json --plot p.png") == 0
    printed = capsys.readouterr().out
    assert "overlap  1 neurons: 33.3% of A, 50.0% of B, Jaccard 0.250" in printed
    assert "    0      1      1      1\n" in printed
    assert (folder / "p.png").read_bytes().startswith(b"\x89PNG")
    assert call("compare c.json d.json --json") == 0
    data = json.loads(capsys.readouterr().out)
    assert data["common"] == [{"layer": 0, "index": 3, "delta_a": 1.5, "delta_b": 1.0}]
    assert data["chance_uniform"]["expected"] == 3 * 2 / (3 * 16)


def test_bake(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "model" / "old.bin").write_bytes(b"x")
    assert call("bake model c.json --multiplier 0.5 --out baked") == 0
    printed = capsys.readouterr().out
    assert "baked: 3 neurons at m = 0.5; tensors rewritten: 2, in files: 1" in printed
    assert "left out" in printed and "old.bin" in printed
    assert json.loads(Path("baked/cna_bake.json").read_text())["multiplier"] == 0.5


def test_models_of_the_hub(folder: Path) -> None:
    """From a cache as the hub's client lays it out, in a process that must stay offline."""
    revision = "0123456789abcdef0123456789abcdef01234567"
    cache = folder / "cache" / "models--org--tiny"
    (cache / "refs").mkdir(parents=True)
    (cache / "refs" / "main").write_text(revision)
    checkpoints.add_tokenizer(checkpoints.write(cache / "snapshots" / revision, shards=3))
    environment = {
        **os.environ,
        "HF_HUB_CACHE": str(folder / "cache"),
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": str(Path(__file__).parents[2]),
    }

    def offline(line: str) -> subprocess.CompletedProcess[str]:
        code = "import sys; from cna_vllm.cli import main; sys.exit(main(sys.argv[1:]))"
        command = [sys.executable, "-c", code, *line.split()]
        return subprocess.run(
            command, env=environment, cwd=folder, capture_output=True, text=True, check=False
        )

    shown = offline("inspect c.json --model org/tiny --json")
    assert shown.returncode == 0, shown.stderr
    assert len(json.loads(shown.stdout)["strongest"][0]["promotes"]) == 5
    done = offline("bake org/tiny c.json --multiplier 0 --out baked")
    assert done.returncode == 0, done.stderr
    record = json.loads((folder / "baked" / "cna_bake.json").read_text())
    assert record["source"] == {"model": "org/tiny", "revision": revision}
    assert not any(path.is_symlink() for path in (folder / "baked").iterdir())
    missing = offline("inspect c.json --model org/none")
    assert (missing.returncode, missing.stderr.count("\n")) == (2, 1)
    assert "org/none" in missing.stderr


def test_experts_are_shown(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    experts = {"count": [0, 4], "intermediate_size": 8}
    neurons = (Neuron(0, 3, 1.0), Neuron(1, 5, -3.0, 2), Neuron(1, 6, 2.0, 2), Neuron(1, 0, 0.5, 0))
    routed = Circuit("org/moe", "X", 2, [16, 0], neurons, experts=experts)
    routed.save("moe.json")
    Circuit("org/moe", "X", 2, [16, 0], neurons[:1], experts=experts).save("dense.json")
    assert call("inspect moe.json --plot moe.png") == 0
    shown = capsys.readouterr().out
    for part in (
        "2 layers, intermediate size 1 x 16, 1 x 0, 1 layer with 4 experts of 8",
        "3 of them in 2 of 4 routed experts",
        "neurons by layer/expert, most first: 1/2: 2, 1/0: 1\n",
        "layer expert  index       delta\n    1      2      5          -3\n",
        "\n    0      -      3          +1\n",
    ):
        assert part in shown
    assert call("inspect moe.json --with dense.json --json") == 0
    told = json.loads(capsys.readouterr().out)
    assert told["strongest"][0] == {"layer": 1, "expert": 2, "index": 5, "delta": -3.0}
    assert told["neurons_by_expert"][0] == {"layer": 1, "expert": 2, "neurons": 2, "share": 0.5}
    assert (told["experts"], told["shared"]) == (experts, {"dense.json": 1})
    assert call("compare moe.json moe.json --plot both.png") == 0
    assert "1      3      3      3" in capsys.readouterr().out
    assert call("compare moe.json dense.json --json") == 0
    told = json.loads(capsys.readouterr().out)
    assert told["common"] == [{"layer": 0, "index": 3, "delta_a": 1.0, "delta_b": 1.0}]
    assert told["a"]["neurons_by_expert"] and "neurons_by_expert" not in told["b"]


def test_neurons_that_two_circuits_share_are_told(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """On one request they get the product of the multipliers, which few expect."""
    assert call("inspect c.json --with c.json --with d.json") == 0
    told = capsys.readouterr().out
    count = len(checkpoints.circuit())
    assert f"together {count} neurons are in c.json, too: on one request with both" in told
    assert call("inspect c.json --with c.json --json") == 0
    assert json.loads(capsys.readouterr().out)["shared"] == {"c.json": count}
    assert call("inspect c.json --with deep.json") == 2
    assert "cannot be compared" in capsys.readouterr().err
    assert call("compare c.json c.json") == 0
    assert f"together {count} neurons are in both" in capsys.readouterr().out
