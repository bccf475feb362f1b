# SPDX-License-Identifier: Apache-2.0
"""`cna-vllm discover`: two sets of prompts in, a circuit file or one of CAA vectors out."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from cna_vllm.cli.options import OptionParser
from cna_vllm.cli.usage import UsageError, check_output, check_plot, number, positive_int, share
from cna_vllm.steering.circuit import Circuit
from cna_vllm.text.prompts import Prompt, read_prompts

if TYPE_CHECKING:
    from vllm import LLM

_LAYERS_FORM = "write layers as 4-29 or 0,3,8-11"
_PLOTTED = 10
_fraction = number(float, "above 0 and at most 1", lambda value: 0 < value <= 1)
_seed = number(int, "a whole number of at least 0", lambda value: 0 <= value < 10**18)
# Of the options: those that go with --vectors.
_FOR_VECTORS = {
    "vectors",
    "positive",
    "negative",
    "out",
    "overwrite",
    "column",
    "layers",
    "raw",
    "system",
}


def run(argv: list[str]) -> int:
    options, rest = _parser().split(argv)
    if options.vectors is not None:
        _check_vectors(options)
    check_output(options.out, options.overwrite)
    check_plot(options.plot, options.overwrite)
    if options.control is not None:
        check_output(options.control, options.overwrite)
        if Path(options.control).resolve() == Path(options.out).resolve():
            raise UsageError(f"--control {options.control}: is also --out; name another file")
    if options.raw and options.system is not None:
        raise UsageError("--system needs the chat template; drop it, or --raw")
    positive = read_prompts(options.positive, column=options.column)
    negative = read_prompts(options.negative, column=options.column)
    universal = options.universal
    if universal not in (None, "default", "none"):
        universal = read_prompts(universal)

    from cna_vllm.cli.engine_args import start_engine

    room = {} if options.vectors is None else {"max_vectors": 1}
    llm = start_engine("discover", rest, {"record": True, **room})
    if options.vectors is not None:
        return _vectors(llm, options, positive, negative)

    from cna_vllm.discovery import discover, random_control

    circuit = discover(
        llm,
        positive,
        negative,
        preset=options.preset,
        fraction=options.fraction,
        top_k=options.top_k,
        sign=options.sign,
        layers=options.layers,
        universal=universal,
        raw=options.raw,
        system=options.system,
        holdout=options.holdout,
        bootstrap=options.bootstrap,
        seed=options.seed,
        max_bytes=options.max_bytes,
    )
    circuit.save(options.out)
    if options.control is not None:
        random_control(circuit, options.seed).save(options.control)
    if options.plot:
        from cna_vllm.reading.plot import plot_circuit
        from cna_vllm.reading.profile import strongest

        plot_circuit(circuit, options.plot, strongest(circuit, _PLOTTED))
    print(circuit.summary(), *_report(circuit), sep="\n")
    return 0


def _check_vectors(options: argparse.Namespace) -> None:
    """Raises UsageError for options of circuits, and for what the form does not allow."""
    _parser().refuse_others(options, _FOR_VECTORS, "--vectors", "it is of circuits")
    if options.vectors == "residual" and (options.layers is None or len(options.layers) != 1):
        raise UsageError(
            "--vectors residual is of one layer; name it: --layers L, often one near the middle"
        )
    if Path(options.out).suffix.lower() != ".safetensors":
        raise UsageError(f"{options.out}: vectors are safetensors files; name it V.safetensors")


def _vectors(
    llm: LLM, options: argparse.Namespace, positive: Sequence[Prompt], negative: Sequence[Prompt]
) -> int:
    from cna_vllm.baselines import discover_vectors

    found = discover_vectors(
        llm,
        positive,
        negative,
        form=options.vectors,
        layers=options.layers,
        raw=options.raw,
        system=options.system,
    )
    found.save(options.out)
    print(found.summary())
    return 0


def _report(circuit: Circuit) -> list[str]:
    """Lines on what the method found besides the neurons."""
    lines = []
    if circuit.is_routed:
        lines.append(f"late    {_late(circuit)}")
    if found := circuit.method["universal"]:
        lines.append(
            f"filter  {found['found']} universal neurons, {found['kept_out']} of which would have "
            "been selected"
        )
    if found := circuit.method.get("holdout"):
        lines.append(
            f"holdout AUROC {found['auroc']:.3f} on {found['positive']} positive and "
            f"{found['negative']} negative prompts that selection did not see "
            f"(p = {found['p_value']:.2g})"
        )
    if found := circuit.method.get("bootstrap"):
        often = sum(share >= 0.5 for share in found["frequency"])
        lines.append(
            f"stable  mean Jaccard {found['mean_jaccard']:.3f} over {found['resamples']} "
            f"resamples; {often} of {len(circuit)} neurons in at least half of them"
        )
    return lines


def _late(circuit: Circuit) -> str:
    """How much of a circuit of routed experts is in the last layers, and in which expert most."""
    from cna_vllm.reading.profile import expert_counts

    late = circuit.method["routed"]["late"]
    parts = [
        f"{late[name]:.0%} of its {noun}"
        for name, noun in (("routed", "routed neurons"), ("others", "other neurons"))
        if late[name] is not None
    ]
    layer, expert, most = expert_counts(circuit)[0]
    return (
        f"{' and '.join(parts)} from layer {late['first_layer']} on; most in layer {layer}, expert "
        f"{expert}: {most / len(circuit):.0%} of the circuit"
    )


def _parser() -> OptionParser:
    parser = OptionParser(
        "discover",
        "Find the neurons whose activation differs most between two sets of prompts; or, with "
        "--vectors,\nthe mean differences of outputs (CAA), which circuits are compared with.",
        model="MODEL",
    )
    add = parser.add_argument
    add("--positive", required=True, metavar="FILE", help="show the behaviour")
    add("--negative", required=True, metavar="FILE", help="do not show it")
    add(
        "--out", required=True, metavar="C.json", help="file to write, V.safetensors with --vectors"
    )
    add(
        "--vectors",
        choices=("mlp", "residual"),
        help="write CAA vectors instead of a circuit: of the MLP outputs of --layers (default: "
        "all), or of the residual stream after the one layer of --layers",
    )
    add("--control", metavar="R.json", help="also write a random circuit of the same layer profile")
    add("--plot", metavar="P.png", help="also draw the layer profile and the strongest neurons")
    add("--overwrite", action="store_true", help="replace files that are there")
    add("--column", help="column of .csv files (default: prompt)")
    add(
        "--preset",
        choices=("paper", "reference"),
        default="paper",
        help="paper: 0.1%% of all neurons, universal ones excluded (default); reference: what the "
        "published code does, 200 neurons, none of layers 0 and 1, no exclusion",
    )
    size = parser.add_mutually_exclusive_group()
    size.add_argument(
        "--fraction", type=_fraction, help="share of all neurons (default: the preset's)"
    )
    size.add_argument("--top-k", type=positive_int, metavar="K", help="number of neurons instead")
    add(
        "--sign",
        choices=("both", "positive", "negative"),
        default="both",
        help="which activation differences count (default: both)",
    )
    add("--layers", type=_layers, help=f"only these layers; {_LAYERS_FORM}")
    add(
        "--universal",
        metavar="FILE|default|none",
        help="diverse prompts; neurons among the top 0.1%% in 80%% of them are excluded "
        "(default: the preset's)",
    )
    add("--system", metavar="TEXT", help="system message before every prompt")
    add("--raw", action="store_true", help="do not apply the chat template")
    add(
        "--holdout",
        type=share,
        default=0.0,
        metavar="SHARE",
        help="share of the prompts to keep apart and to report the AUROC on",
    )
    parser.add_count(
        "--bootstrap",
        "repeat the selection on N resamples of the prompts and report its stability",
        0,
    )
    parser.add_count(
        "--max-bytes", "limit of the activations kept for --bootstrap (default: 1 GiB)", 2**30
    )
    add(
        "--seed",
        type=_seed,
        default=0,
        help="of --control, --holdout and --bootstrap (default: 0)",
    )
    return parser


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
