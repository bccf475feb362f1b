# SPDX-License-Identifier: Apache-2.0
"""One row of the table of models, in a process of its own: build, serve, compare."""

from __future__ import annotations

import json
import random
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from cna_vllm import Circuit, Neuron
from cna_vllm.checkpoints.shapes import model_shape
from cna_vllm.serving.config import CnaConfigError
from cna_vllm.serving.worker.gated_mlp import UnsupportedModelError
from tests import models_half, tiny_models
from tests.engine_job import _Steps
from tests.integration.conftest import PLAIN, Subject
from tests.models_experts import AnyExpertModel
from tests.models_table import ABSENT, DISCOVERED, EXACT, FAILED, HALF, REFUSED, Row
from tests.models_zoo import (
    NotBuildable,
    architecture_of,
    build,
    has_towers,
    one_line,
)
from tests.oracles import Arm
from tests.torchvision_stand_in import install

REFUSALS = (UnsupportedModelError, CnaConfigError)
ARMS: Sequence[tuple[tuple[tuple[str, float], ...], str]] = (
    ((), "last"),
    ((("one", 0.0),), "last"),
    ((("one", 2.0),), "all"),
    ((("one", -1.0),), "generated"),
    ((("one", 0.5), ("two", -1.0)), "all"),
)
GROUPS = {"a": tiny_models.prompts(3, 11, 40), "b": tiny_models.prompts(4, 12, 40)}
PROMPTS = tiny_models.prompts(3, longest=40)


def run(function: str, architecture: str, folder: str) -> None:
    """Writes a row, or what ``compare`` needs to make one, to ``result.json`` in ``folder``."""
    made: Row | dict[str, Any]
    install()
    try:
        made = FUNCTIONS[function](architecture, Path(folder))
    except NotBuildable as error:
        made = Row(architecture, ABSENT, str(error))
    except Exception as error:
        why = refusal(error)
        made = Row(architecture, REFUSED if why else FAILED, why or one_line(error))
        if not why:
            traceback.print_exc()
    if isinstance(made, Row):
        detail = made.detail.replace(f"{folder}/model", "the model").replace(folder, "a folder")
        made = asdict(Row(made.architecture, made.outcome, " ".join(detail.split())))
    (Path(folder) / "result.json").write_text(json.dumps(made))


def refusal(error: BaseException) -> str:
    """The message of what the product refused, if that is what ended the engine."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, REFUSALS):
            return str(seen)
        seen = seen.__cause__ or seen.__context__
    return ""


def plain(architecture: str, folder: Path) -> Row:
    """Whether stock vLLM runs the checkpoint that a steered engine did not."""
    try:
        _engine(folder).generate([{"prompt": PROMPTS[0], "params": {"max_tokens": 2}}])
    except Exception as error:
        return Row(architecture, ABSENT, f"stock vLLM: {one_line(error)}")
    return Row(architecture, FAILED, "stock vLLM runs it")


def serve(architecture: str, folder: Path) -> dict[str, Any]:
    """One engine with two circuits: generates every arm of every prompt in a batch, records.

    vLLM changes transformers' classes where it serves them, so another process compares.
    """
    build(architecture, folder / "model")
    subject = make_subject(architecture, folder)
    requests, _ = subject.requests(PROMPTS, arms(subject), max_tokens=8, ignore_eos=True)
    steps = _engine(folder, {"cna": {"circuits": dict(subject.files), "record": True}})
    outputs, means = steps.generate(requests), steps.record(GROUPS)
    return {"outputs": outputs, "means": means, "where": owners(steps)}


def compare(architecture: str, folder: Path) -> Row:
    """What the hooks say about what ``serve`` wrote."""
    served = json.loads((folder / "result.json").read_text())
    subject = make_subject(architecture, folder)
    outputs, wanted = served["outputs"], [(p, arm) for p in PROMPTS for arm in arms(subject)]
    verdicts = subject.verdicts(wanted, outputs)
    bad = [arm for v, (_, arm) in zip(verdicts, wanted, strict=True) if not (v.equal or v.near_tie)]
    same = discovers_the_same(subject, served["means"])
    where = served["where"]
    if PLAIN in bad:
        why = "without steering, stock vLLM writes another text than transformers"
        return Row(architecture, DISCOVERED if same else ABSENT, f"{where}; {why}" if same else why)
    if bad or not same:
        what = f"{len(bad)} of {len(verdicts)} arms differ" if bad else "other neurons"
        return Row(architecture, FAILED, f"{where}: {what}")
    texts = {(i // len(ARMS), tuple(o["token_ids"][0])) for i, o in enumerate(outputs)}
    if len(texts) <= len(outputs) / 2:
        return Row(architecture, FAILED, f"{where}: the arms hardly change the text")
    return Row(architecture, EXACT, where)


def owners(steps: _Steps) -> str:
    """The modules of vLLM that own neurons."""
    (status,) = steps.status()
    found = [f"`{owner}` ({kind})" for owner, kind in steps.hooks()]
    if backends := sorted({*status["experts"].values()}):
        found.append(f"routed experts ({', '.join(backends)})")
    where = ", ".join(dict.fromkeys(found))
    if status["routed_experts"]:
        where += "; its routed experts are neither steered nor recorded, which a warning says"
    return where


def serve_half(architecture: str, folder: Path) -> dict[str, Any]:
    """``serve`` of a model that vLLM runs in bfloat16 only: circuits in scope ``all``."""
    config = {"cna": {"circuits": models_half.circuits(architecture, folder)}}
    steps = _engine(folder, config, dtype="bfloat16")
    plain = steps.generate(models_half.REQUESTS)
    outputs = steps.generate(models_half.steered())
    return {"plain": plain, "outputs": outputs, "where": owners(steps)}


def compare_half(architecture: str, folder: Path) -> Row:
    """What stock vLLM makes of scaled columns says about what ``serve_half`` wrote."""
    served = json.loads((folder / "result.json").read_text())
    models_half.save_scaled(folder)
    outputs = _engine(folder, dtype="bfloat16").generate(models_half.REQUESTS)
    if why := models_half.same(served, outputs):
        return Row(architecture, FAILED, f"{served['where']}: {why}")
    return Row(architecture, EXACT, f"{served['where']}; {HALF}")


def make_subject(architecture: str, folder: Path) -> Subject:
    """The oracle of a saved checkpoint, and two circuits of a fifth of its neurons."""
    oracle = AnyExpertModel(folder / "model")
    text = oracle.model.config.get_text_config()
    # What the product reads from a configuration is what a circuit file must say.
    shape = model_shape(text, text.num_hidden_layers)
    circuits: dict[str, Any] = {}
    files = {}
    for seed, name in enumerate(("one", "two"), start=1):
        draw = random.Random(seed)
        circuits[name] = {
            mlp: tuple(draw.sample(range(width), max(1, width // 5)))
            for mlp, width in oracle.widths().items()
        }
        if shape is None or not circuits[name]:
            continue  # the engine is to refuse the model
        neurons = [
            Neuron(mlp, i, 1.0) if isinstance(mlp, int) else Neuron(mlp[0], i, 1.0, mlp[1])
            for mlp, held in circuits[name].items()
            for i in held
        ]
        files[name] = str(folder / f"{name}.json")
        Circuit("test", architecture, **shape.fields(), neurons=neurons).save(files[name])
    return Subject(str(folder / "model"), oracle, circuits, files, {})


def arms(subject: Subject) -> list[Arm]:
    """In the order of ARMS."""
    return [subject.arm(*pairs, scope=scope) if pairs else PLAIN for pairs, scope in ARMS]


def _engine(
    folder: Path, additional: Mapping[str, Any] | None = None, dtype: str = "float32"
) -> _Steps:
    """Of the text model alone, where there are towers beside it."""
    return _Steps(
        {
            "model": str(folder / "model"),
            "skip_tokenizer_init": True,
            "dtype": dtype,
            "enforce_eager": True,
            "max_model_len": 128,
            "max_num_seqs": 32,
            "language_model_only": has_towers(architecture_of(folder / "model")),
            "additional_config": dict(additional or {}),
        }
    )


def discovers_the_same(subject: Subject, means: Mapping[str, Any]) -> bool:
    """Whether the 12 neurons of the largest difference are those of the hooks, near ties aside."""
    oracle: Any = subject.oracle
    want, ours = (
        (np.mean([oracle.neurons(prompt) for prompt in GROUPS[g]], axis=0) for g in ("a", "b")),
        (np.concatenate(means[g]) for g in ("a", "b")),
    )
    delta, found = (np.abs(above - below) for above, below in (want, ours))
    if found.shape != delta.shape:
        return False
    chosen = np.argsort(-found, kind="stable")[:12]
    return bool((delta[chosen] >= np.sort(delta)[-12] * (1 - 1e-5)).all())


FUNCTIONS: Mapping[str, Callable[[str, Path], Row | dict[str, Any]]] = {
    "serve": serve,
    "compare": compare,
    "plain": plain,
    "serve_half": serve_half,
    "compare_half": compare_half,
}
