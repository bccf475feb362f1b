# SPDX-License-Identifier: Apache-2.0
"""Files as other programs write them: byte order marks, Unicode's line ends, several positions."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from cna_vllm import Circuit, CircuitError, Neuron
from cna_vllm.batch.reading import read_batch
from cna_vllm.evaluation.config import read_config
from cna_vllm.evaluation.metrics.refusal_keywords import _read
from cna_vllm.serving.front.store import RegistryStore
from cna_vllm.steering.circuit import shared_neurons
from cna_vllm.text.prompts import read_prompts

BOM = "\ufeff"
MODEL = {"model": "m", "architecture": "A", "num_layers": 4, "intermediate_size": 16}
CIRCUIT = Circuit("m", "A", 4, 16, (Neuron(1, 2, -1.5), Neuron(3, 4, 2.0)))
# What Python calls a line's end and csv, JSON and people do not.
ENDS = "\u2028\u2029\x85\x0b\x0c\x1c\x1d\x1e"


def test_a_byte_order_mark_is_no_part_of_any_file(tmp_path: Path) -> None:
    def write(name: str, text: str) -> Path:
        path = tmp_path / name
        path.write_text(BOM + text, "utf-8")
        return path

    assert Circuit.load(write("c.json", json.dumps(CIRCUIT.to_dict()))) == CIRCUIT
    assert Circuit.load(write("p.json", '{"1": [2]}'), **MODEL).by_layer() == {1: (2,)}
    for name, text in (("p.txt", "a"), ("p.csv", "prompt\na"), ("p.jsonl", '{"prompt": "a"}')):
        path = write(name, text)
        assert [prompt.text for prompt in read_prompts(path)] == ["a"]
        assert [prompt.text for prompt in read_batch(path)] == ["a"]
    assert read_config(write("ab.yaml", "metrics: [length]")) == {"metrics": ["length"]}
    assert _read(str(write("k.txt", "i cannot"))) == ("i cannot",)
    registry = {"format": "cna-registry", "version": 1, "circuits": {}, "adapters": {}}
    write("registry.json", json.dumps(registry))
    assert RegistryStore(tmp_path).read() == {}


@pytest.mark.parametrize("newline", ["\n", "\r\n", "\r"])
def test_csv_is_read_as_pythons_csv_reads_the_open_file(tmp_path: Path, newline: str) -> None:
    prompts = [f"one{end}two" for end in ENDS] + ["a\nb", "a\r\nb", 'quo"te', " x "]
    path = tmp_path / "p.csv"
    with open(path, "w", encoding="utf-8", newline="") as file:
        rows = csv.writer(file, lineterminator=newline, quoting=csv.QUOTE_ALL)
        rows.writerow(["id", "prompt"])
        rows.writerows((f"r{i}", prompt) for i, prompt in enumerate(prompts))
    with open(path, encoding="utf-8", newline="") as file:
        expected = [(row["id"], row["prompt"]) for row in csv.DictReader(file)]
    assert [text for _, text in expected] == prompts
    kept = [(name, text) for name, text in expected if text.strip()]
    assert [(row.id, row.text) for row in read_batch(path) if row.text] == kept
    assert [prompt.text for prompt in read_prompts(path)] == [text for _, text in kept]


def test_other_lines_end_where_people_end_them(tmp_path: Path) -> None:
    path = tmp_path / "k.txt"
    path.write_text(f"I can{ENDS}not\r\n\nno way\n", "utf-8")
    assert _read(str(path)) == (f"i can{ENDS}not", "no way")


def test_a_neuron_at_several_positions() -> None:
    """The reference implementation keeps an entry for each (layer, position, neuron)."""
    entries = {"1,-1,2": 1.0, "1,-2,2": -9.0, "1,-3,2": 4.0}  # the last prompt token's
    entries |= {"2,-2,3": 1.0, "2,-3,3": -9.0}  # without it, the largest
    entries |= {"3,5,4": 2.0, "3,7,4": -2.0}  # of equal ones, the last
    entries |= {"0,-1,1": 0.5}
    circuit = Circuit.from_dict({"neurons": entries}, **MODEL)
    assert circuit.neurons == (
        Neuron(0, 1, 0.5),
        Neuron(1, 2, 1.0),
        Neuron(2, 3, -9.0),
        Neuron(3, 4, -2.0),
    )
    assert circuit.notes[1:] == (
        "positions other than -1 ignored: [-3, -2, 5, 7]",
        "3 neurons have entries at several positions: the delta is that at -1, else the largest "
        "in magnitude",
    )
    with pytest.raises(CircuitError, match="is there twice"):
        Circuit.from_dict({"neurons": {"1,-1,2": 1.0, "1, -1,2": 2.0}}, **MODEL)
    with pytest.raises(CircuitError, match="finite number"):
        Circuit.from_dict({"neurons": {"1,-1,2": "x", "1,-2,2": 2.0}}, **MODEL)


def test_neurons_that_several_circuits_share() -> None:
    other = Circuit("m", "A", 4, 16, (Neuron(1, 2, 7.0), Neuron(0, 0)))
    assert shared_neurons([CIRCUIT]) == shared_neurons([]) == 0
    assert shared_neurons([CIRCUIT, other]) == 1
    assert shared_neurons([CIRCUIT, CIRCUIT, other]) == 2
