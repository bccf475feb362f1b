# SPDX-License-Identifier: Apache-2.0
"""Pictures of easy and of awkward circuits: drawn without a warning, so without a missing glyph."""

from __future__ import annotations

import random
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
from matplotlib.image import imread

from cna_vllm import Circuit, Neuron
from cna_vllm.reading.compare import compare
from cna_vllm.reading.glyphs import drawable
from cna_vllm.reading.plot import MAX_NEURONS, plot_circuit, plot_comparison
from cna_vllm.reading.profile import strongest
from cna_vllm.reading.vocabulary import Item, Reading

AWKWARD = (
    "$x$ $",
    " ",
    "\n\t",
    "中文字符",
    "\u200b",
    "-" * 64,
    "\u0627",
    "\U0001f600",
    "{_^}%",
    "",
)


@pytest.fixture(autouse=True)
def no_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def spread(layers: int, count: int, model: str = "org/model", seed: int = 0) -> Circuit:
    """Most neurons late, of both signs."""
    rng = random.Random(seed)
    places = {(int(layers * rng.random() ** 0.2), rng.randrange(500)) for _ in range(count)}
    neurons = tuple(Neuron(*place, rng.gauss(0, 5)) for place in sorted(places))
    return Circuit(model, "LlamaForCausalLM", layers, 500, neurons)


def routed(layers: int, count: int) -> Circuit:
    """Neurons of shared and of routed experts, none in the first layer."""
    rng = random.Random(0)
    widths, experts = [8] * layers, {"count": 64, "intermediate_size": 8}
    neurons = {
        Neuron(rng.randrange(1, layers), rng.randrange(8), rng.gauss(0, 5), expert)
        for expert in (None, *(int(64 * rng.random() ** 3) for _ in range(count)))
    }
    unique = {neuron.place: neuron for neuron in neurons}
    return Circuit("org/moe", "X", layers, widths, [*unique.values()], experts=experts)


CIRCUITS = {
    "many layers": spread(80, 3000),
    "few layers": spread(4, 30),
    "one neuron": Circuit("m", "X", 32, 9, (Neuron(31, 8, -0.001),)),
    "one layer of one": Circuit("m", "X", 1, 9, (Neuron(0, 8, 2.0),)),
    "no deltas": Circuit("m", "X", 8, 9, tuple(Neuron(7, i) for i in range(9))),
    "huge deltas": Circuit("m", "X", 8, 9, (Neuron(7, 1, 1e30), Neuron(7, 2, -1e-30))),
    "long name": spread(30, 40, "organisation/" + "a-very-long-name-" * 12),
    "experts": routed(48, 400),
    "one expert": routed(2, 1),
    "odd name": spread(30, 40, "$模型$ _{x}^2"),
}


def size(path: Path) -> tuple[int, int]:
    height, width, _ = imread(path).shape
    return width, height


@pytest.mark.parametrize("name", CIRCUITS)
@pytest.mark.parametrize("read", [False, True])
def test_circuits(name: str, read: bool, tmp_path: Path) -> None:
    circuit = CIRCUITS[name]
    neurons = strongest(circuit, 12)
    items = tuple(Item(i, text, 1.0 - i) for i, text in enumerate(AWKWARD))
    readings = [Reading(neuron, items, items[::-1]) for neuron in neurons] if read else []
    plot_circuit(circuit, tmp_path / "p.png", neurons, readings)
    assert size(tmp_path / "p.png")[0] == 1500


def test_no_neurons_and_too_many(tmp_path: Path) -> None:
    circuit = CIRCUITS["many layers"]
    heights = []
    for count in (0, MAX_NEURONS, 10 * MAX_NEURONS):
        plot_circuit(circuit, tmp_path / "p.png", strongest(circuit, count))
        heights.append(size(tmp_path / "p.png")[1])
    assert heights[0] < heights[1] == heights[2]


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (spread(80, 3000), spread(80, 2500, "org/instruct", 1)),
        (spread(16, 40), spread(16, 40, "$模型$", 1)),
        (CIRCUITS["one neuron"], CIRCUITS["one neuron"]),
        (CIRCUITS["one layer of one"], CIRCUITS["one layer of one"]),
        (CIRCUITS["no deltas"], CIRCUITS["no deltas"]),
        (CIRCUITS["one neuron"], Circuit("n", "X", 32, 9, (Neuron(0, 1, 1.0),))),
        (CIRCUITS["long name"], CIRCUITS["long name"]),
        (CIRCUITS["experts"], CIRCUITS["experts"]),
    ],
)
def test_comparisons(first: Circuit, second: Circuit, tmp_path: Path) -> None:
    plot_comparison(compare(first, second), tmp_path / "p.png")
    assert size(tmp_path / "p.png")[0] == 1500


def test_characters_without_a_glyph_are_spelled_out() -> None:
    assert drawable("plain ␣text…") == "plain ␣text…"
    assert drawable("\U0010ffff\ufdd0") == "\\U0010ffff\\ufdd0"


def test_an_unwritable_place_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(OSError):
        plot_circuit(CIRCUITS["few layers"], tmp_path / "no" / "p.png", [])
    assert list(tmp_path.iterdir()) == []
