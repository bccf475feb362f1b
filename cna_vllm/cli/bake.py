# SPDX-License-Identifier: Apache-2.0
"""`cna-vllm bake`: a checkpoint with a circuit in effect, for engines without the plugin."""

from __future__ import annotations

from cna_vllm.cli.options import OptionParser
from cna_vllm.steering.circuit import Circuit

_DESCRIPTION = """\
Write a checkpoint whose down_proj columns are scaled: scope `all` steering of every request, in
any engine. Files that hold no neuron of the circuit are linked to MODEL where possible."""


def run(argv: list[str]) -> int:
    parser = OptionParser("bake", _DESCRIPTION)
    parser.add_argument("model", metavar="MODEL", help="a folder, a hub id or smollm2")
    parser.add_argument("circuit", metavar="C.json")
    parser.add_argument(
        "--multiplier",
        type=float,
        required=True,
        metavar="M",
        help="0 ablates, 1 is the plain model, above 1 amplifies",
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="folder to make")
    options = parser.parse_args(argv)
    circuit = Circuit.load(options.circuit)

    from cna_vllm.checkpoints.bake import bake

    baked = bake(options.model, circuit, options.multiplier, options.out)
    print(
        f"{options.out}: {len(circuit)} neurons at m = {options.multiplier:g}; tensors rewritten: "
        f"{len(baked.record['tensors'])}, in files: {len(baked.rewritten)}, other files kept: "
        f"{len(baked.kept)}"
    )
    if left_out := baked.record["left_out"]:
        print(f"left out, other weights than {options.model} uses: {', '.join(left_out)}")
    return 0
