# SPDX-License-Identifier: Apache-2.0
"""Circuits and adapters from flags, --additional-config and --config: merged, or refused."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest

from cna_vllm import Circuit, Neuron
from cna_vllm.cli import main, serve
from cna_vllm.cli.engine_args import add_section, parse_engine_args
from cna_vllm.steering.arms import parse_arm, parse_steering
from cna_vllm.steering.request import SteeringError


def circuit(index: int) -> Circuit:
    return Circuit("org/tiny", "LlamaForCausalLM", 2, 8, (Neuron(1, index, 1.0),))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name, index in (("one", 1), ("two", 2), ("a+b", 3)):
        circuit(index).save(tmp_path / f"{name}.json")
    circuit(1).save(tmp_path / "again.json")
    (tmp_path / "dir").mkdir()
    circuit(4).save(tmp_path / "dir" / "four.json")
    (tmp_path / "dir" / "adapters.json").write_text(
        '\ufeff{"four-off": {"circuit": "four", "multiplier": 0}}', "utf-8"
    )
    monkeypatch.chdir(tmp_path)
    return tmp_path


def cna(*argv: str) -> dict[str, Any]:
    """The section that a server started so would have."""
    options, rest = serve._parser().split(["m", *argv])
    args = serve.server_args(rest)
    serve.add_to(args, serve.cna_section(options), options.adapter)
    section: dict[str, Any] = args.additional_config["cna"]
    return section


def given(**section: Any) -> str:
    return "--additional-config=" + json.dumps({"cna": section})


def yaml_file(folder: Path, name: str = "c.yaml", **settings: Any) -> str:
    (folder / name).write_text(json.dumps(settings))
    return f"--config={name}"


def names(section: dict[str, Any]) -> tuple[list[str], list[str]]:
    return sorted(section.get("circuits", {})), sorted(section.get("adapters", {}))


OFF = {"one-off": {"circuit": "one", "multiplier": 0}}


def test_a_configuration_is_kept_beside_flags(folder: Path) -> None:
    own = given(circuits={"one": "one.json"}, adapters=OFF, max_multiplier=7)
    assert names(cna(own)) == (["one"], ["one-off"])
    section = cna(own, "--circuit=two=two.json", "--adapter=two-off=two@0+one@1.5:all")
    assert names(section) == (["one", "two"], ["one-off", "two-off"])
    assert section["max_multiplier"] == 7
    assert names(cna(own, "--circuits=dir")) == (["four", "one"], ["four-off", "one-off"])
    dotted = ("--additional-config.cna.circuits.one=one.json", "--circuit=two=two.json")
    assert names(cna(*dotted)) == (["one", "two"], [])
    twice = (own, "--additional-config", '{"cna": {"circuits": {"two": "two.json"}}, "x": 1}')
    assert names(cna(*twice)) == (["one", "two"], ["one-off"])


def test_a_file_of_flags_may_hold_all_of_ours(folder: Path) -> None:
    config = yaml_file(
        folder,
        circuit={"one": "one.json"},
        adapter=["one-off=one@0"],
        max_circuits=5,
        circuit_dir="dir",
        **{"max-model-len": 512, "additional-config": {"cna": {"circuits": {"two": "two.json"}}}},
    )
    section = cna(config, "--circuit", "a+b=a+b.json", "--adapter=plus=a+b@0+one@2")
    assert names(section) == (["a+b", "one", "two"], ["one-off", "plus"])
    assert section["max_circuits"] == 5 and section["circuit_dir"] == str(folder / "dir")
    assert section["adapters"]["plus"]["circuit"] == ["a+b", "one"]
    same = ("--circuit=one=one.json", "--max-circuits", "5", "--circuit-dir=dir")
    assert names(cna(config, *same))[0] == ["one", "two"]
    more = (config, given(circuits={"three": "one.json"}))
    assert names(cna(*more))[0] == ["one", "three", "two"]


def test_every_option_of_a_command_may_stand_in_the_file(folder: Path) -> None:
    from cna_vllm.cli.generate import _parser

    config = yaml_file(
        folder, multiplier=[0, 1.5, -2], input="p.txt", output="o.jsonl", raw=True, overwrite=False,
        sampling={"logprobs": 2}, scope="all", stop=["a b", "--c"], samples=2, seed=3,
    )  # fmt: skip
    options, rest = _parser().split(["m", config, "--circuit", "one=one.json"])
    assert rest == ["m"]
    assert (options.multiplier, options.scope, options.samples) == ([0, 1.5, -2], "all", 2)
    assert (options.raw, options.overwrite, options.seed) == (True, False, 3)
    assert (options.sampling, options.stop) == ({"logprobs": 2}, ["a b", "--c"])


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        ([given(circuits={"one": "one.json"}), "--circuit=one=two.json"], "circuit 'one'"),
        ([given(circuits={"one": "one.json"}), given(circuits={"one": "two.json"})], "'one'"),
        (["--circuits=dir", "--circuit=four=one.json"], "--circuits dir says"),
        ([given(circuits={"one": "one.json"}, adapters=OFF), "--adapter=one-off=one@1"], "one-off"),
        (["--circuit=one=one.json", "--adapter=x=one@1", "--adapter=x=one@2"], "adapter 'x'"),
        ([given(max_circuits=4), "--max-circuits=5"], "max_circuits: additional_config says 4"),
        ([given(max_multiplier=4), "--max_multiplier", "5"], "max_multiplier"),
        ([given(circuit_dir="/x"), "--circuit-dir=dir"], "circuit_dir"),
        ([given(circuit="one.json")], "unknown key 'circuit'"),
        (["--additional-config", '{"cna": []}'], "must be an object"),
        ([given(circuits=["one.json"])], "cna.circuits must be an object"),
        ([given(circuits={f"c{i}": "one.json" for i in range(129)})], "raise max_circuits"),
        (["--adapter=x=one@0"], "no circuit is named 'one'"),
        (["--adapter=x=one"], "CIRCUIT@M"),
        (["--adapter=x"], "NAME=CIRCUIT@M"),
        (["--registry-dir=r"], "add --circuit-dir"),
        (["--enable-auto-tool-choice"], "requires --tool-call-parser"),
        (["--config", "none.yaml"], "none.yaml: cannot be read"),
        (["--config"], "name one file, once"),
        (["--config=a.yaml", "--config=b.yaml"], "name one file, once"),
        (["--config=one.json"], "must be a .yaml or .yml file"),
    ],
)
def test_what_contradicts_is_refused(
    folder: Path, argv: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["serve", "m", *argv]) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and says in told


def test_a_limit_may_be_raised_in_another_place(folder: Path) -> None:
    many = {f"c{i}": "one.json" for i in range(129)}
    assert len(cna(given(circuits=many), "--max-circuits=129")["circuits"]) == 129
    two = (given(vectors={"v": "v.safetensors"}), given(max_vectors=2))
    assert cna(*two) == {"vectors": {"v": "v.safetensors"}, "max_vectors": 2}


def test_what_agrees_is_taken(folder: Path) -> None:
    adapters = {"one-off": {"circuit": ["one"], "multiplier": [0.0], "scope": "last"}}
    own = given(circuits={"one": "one.json"}, adapters=adapters, max_circuits=4)
    section = cna(own, "--circuit=one=again.json", "--adapter=one-off=one@0", "--max-circuits=4")
    assert names(section) == (["one"], ["one-off"])


@pytest.mark.parametrize(
    ("settings", "argv", "says"),
    [
        ({"max-circuits": 4}, ["--max-circuits=5"], "--max-circuits=5: c.yaml has another value;"),
        ({"circuit": None}, [], "circuit needs a value"),
        ({"circuit_dir": True}, [], "circuit_dir needs a value"),
        ({"circuit": ["one=one.json"]}, ["--circuit=one=two.json"], "given twice"),
        ({"circut": ["one=one.json"]}, [], "--circut"),
    ],
)
def test_a_file_that_contradicts_is_refused(
    folder: Path,
    settings: dict[str, Any],
    argv: list[str],
    says: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["serve", "m", yaml_file(folder, **settings), *argv]) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and says in told


def test_other_commands_merge_alike(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = parse_engine_args("ab", ["m", given(circuits={"one": "one.json"}, max_vectors=1)])
    add_section(args, {"circuits": {"two": "two.json"}, "max_vectors": 2})
    section = args.additional_config["cna"]
    assert names(section)[0] == ["one", "two"] and section["max_vectors"] == 2
    assert "circuits one (one.json), two (two.json)" in capsys.readouterr().err
    with pytest.raises(ValueError, match="record"):
        add_section(parse_engine_args("discover", ["m", given(record=False)]), {"record": True})
    args = argparse.Namespace(additional_config={"other": 1})
    add_section(args, {"record": True})
    assert args.additional_config == {"other": 1, "cna": {"record": True}}
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("text", "pairs"),
    [
        ("a+b@0", (("a+b", 0.0),)),
        ("a+b@0+c@1:all", (("a+b", 0.0), ("c", 1.0))),
        ("c@1e+5+a+b@-2", (("c", 1e5), ("a+b", -2.0))),
        ("c@1+c@2", (("c", 1.0), ("c", 2.0))),
        ("d@1+e@2", (("d", 1.0), ("e", 2.0))),  # unknown names: every + begins a pair
    ],
)
def test_names_with_a_plus(text: str, pairs: tuple[tuple[str, float], ...]) -> None:
    assert parse_steering(text, ("c", "a+b", "b"))[0] == pairs
    assert parse_arm(f"x={text}", (), ("c", "a+b")).circuits == pairs


def test_a_form_of_two_readings_is_refused() -> None:
    with pytest.raises(SteeringError, match="can be read as"):
        parse_steering("a@0+b@1", ("a", "b", "a@0+b"))
