# SPDX-License-Identifier: Apache-2.0
"""`cna-vllm discover`: two sets of prompts in, a circuit file out."""

from __future__ import annotations

import argparse

from cna_vllm.cli.options import OptionParser, check_output, positive_int
from cna_vllm.prompts import read_prompts

_LAYERS_FORM = "write layers as 4-29 or 0,3,8-11"


def run(argv: list[str]) -> int:
    options, rest = _parser().split(argv)
    check_output(options.out, options.overwrite)
    positive = read_prompts(options.positive, column=options.column)
    negative = read_prompts(options.negative, column=options.column)

    from cna_vllm.cli.engine_args import start_engine

    llm = start_engine("discover", rest, {"record": True})

    from cna_vllm.discovery import discover

    circuit = discover(
        llm,
        positive,
        negative,
        fraction=options.fraction,
        top_k=options.top_k,
        sign=options.sign,
        layers=options.layers,
        raw=options.raw,
    )
    circuit.save(options.out)
    print(circuit.summary())
    return 0


def _parser() -> OptionParser:
    parser = OptionParser(
        "discover",
        "Find the neurons whose activation differs most between two sets of prompts.",
        model="MODEL",
    )
    parser.add_argument("--positive", required=True, metavar="FILE", help="show the behaviour")
    parser.add_argument("--negative", required=True, metavar="FILE", help="do not show it")
    parser.add_argument("--out", required=True, metavar="C.json", help="circuit file to write")
    parser.add_argument("--overwrite", action="store_true", help="replace C.json")
    parser.add_argument("--column", help="column of .csv files (default: prompt)")
    size = parser.add_mutually_exclusive_group()
    size.add_argument(
        "--fraction", type=_fraction, default=0.001, help="share of all neurons (default: 0.001)"
    )
    size.add_argument("--top-k", type=positive_int, metavar="K", help="number of neurons instead")
    parser.add_argument(
        "--sign",
        choices=("both", "positive", "negative"),
        default="both",
        help="which activation differences count (default: both)",
    )
    parser.add_argument("--layers", type=_layers, help=f"only these layers; {_LAYERS_FORM}")
    parser.add_argument("--raw", action="store_true", help="do not apply the chat template")
    return parser


def _fraction(text: str) -> float:
    try:
        if 0 < (value := float(text)) <= 1:
            return value
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"{text!r} is not above 0 and at most 1")


def _layers(text: str) -> list[int]:
    layers: set[int] = set()
    for part in text.split(","):
        first, _, last = part.partition("-")
        if not first.isdecimal() or not (last or first).isdecimal() or len(part) > 12:
            raise argparse.ArgumentTypeError(f"{text!r}: {_LAYERS_FORM}")
        span = range(int(first), int(last or first) + 1)
        if not 1 <= len(span) <= 4096:
            raise argparse.ArgumentTypeError(f"{text!r}: {_LAYERS_FORM}")
        layers.update(span)
    return sorted(layers)
