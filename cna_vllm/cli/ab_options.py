# SPDX-License-Identifier: Apache-2.0
"""Options of `cna-vllm ab`, and what they and a configuration file ask for together."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

from cna_vllm.cli.batch_run import add_batch_options, sampling_fields, swept_arms
from cna_vllm.cli.options import OptionParser
from cna_vllm.cli.usage import UsageError, check_known, located, named_files, share
from cna_vllm.steering.arms import Arm, parse_arm
from cna_vllm.steering.circuit import Circuit
from cna_vllm.steering.content import show
from cna_vllm.steering.request import DEFAULT_SCOPE, SCOPES

_DESCRIPTION = """\
Answer the same prompts in several arms, with the same seeds, score the answers, and compare every
arm with the control arm. DIR then holds answers.jsonl, ab.json and report.html; after any
interruption the same command goes on from there.

  cna-vllm ab MODEL --circuit refusal=refusal.json --multiplier 0 1 2 --scope last all \\
      --prompts harmful.txt:harmful --prompts benign.txt:benign \\
      --metric refusal --metric false_refusal --metric quality --out DIR
  cna-vllm ab MODEL --config ab.yaml --out DIR
  cna-vllm ab --from DIR [--metric length] [--control ARM]"""


def parser() -> OptionParser:
    """None, or an empty list, is what an option has that is not given."""
    made = OptionParser("ab", _DESCRIPTION, model="MODEL")
    add = made.add_argument
    add_batch_options(made)
    made.add_list(
        "--vector",
        "NAME=FILE",
        "what an --arm may name, too; the number is then its coefficient; may be repeated",
    )
    add(
        "--scope",
        nargs="+",
        choices=SCOPES,
        default=[],
        help=f"of the arms of --multiplier (default: {DEFAULT_SCOPE})",
    )
    made.add_list(
        "--prompts",
        "FILE[:TAG]",
        "a prompt set; tags benign and harmful have a meaning to the metrics of refusal",
    )
    made.add_list(
        "--metric",
        "NAME[:KEY=VALUE,...]",
        "refusal, false_refusal, quality, length, perplexity, ...; may be repeated",
    )
    made.add_list(
        "--effect",
        "METRIC=X",
        "a difference one wants to find: adds the number of prompts that it needs",
        type=_effect,
    )
    add("--control", metavar="ARM", help="what the others are compared with (default: plain)")
    add("--confidence", type=share, metavar="C", help="of intervals (default: 0.95)")
    add("--config", metavar="FILE.yaml", help="all of this in a file; flags replace its keys")
    add("--out", metavar="DIR", help="working folder; made if it is not there")
    add("--restart", action="store_true", help="discard what an earlier test left in DIR")
    add("--from", dest="saved", metavar="DIR", help="compare and draw again; needs no engine")
    made.add_count("--transcripts", "prompts whose answers are in the report (default: 300)", 300)
    made.set_defaults(samples=None)
    return made


def flags(options: argparse.Namespace) -> dict[str, Any]:
    """What the command line says, under the keys of a configuration file."""
    from cna_vllm.evaluation.config import PromptFile

    said = {
        "circuits": named_files("--circuit", options.circuit, "FILE"),
        "vectors": named_files("--vector", options.vector, "FILE"),
        "arms": options.arm,
        "multipliers": options.multiplier,
        "scopes": options.scope,
        "prompts": [PromptFile.parse(text, options.column) for text in options.prompts],
        "metrics": options.metric,
        "effects": dict(options.effect),
        "control": options.control,
        "confidence": options.confidence,
        "samples": options.samples,
        "seed": options.seed,
        "raw": options.raw or None,
    }
    return {key: value for key, value in said.items() if value not in (None, [], {})}


def steering_of(given: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, dict[str, str]]]:
    """Our section of the engine's configuration, and each file with its digest by name."""
    from cna_vllm.steering.vectors import VectorSet

    circuits = located(Circuit.load, given.get("circuits", {}))
    vectors = located(VectorSet.load, given.get("vectors", {}))
    for name in vectors:
        if name in circuits:
            raise UsageError(f"--vector: {show(name)} is also a circuit; rename one of them")
    section: dict[str, Any] = {}
    if circuits:
        section["circuits"] = {name: file for name, (file, _) in circuits.items()}
    if vectors:
        section["vectors"] = {name: file for name, (file, _) in vectors.items()}
        section["max_vectors"] = len(vectors)
    return section, {
        name: {"file": file, "digest": digest}
        for name, (file, digest) in {**circuits, **vectors}.items()
    }


def arms_of(given: Mapping[str, Any]) -> list[Arm]:
    """Every circuit at every multiplier and scope, then those named; plain first, if not there.

    A multiplier of 1 stands for the plain arm. With a control of another name, plain is an arm
    only where it is asked for.
    """
    circuits, vectors = given.get("circuits", {}), given.get("vectors", {})
    multipliers = given.get("multipliers", [])
    arms = swept_arms(circuits, multipliers, given.get("scopes", [DEFAULT_SCOPE]))
    arms = [arm for arm in arms if arm.dose != 1]
    arms += [parse_arm(text, vectors, circuits) for text in given.get("arms", [])]
    if not arms:
        raise UsageError("name arms: --circuit with --multiplier, or --arm NAME=CIRCUIT@M[:SCOPE]")
    for arm in arms:
        names = (name for name, _ in arm.circuits)  # what is no vector's is taken as a circuit's
        check_known(f"--arm {arm.name}", names, circuits, "--circuit or --vector {}=FILE")
    plain_wanted = given.get("control", "plain") == "plain" or 1 in multipliers
    if plain_wanted and all(arm.extra_args() for arm in arms):
        arms.insert(0, Arm("plain"))
    return arms


def sampling_of(options: argparse.Namespace, given: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of the configuration, those of the command line in their place; without the seed."""
    configured = {
        name: value
        for name, value in given.get("sampling", {}).items()
        if getattr(options, name, None) is None
    }
    for name in ("n", "seed"):
        if name in configured or name in options.sampling:
            key = "samples" if name == "n" else "seed"
            raise UsageError(f"sampling: {name!r} is the run's; write {key}: N, or --{key} N")
    options.sampling = {**configured, **options.sampling}
    fields = sampling_fields(options)
    fields.pop("seed", None)
    return fields


def _effect(text: str) -> tuple[str, float]:
    name, _, value = text.rpartition("=")
    try:
        if name:
            return name, float(value)
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"{text!r} is not METRIC=X, with a number X")
