# SPDX-License-Identifier: Apache-2.0
"""Steering and discovery on every covered architecture, against Hugging Face hooks.

Where the residual form of vectors is allowed, vectors of both forms steer and are found too.

Raw token ids throughout: a random checkpoint has no tokenizer.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from cna_vllm.discovery import select_neurons
from cna_vllm.steering.circuit import Neuron
from cna_vllm.steering.vectors import FORMS, RESIDUAL_ARCHITECTURES
from tests import tiny_models
from tests.architectures import ARCHITECTURES
from tests.engine_job import V1, V1_HERE, V2, run_engine
from tests.integration.conftest import FEW_MULTIPLIERS, MULTIPLIERS, PLAIN, Subject
from tests.oracles import Arm, HookedModel, assert_token_exact
from tests.tiny_models import LAYERS, WIDTH
from tests.vector_files import random_vectors, save_vectors

pytestmark = pytest.mark.engine

Groups = Mapping[str, list[list[int]]]
CONTRASTS = (("a", "b"), ("c", "a"))
SIZES = (1, 12, 60)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_steering_and_discovery(name: str, tmp_path: Path) -> None:
    """One engine: every multiplier and scope and two circuits in a batch, then a recording."""
    check(name, tmp_path, V1_HERE, prompts=3, max_tokens=12)


def prompt_groups(longest: int) -> Groups:
    """Of different sizes, to be contrasted in pairs."""
    sizes = (("a", 3, 11), ("b", 4, 12), ("c", 2, 13))
    return {name: tiny_models.prompts(count, seed, longest) for name, count, seed in sizes}


# Both activations, and vLLM's Transformers backend, whose rows have a leading dimension.
@pytest.mark.parametrize("name", ["qwen3", "gemma2", "smollm3"])
def test_steering_and_discovery_v2(name: str, tmp_path: Path) -> None:
    """A small matrix, short prompts and no vectors, through the GPU model runner and the Triton
    kernel, both interpreted."""
    check(name, tmp_path, V2, prompts=2, max_tokens=5, small=True)


def test_shared_experts_on_two_ranks(tmp_path: Path) -> None:
    """Each rank has half of every shared expert; their sum is taken after the routed experts."""
    env = {
        **V1,
        "VLLM_CPU_OMP_THREADS_BIND": "0|1",
        "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",  # the test's own look into the workers
    }
    check("qwen2_moe", tmp_path, env, prompts=2, max_tokens=8, tensor_parallel_size=2)


def check(
    name: str,
    folder: Path,
    runner: Mapping[str, str],
    *,
    prompts: int,
    max_tokens: int,
    small: bool = False,
    **options: Any,
) -> None:
    architecture = ARCHITECTURES[name]
    subject = build(name, folder)
    vectors = not small and bool(subject.vectors)
    arms = subject.matrix(FEW_MULTIPLIERS if small else MULTIPLIERS)
    longest = 8 if small else 60
    groups = prompt_groups(longest)
    cna: dict[str, Any] = {"circuits": dict(subject.files), "record": True}
    steps: list[dict[str, Any]] = []
    if vectors:
        arms += vector_arms(subject)
        files = save_vectors(folder, subject.vectors, architecture.model_class)
        cna |= {"vectors": files, "max_vectors": len(files)}
        sets = {"positive": groups["a"], "negative": groups["b"]}
        steps = [{"op": "mean_difference", **sets, "form": form} for form in FORMS]
    requests, wanted = subject.requests(
        tiny_models.prompts(prompts, longest=longest), arms, max_tokens=max_tokens, ignore_eos=True
    )
    outputs, means, hooks, status, *differences = run_engine(
        subject.config(additional_config={"cna": cna}, **options),
        [
            {"op": "generate", "requests": requests},
            {"op": "record", "groups": groups},
            {"op": "hooks"},
            {"op": "status"},
            *steps,
        ],
        env=runner,
    )
    assert hooks == [[architecture.vllm_mlp, architecture.activation]] * LAYERS
    assert len(status) == options.get("tensor_parallel_size", 1)
    routed = architecture.routed_experts
    for rank in status:
        assert rank["layers"] == list(range(LAYERS))
        assert list(rank["experts"]) == [str(i) for i in range(LAYERS) if routed]
        assert rank["routed_experts"] == []
    plain = [i for i, (_, arm) in enumerate(wanted) if arm is PLAIN]
    verdicts = subject.verdicts(wanted, outputs)
    assert_token_exact([verdicts[i] for i in plain], f"{name}, without steering")
    assert_token_exact(verdicts, name)
    texts = {tuple(o["token_ids"][0]) for o in outputs}
    assert len(texts) > len(outputs) / 2, "the arms must change the text for this to prove much"
    check_discovery(subject.oracle, groups, means)
    for form, difference in zip(FORMS, differences, strict=vectors):
        check_difference(subject.oracle, groups, difference, form)


def vector_arms(subject: Subject) -> list[Arm]:
    """Both forms, both signs, every scope, and a circuit beside a vector."""
    return [
        subject.arm(("mlp", 1.0)),
        subject.arm(("mlp", -1.0), scope="all"),
        subject.arm(("stream", 1.0)),
        subject.arm(("stream", -1.0), scope="all"),
        subject.arm(("stream", 2.0), scope="generated"),
        subject.arm(("one", 0.0), ("stream", -1.0), scope="all"),
    ]


def build(name: str, folder: Path) -> Subject:
    """A random checkpoint, its oracle, two circuits of a fifth of its neurons, and vectors of both
    forms where they are allowed."""
    architecture = ARCHITECTURES[name]
    oracle = HookedModel(architecture.save(folder / "model"))
    assert type(oracle.model).__name__ == architecture.model_class
    circuits, files = tiny_models.two_circuits(folder, architecture.model_class)
    engine = {"skip_tokenizer_init": True, "max_model_len": 128}
    vectors = {
        "mlp": random_vectors("mlp", range(LAYERS), 3, 0.5),
        "stream": random_vectors("residual", (LAYERS // 2,), 4, 1.5),
    }
    if architecture.model_class not in RESIDUAL_ARCHITECTURES:
        vectors = {}
    return Subject(str(folder / "model"), oracle, circuits, files, engine, vectors)


def check_discovery(oracle: HookedModel, groups: Groups, means: Mapping[str, Any]) -> None:
    """Recorded means, and every selection from them, are those of the oracle; of dense and shared
    MLPs, whose neurons are the first of their layers."""
    want = {
        group: np.mean([oracle.down_proj_inputs(p).double().numpy() for p in prompts], axis=0)
        for group, prompts in groups.items()
    }
    for positive, negative in CONTRASTS:
        above, below = (np.array([m[:WIDTH] for m in means[g]]) for g in (positive, negative))
        ours = above - below
        delta = want[positive] - want[negative]
        for k in SIZES:
            check_selection(select_neurons(ours, k), delta, k)


def check_difference(oracle: HookedModel, groups: Groups, found: Any, form: str) -> None:
    """Within 1e-5 of the largest difference."""
    means = [
        np.mean([oracle.outputs(p, form).double().numpy() for p in groups[group]], axis=0)
        for group in ("a", "b")
    ]
    expected = means[0] - means[1]
    assert np.abs(np.array(found) - expected).max() < 1e-5 * np.abs(expected).max()


def check_selection(neurons: list[Neuron], delta: NDArray[np.float64], k: int) -> None:
    """The k largest |delta|, in any order where relative differences are under 1e-5."""
    assert len(neurons) == k
    strength = np.abs(delta).ravel()
    order = np.argsort(-strength)
    threshold = strength[order[k - 1]]
    chosen = {n.layer * WIDTH + n.index for n in neurons}
    for index in chosen ^ set(order[:k].tolist()):
        assert abs(strength[index] - threshold) <= 1e-5 * threshold
    for neuron in neurons:
        assert neuron.delta == pytest.approx(delta[neuron.layer, neuron.index], rel=1e-4)
