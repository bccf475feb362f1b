# SPDX-License-Identifier: Apache-2.0
"""`cna-vllm inspect`: what a circuit is, as text, JSON or a picture; reads foreign formats too."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

from cna_vllm.cli.options import OptionParser
from cna_vllm.cli.usage import UsageError, check_output, check_plot
from cna_vllm.steering.circuit import Circuit, Neuron, shared_neurons

if TYPE_CHECKING:
    from cna_vllm.reading.vocabulary import Reading


def run(argv: list[str]) -> int:
    options = _parser().parse_args(argv)
    if options.top < 0:
        raise UsageError("--top must be at least 0")
    if options.save:
        check_output(options.save, options.overwrite)
    check_plot(options.plot, options.overwrite)
    circuit = _load(options.circuit, options.model)
    others = {path: _load(path, options.model) for path in options.beside}

    from cna_vllm.reading.compare import common_shape

    for other in others.values():
        common_shape(circuit, other)
    shared = {path: shared_neurons([circuit, other]) for path, other in others.items()}

    from cna_vllm.reading import report
    from cna_vllm.reading.profile import strongest

    neurons = strongest(circuit, options.top)
    # A conversion needs the model's configuration only, so it works without its weights.
    read = options.model is not None and not options.save and neurons
    readings = _read(options.model, neurons, options.tokens) if read else []
    if options.json:
        described = report.circuit_json(circuit, neurons, readings)
        print(json.dumps({**described, "shared": shared} if shared else described, indent=1))
    else:
        print(circuit.summary())
        for path, count in shared.items():
            print(report.shared_text(count, f"{path}, too"))
        print(f"\n{report.profile_text(circuit)}")
        if readings:
            print(f"\n{report.readings_text(readings)}\n{report.LENS}")
        elif neurons:
            print(f"\n{report.neurons_text(neurons)}")
    if options.save:
        circuit.save(options.save)
    if options.plot:
        from cna_vllm.reading.plot import plot_circuit

        plot_circuit(circuit, options.plot, neurons, readings)
    return 0


def _parser() -> OptionParser:
    parser = OptionParser("inspect", "Show what a circuit file holds.")
    add = parser.add_argument
    add("circuit", metavar="C.json")
    add("--top", type=int, default=10, metavar="N", help="strongest neurons shown")
    add(
        "--model",
        help="the circuit's model, a folder, a hub id or smollm2: shows the vocabulary items that "
        "the neurons promote and suppress; names the model of a file of another format",
    )
    parser.add_count("--tokens", "vocabulary items shown with --model, each way (default: 5)", 5)
    parser.add_list(
        "--with",
        "D.json",
        "say how many neurons are in this circuit, too: together they get the product of the "
        "multipliers; may be repeated",
        dest="beside",
    )
    add("--json", action="store_true", help="write JSON instead of text")
    add("--plot", metavar="P.png", help="draw layer profile and strongest neurons")
    add(
        "--save",
        metavar="OUT.json",
        help="write the circuit in our own format; of --model, only the configuration is read then",
    )
    add("--overwrite", action="store_true", help="replace OUT.json and P.png")
    return parser


def _load(path: str, model: str | None) -> Circuit:
    if model is None:
        return Circuit.load(path)
    from cna_vllm.checkpoints.models import model_dimensions

    return Circuit.load(path, **model_dimensions(model))


def _read(model: str, neurons: Sequence[Neuron], count: int) -> list[Reading]:
    from cna_vllm.checkpoints.checkpoint import open_checkpoint
    from cna_vllm.checkpoints.models import resolve_model
    from cna_vllm.reading.vocabulary import load_tokenizer, read_neurons

    folder = resolve_model(model)
    return read_neurons(open_checkpoint(folder), load_tokenizer(folder), neurons, count)
