# SPDX-License-Identifier: Apache-2.0
"""`cna-vllm inspect`: what a circuit file holds, as text; also reads the foreign formats."""

from __future__ import annotations

from cna_vllm.circuit import Circuit
from cna_vllm.cli.options import OptionParser, check_output

_BAR_WIDTH = 40


def run(argv: list[str]) -> int:
    parser = OptionParser("inspect", "Show what a circuit file holds.")
    parser.add_argument("circuit", metavar="C.json")
    parser.add_argument("--top", type=int, default=10, metavar="N", help="strongest neurons shown")
    parser.add_argument(
        "--model", help="the model a file of another format is of: a folder, a hub id or smollm2"
    )
    parser.add_argument("--save", metavar="OUT.json", help="write the circuit in our own format")
    parser.add_argument("--overwrite", action="store_true", help="replace OUT.json")
    options = parser.parse_args(argv)
    if options.save:
        check_output(options.save, options.overwrite)
    circuit = _load(options.circuit, options.model)
    print(circuit.summary())
    print(f"\n{_profile(circuit)}")
    if options.top > 0:
        print(f"\n{_strongest(circuit, options.top)}")
    if options.save:
        circuit.save(options.save)
    return 0


def _load(path: str, model: str | None) -> Circuit:
    if model is None:
        return Circuit.load(path)
    from cna_vllm.models import model_dimensions

    return Circuit.load(path, **model_dimensions(model))


def _profile(circuit: Circuit) -> str:
    layers = circuit.by_layer()
    most = max(map(len, layers.values()))
    lines = ["neurons by layer"]
    for layer in range(circuit.num_layers):
        count = len(layers.get(layer, ()))
        bar = "#" * -(-count * _BAR_WIDTH // most)
        lines.append(f"{layer:5} {count:6}  {bar}".rstrip())
    return "\n".join(lines)


def _strongest(circuit: Circuit, top: int) -> str:
    strongest = sorted(circuit.neurons, key=lambda n: (-abs(n.delta), n.layer, n.index))[:top]
    lines = [f"strongest {len(strongest)}", "layer  index       delta"]
    lines += [f"{n.layer:5} {n.index:6} {n.delta:+11.4g}" for n in strongest]
    return "\n".join(lines)
