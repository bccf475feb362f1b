# SPDX-License-Identifier: Apache-2.0
"""From settings to figures: the engines, the parts in turn, and the file that holds it all."""

from __future__ import annotations

import json
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cna_vllm
from cna_vllm.circuit import Circuit
from cna_vllm.evaluation.paper.parts import RUN
from cna_vllm.evaluation.paper.rows import Row, table
from cna_vllm.evaluation.paper.settings import TOP, Settings
from cna_vllm.evaluation.paper.study import BASE_FILE, Study, claim
from cna_vllm.files import write_atomic
from cna_vllm.models import resolve_model

if TYPE_CHECKING:
    from vllm import LLM
    from vllm.engine.arg_utils import EngineArgs

__all__ = ["claim", "discover_base", "evaluate", "start"]

FORMAT, VERSION = "cna-eval", 1


def start(args: EngineArgs, settings: Settings) -> LLM:
    """The engine of an evaluation: it records, and has room for its circuits and vectors."""
    vectors = 2 if "caa" in settings.parts else 0
    return _engine(args, {"record": True, "max_circuits": 8, "max_vectors": vectors})


def discover_base(args: EngineArgs, settings: Settings, folder: Path) -> None:
    """The base model's strongest neurons on the same contrast, in a process of its own, so that
    its memory is free again when the model under evaluation starts."""
    path = folder / BASE_FILE
    if path.exists() or settings.base_model is None:
        return
    base = replace(args, model=resolve_model(settings.base_model), served_model_name=None)
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        pool.submit(_discover_base, base, settings).result().save(path)


def evaluate(llm: LLM, settings: Settings, folder: Path, *, say: Callable[[str], None]) -> str:
    """Runs the parts, writes `eval.json`, and returns the table.

    say: gets a line when a part begins.
    """
    import vllm

    study = Study(llm, settings, folder)
    rows: list[Row] = []
    for part in settings.parts:
        say(part)
        rows += RUN[part](study)
    result = {
        "format": FORMAT,
        "version": VERSION,
        "settings": settings.identity(),
        "parts": list(settings.parts),
        "tools": {"cna_vllm": cna_vllm.__version__, "vllm": vllm.__version__},
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "sampling": dict(study.sampling),
        "rows": [row.to_dict() for row in rows],
    }
    write_atomic(folder / "eval.json", [json.dumps(result, indent=1) + "\n"])
    return table(rows)


def _engine(args: EngineArgs, cna: dict[str, Any]) -> LLM:
    from vllm import LLM

    given = dict(args.additional_config or {})
    llm: LLM = LLM.from_engine_args(
        replace(args, additional_config={**given, "cna": {**given.get("cna", {}), **cna}})
    )
    return llm


def _discover_base(args: EngineArgs, settings: Settings) -> Circuit:
    from cna_vllm.discovery import discover

    llm = _engine(args, {"record": True})
    preset: Any = settings.preset
    return discover(llm, settings.positive, settings.negative, preset=preset, top_k=TOP)
