# SPDX-License-Identifier: Apache-2.0
"""`cna-vllm doctor`: what works on this machine, and why not."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from cna_vllm import __version__
from cna_vllm.cli.options import OptionParser
from cna_vllm.cli.usage import UsageError, say
from cna_vllm.serving.doctor import Check
from cna_vllm.serving.seams.offline import engine_of

if TYPE_CHECKING:
    from vllm import LLM

_DESCRIPTION = """\
Says what works on this machine, and why not. With a MODEL it also starts an engine, says what is
hooked in it, and tests on the loaded model that steering is exact.

Exit status 0 only if all checks hold."""


def run(argv: list[str]) -> int:
    parser = OptionParser("doctor", _DESCRIPTION, model="[MODEL]")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options, rest = parser.split(argv)

    # Before vLLM is imported, which reads them then: stdout is for the report. In this process,
    # so that an engine that does not start can be asked why.
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")

    from cna_vllm.serving.doctor.environment import device, environment_checks, extras, versions

    say("looking at the machine")
    found = {"cna_vllm": __version__, **versions()}
    checks = environment_checks(found)
    works = all(check.holds for check in checks)
    report: dict[str, Any] = {
        "versions": found,
        "machine": device() if found["vllm"][0].isdigit() else {},
        "extras": extras(),
        "engine": None,
    }
    if rest and works:
        engine, more = examine(rest)
        report["engine"] = engine
        checks += more
    elif rest:
        checks.append(Check("an engine starts", "not tried, since a check above fails", False))
    holds = all(check.holds for check in checks)
    report["checks"] = [vars(check) for check in checks]
    report["ok"] = holds
    print(json.dumps(report, indent=1) if options.json else _text(report, checks))
    return 0 if holds else 1


def examine(argv: Sequence[str]) -> tuple[dict[str, Any] | None, list[Check]]:
    """Starts the engine that `MODEL [engine flags]` asks for: what it is, and what was checked;
    raises UsageError for wrong flags, or without a model."""
    from cna_vllm.cli.engine_args import start_engine
    from cna_vllm.serving.doctor.selftest import self_test

    say("starting an engine")
    claim = "an engine starts, and every hooked layer obeys its hook"
    try:
        llm = start_engine("doctor", argv, {"record": True})
    except UsageError:
        raise
    except Exception as error:  # whatever it is, it is the answer
        return None, [
            Check(claim, f"{type(error).__name__}: {' '.join(str(error).split())}", False)
        ]
    engine = describe(llm)
    say("testing that steering is exact")
    return engine, [Check(claim, f"{engine['hooked_layers']} layers", True), *self_test(llm)]


def describe(llm: LLM) -> dict[str, Any]:
    """What a running engine is; of its first worker, where workers differ."""
    from cna_vllm.serving.control import status

    workers = status(llm)
    first, engine = workers[0], engine_of(llm)
    routed = {int(at): name for worker in workers for at, name in worker["experts"].items()}
    hooked = {layer for worker in workers for layer in worker["layers"]} | routed.keys()
    backends = Counter(routed.values())
    return {
        "model": engine.model,
        "dtype": engine.dtype,
        "compiled": not engine.eager,
        "workers": len(workers),
        "runner": first["runner"],
        "device": first["device"],
        "kernel": first["kernel"],
        "quantization": first["quantization"],
        "hooked_layers": f"{len(hooked)} of {engine.num_layers}",
        "experts": [f"{name} in {count} layers" for name, count in backends.items()],
        "routed_experts": first["routed_experts"],
        "table_bytes": first["table_bytes"],
        "circuits": len(first["circuits"]),
    }


def _text(report: Mapping[str, Any], checks: Sequence[Check]) -> str:
    facts = {**report["versions"], **report["machine"]}
    facts |= {f"extra {name}": state for name, state in report["extras"].items()}
    lines = [f"{name:14}  {value}" for name, value in facts.items()]
    if report["engine"] is not None:
        lines.append("")
        lines += [f"{name:14}  {_value(value)}" for name, value in report["engine"].items()]
    return "\n".join([*lines, "", *map(str, checks)])


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return ", ".join(value) or "none" if isinstance(value, list) else str(value)
