# SPDX-License-Identifier: Apache-2.0
"""The command line: bad input is one line on stderr and status 2, before any engine starts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import cna_vllm
from cna_vllm import Circuit, Neuron
from cna_vllm.cli import COMMANDS, main
from cna_vllm.cli.engine_args import parse_engine_args
from cna_vllm.cli.usage import UsageError


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a circuit, prompts, and an output that is already there."""
    Circuit("org/tiny", "LlamaForCausalLM", 2, 8, (Neuron(1, 3, -2.0), Neuron(1, 7, 4.5))).save(
        tmp_path / "c.json"
    )
    (tmp_path / "p.txt").write_text("a\nb\n")
    (tmp_path / "there.json").write_text("{}")
    (tmp_path / "there.safetensors").write_text("")
    (tmp_path / "empty.txt").write_text("\n \n")
    (tmp_path / "bad.json").write_text('{"format": "cna-circuit"}')
    (tmp_path / "foreign.json").write_text('{"1": [3, 7]}')
    monkeypatch.chdir(tmp_path)
    return tmp_path


GENERATE = "generate m --circuit f=c.json --multiplier 0 --input p.txt --output o.jsonl"
DISCOVER = "discover m --positive p.txt --negative p.txt --out o.json"
VECTORS = "discover m --positive p.txt --negative p.txt --out o.safetensors --vectors mlp"


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("dance", "unknown command 'dance'"),
        ("inspect", "required: C.json"),
        ("inspect none.json", "none.json: cannot be read"),
        ("inspect bad.json", "bad.json: 'version'"),
        ("inspect foreign.json", "foreign.json: does not say which model"),
        ("inspect c.json --save there.json", "there.json: exists"),
        ("inspect c.json --colour", "unrecognized arguments: --colour"),
        ("inspect c.json --top x", "--top"),
        ("generate m", "required: --input, --output"),
        (f"{GENERATE} --circuit c.json", "write it as NAME=C.json"),
        (f"{GENERATE} --circuit f=c.json", "given twice"),
        (f"{GENERATE} --circuit g=bad.json", "bad.json: 'version'"),
        (f"{GENERATE} --circuit g=none.json", "none.json: cannot be read"),
        (f"{GENERATE} --multiplier x", "invalid float value: 'x'"),
        (f"{GENERATE} --multiplier nan", "cna_multiplier: must be finite"),
        (f"{GENERATE} --multiplier=-inf", "cna_multiplier: must be finite"),
        (f"{GENERATE} --multiplier 1e40", "over the limit"),
        (f"{GENERATE} --scope first", "invalid choice: 'first'"),
        (f"{GENERATE} --input none.txt", "none.txt: cannot be read"),
        (f"{GENERATE} --input c.json", "c.json: unknown kind of file"),
        (f"{GENERATE} --column q", "a column can be named"),
        (f"{GENERATE} --output there.json", "there.json: exists"),
        (f"{GENERATE} --output no/such/o.jsonl", "does not exist"),
        (f"{GENERATE} --output . --overwrite", "is a folder"),
        (f"{GENERATE} --max_tokens 0", "--max-tokens"),
        (f"{GENERATE} --temperature -1", "--temperature"),
        ("discover m", "required: --positive, --negative, --out"),
        (f"{DISCOVER} --positive none.txt", "none.txt: cannot be read"),
        (f"{DISCOVER} --out there.json", "there.json: exists"),
        (f"{DISCOVER} --fraction 0", "--fraction"),
        (f"{DISCOVER} --fraction 1.5", "--fraction"),
        (f"{DISCOVER} --fraction nan", "--fraction"),
        (f"{DISCOVER} --top-k 0", "--top-k"),
        (f"{DISCOVER} --top-k 5 --fraction 0.1", "not allowed with"),
        (f"{DISCOVER} --sign up", "invalid choice: 'up'"),
        (f"{DISCOVER} --layers 5-2", "--layers"),
        (f"{DISCOVER} --layers x", "--layers"),
        (f"{DISCOVER} --layers 0-99999999999", "--layers"),
        (f"{DISCOVER} --preset mine", "invalid choice: 'mine'"),
        (f"{DISCOVER} --universal none.txt", "none.txt: cannot be read"),
        (f"{DISCOVER} --holdout 1", "--holdout"),
        (f"{DISCOVER} --bootstrap 0", "--bootstrap"),
        (f"{DISCOVER} --seed -1", "--seed"),
        (f"{DISCOVER} --raw --system x", "--system needs the chat template"),
        (f"{DISCOVER} --control there.json", "there.json: exists"),
        (f"{DISCOVER} --control o.json", "is also --out"),
        (f"{DISCOVER} --positive empty.txt", "empty.txt: holds no prompt"),
        (f"{DISCOVER} --vectors attention", "invalid choice: 'attention'"),
        (f"{DISCOVER} --vectors mlp", "o.json: vectors are safetensors files; name it V.safe"),
        (f"{VECTORS} --top-k 5", "--vectors takes no --top-k; it is of circuits"),
        (f"{VECTORS} --control r.json", "--vectors takes no --control"),
        (f"{VECTORS} --universal none", "--vectors takes no --universal"),
        (f"{VECTORS} --plot p.png", "--vectors takes no --plot"),
        (f"{VECTORS} --raw --system x", "--system needs the chat template"),
        (f"{VECTORS} --vectors residual", "is of one layer; name it: --layers L"),
        (f"{VECTORS} --vectors residual --layers 1,2", "is of one layer"),
        (f"{VECTORS} --out there.safetensors", "there.safetensors: exists"),
    ],
)
def test_bad_input_is_one_line_and_status_2(
    folder: Path, capsys: pytest.CaptureFixture[str], line: str, says: str
) -> None:
    before = sorted(folder.iterdir())
    assert main(line.split()) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("cna-vllm: error: ")
    assert captured.err.count("\n") == 1
    assert says in captured.err
    assert sorted(folder.iterdir()) == before


def test_help_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"cna-vllm {cna_vllm.__version__}\n"
    assert main(["--help"]) == 0
    printed = capsys.readouterr().out
    assert all(f"  {command} " in printed for command in COMMANDS)
    assert main([]) == 2


def test_inspect(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", "c.json", "--top", "1"]) == 0
    printed = capsys.readouterr().out
    assert Circuit.load("c.json").digest in printed
    assert "    0      0\n    1      2  ###" in printed
    assert "    1      7        +4.5" in printed and "-2" not in printed


def test_inspect_saves_a_foreign_file_in_our_format(folder: Path) -> None:
    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "num_hidden_layers": 2,
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_attention_heads": 1,
    }
    (folder / "model").mkdir()
    (folder / "model" / "config.json").write_text(json.dumps(config))
    assert main(["inspect", "foreign.json", "--model", "model", "--save", "own.json"]) == 0
    assert Circuit.load("own.json").by_layer() == {1: (3, 7)}
    assert Circuit.load("own.json").model == "model"


@pytest.mark.parametrize(
    ("rest", "says"),
    [
        ([], "name a model"),
        (["m", "--no-such-flag"], "--no-such-flag"),
        (["m", "--max-model-len", "x"], "--max-model-len"),
        (["m", "--dtype", "float3"], "--dtype"),
        (["m", "another"], "another"),
    ],
)
def test_bad_engine_flags(rest: list[str], says: str) -> None:
    with pytest.raises(UsageError) as refused:
        parse_engine_args("generate", rest)
    assert says in str(refused.value)


def test_engine_flags_are_vllms_own() -> None:
    argv = ["--dtype", "float32", "m", "--max_model_len", "1k", "--tensor-parallel-size=2"]
    args = parse_engine_args("generate", [*argv, "--additional-config", '{"x": 1}'])
    assert (args.model, args.dtype, args.max_model_len) == ("m", "float32", 1000)
    assert (args.tensor_parallel_size, args.additional_config) == (2, {"x": 1})
    assert parse_engine_args("generate", ["m", "--no-enforce-eager"]).enforce_eager is False
