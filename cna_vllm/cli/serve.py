# SPDX-License-Identifier: Apache-2.0
"""`cna-vllm serve`: vLLM's own OpenAI server, with circuits and adapters."""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cna_vllm.checkpoints.models import resolve_model
from cna_vllm.cli.options import OptionParser
from cna_vllm.cli.section import loaded, merge, section_of, with_section
from cna_vllm.cli.usage import UsageError, check_known, located, named_files, say
from cna_vllm.files import FileError, read_json
from cna_vllm.serving.config import CONFIG_KEY
from cna_vllm.serving.front.adapter import Adapter
from cna_vllm.serving.front.store import RegistryStore
from cna_vllm.serving.seams.command_line import (
    check_server_args,
    make_server_arg_parser,
    serve,
)
from cna_vllm.steering.circuit import Circuit
from cna_vllm.steering.content import show
from cna_vllm.steering.request import SteeringError

ADAPTERS_FILE = "adapters.json"
_MAX_ADAPTERS_BYTES = 2**24
_NAMED = ("circuit", "circuits", "adapter")  # of our flags; the others are settings


def run(argv: list[str]) -> int:
    options, rest = _parser().split(argv)
    section = cna_section(options)
    args = server_args(rest)
    add_to(args, section, options.adapter)
    cna = args.additional_config[CONFIG_KEY]

    try:
        check_server_args(args)
    except TypeError as error:  # what vLLM raises for flags that do not go together
        raise UsageError(str(error)) from error
    if (registry_dir := cna.get("registry_dir")) is not None:
        RegistryStore(registry_dir).claim()
    os.environ["VLLM_PLUGINS"] = plugins_with_ours(os.environ.get("VLLM_PLUGINS"))
    say(f"cna-vllm: {loaded(cna)}")
    try:
        serve(args)
    except KeyboardInterrupt:  # vLLM's word for SIGTERM; what there is to say follows
        raise KeyboardInterrupt from None
    return 0


def cna_section(options: argparse.Namespace) -> dict[str, Any]:
    """What our flags say, but for --adapter; all files are read, so that mistakes are told at once:
    raises UsageError, CircuitError, SteeringError with the flag or the file."""
    circuits = located(Circuit.load, named_files("--circuit", options.circuit))
    section: dict[str, Any] = {}
    if circuits:
        section["circuits"] = {name: path for name, (path, _) in circuits.items()}
    if options.circuits is not None:
        section = merge(_folder(Path(options.circuits)), section, f"--circuits {options.circuits}")
    for argument in options.adapter:
        if not all(_named(argument)):
            raise UsageError(f"--adapter {argument!r}: write it as NAME=CIRCUIT@M[:SCOPE]")
    if options.circuit_dir is not None and not Path(options.circuit_dir).is_dir():
        raise UsageError(f"--circuit-dir {options.circuit_dir}: is not a folder")
    for key, value in vars(options).items():
        if value is not None and key not in _NAMED:
            section[key] = str(Path(value).resolve()) if key.endswith("_dir") else value
    return section


def add_to(args: argparse.Namespace, flags: Mapping[str, Any], adapters: Sequence[str]) -> None:
    """Puts what `cna_section` returned, and --adapter, into `args.additional_config`, beside what
    is there; the adapters' circuits may be given in any place.

    Raises:
        UsageError, SteeringError, CnaConfigError: with the flag or the setting.
    """
    section = merge(section_of(args.additional_config), flags)
    known = section.get("circuits", {})
    for argument in adapters:
        name, text = _named(argument)
        try:
            adapter = Adapter.parse(text, known).to_dict()
        except SteeringError as error:
            raise UsageError(f"--adapter {argument!r}: {error}") from error
        section = merge(section, {"adapters": {name: adapter}}, "what came before")
    for name, value in section.get("adapters", {}).items():
        circuits = Adapter.from_dict(value).circuits()
        check_known(f"adapter {show(name)}", circuits, section.get("circuits", {}))
    if section.get("registry_dir") is not None and section.get("circuit_dir") is None:
        raise UsageError("--registry-dir keeps what is loaded at run time; add --circuit-dir")
    args.additional_config = with_section(args.additional_config, section)


def _named(argument: str) -> tuple[str, str]:
    name, _, text = argument.partition("=")
    return name, text


def plugins_with_ours(allowed: str | None) -> str:
    """The value of `VLLM_PLUGINS` under which our routes load, and whatever loaded before.

    Unset, vLLM loads all plugins but those with routes; set, it loads those that are named.
    """
    from importlib.metadata import entry_points

    if allowed is not None:
        names = [name for name in allowed.split(",") if name]
    else:
        groups = [g for g in entry_points().groups if g.startswith("vllm.") and "plugins" in g]
        names = sorted(
            {e.name for g in groups if g != "vllm.endpoint_plugins" for e in entry_points(group=g)}
        )
    return ",".join(dict.fromkeys([*names, "cna"]))


def _folder(folder: Path) -> dict[str, Any]:
    """`NAME.json` is the circuit NAME; `adapters.json` maps names to adapters."""
    if not folder.is_dir():
        raise UsageError(f"--circuits {folder}: is not a folder")
    circuits, adapters = {}, {}
    for path in sorted(folder.glob("*.json")):
        if path.name == ADAPTERS_FILE:
            try:
                found = read_json(path, _MAX_ADAPTERS_BYTES)
            except FileError as error:
                raise UsageError(f"{path}: {error}") from error
            if not isinstance(found, Mapping):
                raise UsageError(f"{path}: must map names to adapters")
            adapters = {name: Adapter.from_dict(value).to_dict() for name, value in found.items()}
        else:
            Circuit.load(path)
            circuits[path.stem] = str(path.resolve())
    return {"circuits": circuits, "adapters": adapters}


def server_args(argv: Sequence[str]) -> argparse.Namespace:
    """vLLM's namespace of a server's flags, with our defaults on a CPU and the model's folder."""
    from cna_vllm.cli.engine_args import flag_parser, keep_sections, set_cpu_defaults

    parser = make_server_arg_parser(flag_parser("serve"))
    set_cpu_defaults(parser)
    keep_sections(parser)
    args: argparse.Namespace = parser.parse_args(list(argv))
    model = args.model_tag or args.model
    resolved = resolve_model(model)
    if resolved != model and args.served_model_name is None:
        args.served_model_name = [model]
    args.model = args.model_tag = resolved
    return args


def _parser() -> OptionParser:
    parser = OptionParser("serve", "vLLM's OpenAI server, with circuits.", model="MODEL")
    add = parser.add_argument
    parser.add_list("--circuit", "NAME=C.json", "may be repeated")
    add(
        "--circuits",
        metavar="DIR",
        help=f"every NAME.json in DIR; {ADAPTERS_FILE} there maps names to adapters",
    )
    parser.add_list(
        "--adapter",
        "NAME=CIRCUIT@M[:SCOPE]",
        "a model name that is steered; several circuits are joined with +; may be repeated",
    )
    add(
        "--circuit-dir",
        metavar="DIR",
        help="allow circuits to be loaded over HTTP, from files in this folder only",
    )
    add(
        "--registry-dir",
        metavar="DIR",
        help="keep what was loaded over HTTP here, across restarts and for all API servers",
    )
    parser.add_count("--max-circuits", "default: 128")
    parser.add_count("--max-circuits-per-request", "default: 4")
    add("--max-multiplier", type=float, metavar="M", help="default: 1000")
    parser.add_count("--max-neurons", "of a circuit loaded over HTTP")
    return parser
