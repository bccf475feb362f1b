# SPDX-License-Identifier: Apache-2.0
"""One row of the table of models, in a process of its own: build, serve, compare."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from cna_vllm.checkpoints.models import neurons_per_layer
from cna_vllm.discovery import select_neurons
from cna_vllm.serving.config import CnaConfigError
from cna_vllm.serving.worker.gated_mlp import UnsupportedModelError
from tests import tiny_models
from tests.engine_job import _Steps
from tests.integration.conftest import PLAIN, Subject
from tests.models_table import ABSENT, DISCOVERED, EXACT, FAILED, REFUSED, Row, result_of
from tests.models_zoo import AnyHookedModel, NotBuildable, build, one_line, width_of

REFUSALS = (UnsupportedModelError, CnaConfigError)
GROUPS = {"a": tiny_models.prompts(3, 11, 40), "b": tiny_models.prompts(4, 12, 40)}
PROMPTS = tiny_models.prompts(3, longest=40)


def run(function: str, architecture: str, folder: str) -> None:
    """Writes the row to ``result.json`` in ``folder``."""
    make = {"steered_row": steered_row, "plain_row": plain_row}[function]
    try:
        row = make(architecture, Path(folder))
    except NotBuildable as error:
        row = Row(architecture, ABSENT, str(error))
    except Exception as error:
        why = refusal(error)
        row = Row(architecture, REFUSED if why else FAILED, why or one_line(error))
        if not why:
            import traceback

            traceback.print_exc()
    detail = row.detail.replace(f"{folder}/model", "the model").replace(folder, "the model")
    (Path(folder) / "result.json").write_text(
        result_of(Row(row.architecture, row.outcome, " ".join(detail.split())))
    )


def refusal(error: BaseException) -> str:
    """The message of what the product refused, if that is what ended the engine."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, REFUSALS):
            return str(seen)
        seen = seen.__cause__ or seen.__context__
    return ""


def plain_row(architecture: str, folder: Path) -> Row:
    """Whether stock vLLM runs the checkpoint that a steered engine did not."""
    try:
        _engine(folder).generate([{"prompt": PROMPTS[0], "params": {"max_tokens": 2}}])
    except Exception as error:
        return Row(architecture, ABSENT, f"stock vLLM: {one_line(error)}")
    return Row(architecture, FAILED, "stock vLLM runs it")


def steered_row(architecture: str, folder: Path) -> Row:
    build(architecture, folder / "model")
    subject, hooks, outputs, wanted, means, routed = serve(architecture, folder)
    verdicts = subject.verdicts(wanted, outputs)
    bad = [arm for v, (_, arm) in zip(verdicts, wanted, strict=True) if not (v.equal or v.near_tie)]
    same = discovers_the_same(subject, means)
    where = ", ".join(dict.fromkeys(f"`{owner}` ({activation})" for owner, activation in hooks))
    if routed:
        where += "; its routed experts are neither steered nor recorded, which a warning says"
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


ARMS = (
    (),
    (("one", 0.0),),
    (("one", 2.0), "all"),
    (("one", -1.0), "generated"),
    (("one", 0.5), ("two", -1.0), "all"),
)


def serve(architecture: str, folder: Path) -> tuple[Subject, Any, Any, Any, Any, Any]:
    """One engine with two circuits: generates every arm of every prompt in a batch, records."""
    oracle = AnyHookedModel(folder / "model")
    downs = oracle.down_projections()
    text = oracle.model.config.get_text_config()
    layers = text.num_hidden_layers
    # What the product reads from a configuration is what a circuit file must say.
    width = neurons_per_layer(text) or max(map(width_of, downs.values()), default=tiny_models.WIDTH)
    circuits, files = {}, {}
    for seed, name in enumerate(("one", "two"), start=1):
        channels = tiny_models.channels(layers, width, width // 5, seed)
        circuits[name] = {i: held for i, held in channels.items() if i in downs or not downs}
        file = folder / f"{name}.json"
        made = tiny_models.circuit_object(circuits[name], layers, width, architecture)
        file.write_text(json.dumps(made))
        files[name] = str(file)
    subject = Subject(str(folder / "model"), oracle, circuits, files, {})
    arms = []
    for pairs in ARMS:
        named = [pair for pair in pairs if not isinstance(pair, str)]
        scope = next((word for word in pairs if isinstance(word, str)), "last")
        arms.append(subject.arm(*named, scope=scope) if named else PLAIN)
    requests, wanted = subject.requests(PROMPTS, arms, max_tokens=8, ignore_eos=True)
    steps = _engine(folder, {"cna": {"circuits": files, "record": True}})
    outputs = steps.generate(requests)
    means = steps.record(GROUPS)
    (status,) = steps.status()
    return subject, steps.hooks(), outputs, wanted, means, status["routed_experts"]


def _engine(folder: Path, additional: Mapping[str, Any] | None = None) -> _Steps:
    return _Steps(
        {
            "model": str(folder / "model"),
            "skip_tokenizer_init": True,
            "dtype": "float32",
            "enforce_eager": True,
            "max_model_len": 128,
            "max_num_seqs": 32,
            "additional_config": dict(additional or {}),
        }
    )


def discovers_the_same(subject: Subject, means: Mapping[str, Any]) -> bool:
    """Whether the 12 neurons of the largest difference are those of the hooks, near ties aside."""
    want = [
        np.mean([subject.oracle.down_proj_inputs(p).double().numpy() for p in GROUPS[g]], axis=0)
        for g in ("a", "b")
    ]
    delta = np.abs(want[0] - want[1])
    ours = np.array(means["a"]) - np.array(means["b"])
    if ours.shape != delta.shape:
        return False
    chosen = [(neuron.layer, neuron.index) for neuron in select_neurons(ours, 12)]
    weakest = np.sort(delta.ravel())[-12]
    return all(delta[at] >= weakest * (1 - 1e-5) for at in chosen)
