# SPDX-License-Identifier: Apache-2.0
"""One row of the table of models, in a process of its own: build, serve, compare."""

from __future__ import annotations

import json
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import asdict
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
from tests.models_table import ABSENT, DISCOVERED, EXACT, FAILED, REFUSED, Row
from tests.models_zoo import AnyHookedModel, NotBuildable, build, one_line, width_of
from tests.oracles import Arm

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
    try:
        made = {"serve": serve, "compare": compare, "plain": plain}[function](
            architecture, Path(folder)
        )
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
    (status,) = steps.status()
    return {
        "outputs": outputs,
        "means": means,
        "hooks": steps.hooks(),
        "routed": status["routed_experts"],
    }


def compare(architecture: str, folder: Path) -> Row:
    """What the hooks say about what ``serve`` wrote."""
    served = json.loads((folder / "result.json").read_text())
    subject = make_subject(architecture, folder)
    outputs, wanted = served["outputs"], [(p, arm) for p in PROMPTS for arm in arms(subject)]
    verdicts = subject.verdicts(wanted, outputs)
    bad = [arm for v, (_, arm) in zip(verdicts, wanted, strict=True) if not (v.equal or v.near_tie)]
    same = discovers_the_same(subject, served["means"])
    where = ", ".join(dict.fromkeys(f"`{owner}` ({kind})" for owner, kind in served["hooks"]))
    if served["routed"]:
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


def make_subject(architecture: str, folder: Path) -> Subject:
    """The oracle of a saved checkpoint, and two circuits of a fifth of its neurons."""
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
    return Subject(str(folder / "model"), oracle, circuits, files, {})


def arms(subject: Subject) -> list[Arm]:
    """In the order of ARMS."""
    return [subject.arm(*pairs, scope=scope) if pairs else PLAIN for pairs, scope in ARMS]


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
