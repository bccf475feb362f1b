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
from cna_vllm.checkpoints.models import resolve_model
from cna_vllm.evaluation.paper.parts import RUN
from cna_vllm.evaluation.paper.rows import Row, notes, table
from cna_vllm.evaluation.paper.settings import PARTS, TOP, EvalError, Settings
from cna_vllm.evaluation.paper.study import BASE_FILE, Study
from cna_vllm.evaluation.result import write_json
from cna_vllm.serving.seams.offline import engine_of
from cna_vllm.steering.circuit import Circuit
from cna_vllm.steering.vectors import VectorError, check_residual

if TYPE_CHECKING:
    from vllm import EngineArgs

FORMAT, VERSION = "cna-eval", 1
RESULT_FILE = "eval.json"


def section(settings: Settings) -> dict[str, Any]:
    """What the engine of an evaluation needs: it records, and has room for circuits and vectors."""
    vectors = 2 if "caa" in settings.parts else 0
    return {"record": True, "max_circuits": 8, "max_vectors": vectors}


def discover_base(args: EngineArgs, settings: Settings, folder: Path) -> None:
    """The base model's strongest neurons on the same contrast, in a process of its own, so that
    its memory is free again when the model under evaluation starts."""
    path = folder / BASE_FILE
    if path.exists() or settings.base_model is None:
        return
    # What names a version of the model, or its tokenizer, is not of its base.
    own = dict.fromkeys(("revision", "tokenizer", "tokenizer_revision", "served_model_name"))
    base = replace(args, model=resolve_model(settings.base_model), **own)
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        pool.submit(_discover_base, base, settings).result().save(path)


def evaluate(study: Study, *, say: Callable[[str], None]) -> str:
    """Runs the parts and returns the table; each part's rows are in `eval.json` once it is done,
    in which those of other parts, of earlier runs, stay.

    say: gets a line when a part begins.

    Raises:
        EvalError: the base model's neurons are not this model's, or caa is not possible on it.
    """
    import vllm

    settings = study.settings
    if "structure" in settings.parts:
        _check_base(study)
    if "caa" in settings.parts:
        try:
            check_residual(engine_of(study.llm).architecture)
        except VectorError as error:
            raise EvalError(f"--parts caa: {error}; leave caa out") from error
    path = study.folder / RESULT_FILE
    rows: dict[str, list[Row]] = {}
    if path.exists():
        for row in map(Row.from_dict, json.loads(path.read_text("utf-8"))["rows"]):
            rows.setdefault(row.part, []).append(row)
    for part in settings.parts:
        say(part)
        rows[part] = list(RUN[part](study))
        result = {
            "format": FORMAT,
            "version": VERSION,
            "settings": settings.identity(),
            "engine": dict(study.engine),
            "tools": {"cna_vllm": cna_vllm.__version__, "vllm": vllm.__version__},
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "sampling": dict(study.sampling),
            "rows": [row.to_dict() for name in PARTS for row in rows.get(name, ())],
        }
        write_json(path, result)
    shown = [row for part in settings.parts for row in rows[part]]
    return "\n".join([table(shown), *notes(shown)])


def _check_base(study: Study) -> None:
    from cna_vllm.discovery import layout_of

    base, shape = study.base_circuit(), layout_of(study.llm).shape
    if base is None:
        return
    if base.shape != (shape if base.is_routed else shape.dense()):
        raise EvalError(
            f"--base-model: has {base.shape}, the model {shape}; name the base of this model"
        )


def _discover_base(args: EngineArgs, settings: Settings) -> Circuit:
    from vllm import LLM

    from cna_vllm.discovery import discover

    given = dict(args.additional_config or {})
    section = {**given.get("cna", {}), "record": True}
    llm = LLM.from_engine_args(replace(args, additional_config={**given, "cna": section}))
    preset: Any = settings.preset
    return discover(llm, settings.positive, settings.negative, preset=preset, top_k=TOP)
