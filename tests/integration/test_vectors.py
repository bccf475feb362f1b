# SPDX-License-Identifier: Apache-2.0
"""Steering vectors beside circuits: token-exact in one batch, and right in the prefix cache.

Engines are few: each test puts all that its engine can show into one start.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests import tiny_models
from tests.engine_job import V1, V1_HERE, V2, run_engine
from tests.integration.conftest import PLAIN, SCOPES, Subject
from tests.integration.test_compiled import COUNT_OPS
from tests.integration.test_token_exact import steered_rows
from tests.oracles import Arm, assert_token_exact
from tests.tiny_models import LAYERS
from tests.vector_files import random_vectors, save_vectors

pytestmark = pytest.mark.engine

BLOCK = 32


@pytest.fixture(scope="module")
def steerable(tiny: Subject) -> Subject:
    """The tiny model with vectors of both forms; ``other`` is loaded by one test at run time."""
    vectors = {
        "mlp": random_vectors("mlp", range(LAYERS), 1, 0.5),
        "part": random_vectors("mlp", (1, 3), 2, 0.8),
        "stream": random_vectors("residual", (2,), 3, 1.5),
        "other": random_vectors("mlp", range(LAYERS), 4, 0.5),
    }
    return replace(tiny, vectors=vectors)


@pytest.fixture(scope="module")
def files(steerable: Subject, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return save_vectors(tmp_path_factory.mktemp("vectors"), steerable.vectors)


def config(subject: Subject, files: Mapping[str, str], **options: Any) -> dict[str, Any]:
    """Engine arguments with both circuits and all vectors but ``other`` loaded at start."""
    vectors = {name: file for name, file in files.items() if name != "other"}
    cna = {"circuits": dict(subject.files), "max_circuits": 8, "vectors": vectors}
    cna |= {"max_vectors": 4, "record": True}
    return subject.config(**{"additional_config": {"cna": cna}, "block_size": BLOCK, **options})


def matrix(subject: Subject) -> list[Arm]:
    """Both forms, both signs, three scopes; several vectors; circuits alone and with vectors."""
    arms = [
        subject.arm((name, coefficient), scope=scope)
        for name in ("mlp", "stream")
        for coefficient in (1.0, -1.0)
        for scope in SCOPES
    ]
    return [
        PLAIN,
        *arms,
        subject.arm(("part", -2.5), ("mlp", 0.5)),
        subject.arm(("stream", 1.0), ("stream", 1.0), scope="generated"),
        subject.arm(("mlp", 0.0)),
        *(subject.arm(("one", m), scope=scope) for m in (0.0, 2.0) for scope in SCOPES),
        *(subject.arm(("one", 0.0), ("mlp", -1.0), scope=scope) for scope in SCOPES),
        subject.arm(("one", 0.5), ("two", -1.0), ("part", 1.0), ("stream", -1.0)),
        subject.arm(("two", 1.0), ("stream", 2.0), scope="all"),
        PLAIN,
    ]


def one_by_one(subject: Subject, prompt: Sequence[int], arms: Sequence[Arm]) -> tuple[Any, Any]:
    """A step for every arm, so that each request finds what all before it have cached."""
    requests, wanted = subject.requests([prompt], arms, max_tokens=6, ignore_eos=True)
    return [{"op": "generate", "requests": [request]} for request in requests], wanted


def cache_plan(subject: Subject) -> tuple[list[Arm], list[int], list[Arm], list[int]]:
    """Arms in order with the cached tokens of each; on a fresh prompt, and on another."""
    last, everywhere = subject.arm(("mlp", 1.0)), subject.arm(("mlp", 1.0), scope="all")
    cold = [
        PLAIN,
        last,
        subject.arm(("mlp", 1.0), scope="generated"),
        everywhere,
        subject.arm(("mlp", 0.0), scope="all"),
        PLAIN,
    ]
    warm = [
        everywhere,
        subject.arm(("mlp", -1.0), scope="all"),
        subject.arm(("part", 1.0), scope="all"),
        subject.arm(("mlp", 1.0), ("part", 1.0), scope="all"),
        subject.arm(("one", 0.0), ("mlp", 1.0), scope="all"),
        PLAIN,
        subject.arm(("part", 1.0), ("mlp", 1.0), scope="all"),
        everywhere,
        last,
    ]
    full = 2 * BLOCK
    return cold, [0, full, full, 0, full, full], warm, [0, 0, 0, 0, 0, 0, full, full, full]


def check_cache(subject: Subject, outputs: Sequence[Any], wanted: Sequence[Any]) -> None:
    _, cold_cached, _, warm_cached = cache_plan(subject)
    flat = [output[0] for output in outputs]
    assert_token_exact(subject.verdicts(wanted, flat), "prefix cache")
    assert [output["cached"] for output in flat] == [*cold_cached, *warm_cached]


def cache_steps(subject: Subject) -> tuple[list[Any], list[Any]]:
    cold, _, warm, _ = cache_plan(subject)
    steps, wanted = [], []
    for seed, arms in ((31, cold), (32, warm)):
        prompt = (tiny_models.prompts(1, seed=seed)[0] * 99)[: 2 * BLOCK + 7]
        more, asked = one_by_one(subject, prompt, arms)
        steps += more
        wanted += asked
    return steps, wanted


BAD_REQUESTS: list[tuple[dict[str, Any], str]] = [
    ({"cna_vector": "nope", "cna_coefficient": 0.0}, "no vector is named 'nope'; known vectors: "),
    ({"cna_vector": "one", "cna_coefficient": 1.0}, "cna_vector: no vector is named 'one'"),
    ({"cna_circuit": "mlp", "cna_multiplier": 0.0}, "cna_circuit: no circuit is named 'mlp'"),
    ({"cna_vector": ["mlp"] * 3, "cna_coefficient": [1.0] * 3}, "3 vectors on one request"),
    ({"cna_vector": "mlp", "cna_coefficient": 1001}, "cna_coefficient: 1001 is over the limit"),
    ({"cna_vector": "mlp"}, "cna_coefficient: missing"),
]


def test_v1(steerable: Subject, files: dict[str, str], tmp_path: Path) -> None:
    """Mixed batch, prefix cache, refusals, other content under a name, and discovery."""
    subject = steerable
    prompts = tiny_models.prompts(4)
    arms = matrix(subject)
    requests, wanted = subject.requests(prompts, arms, max_tokens=24, ignore_eos=True)
    steps, cache_wanted = cache_steps(subject)
    again, _ = subject.requests(prompts[-1:], [subject.arm(("mlp", 1.0), scope="all")])
    again[0]["params"] |= {"max_tokens": 12, "ignore_eos": True}
    bad = [{"prompt": prompts[0], "params": {"extra_args": fields}} for fields, _ in BAD_REQUESTS]
    groups = {"positive": tiny_models.prompts(3, 41), "negative": tiny_models.prompts(4, 42)}
    results = run_engine(
        config(subject, files),
        [
            {"op": "generate", "requests": requests},
            {"op": "status"},
            *steps,
            {"op": "refused", "requests": bad},
            {"op": "load_vectors", "name": "mlp", "path": files["other"]},
            {"op": "generate", "requests": again},
            {"op": "status"},
            {"op": "mean_difference", **groups, "form": "mlp"},
            {"op": "mean_difference", **groups, "form": "residual"},
            {"op": "record", "groups": groups},
        ],
    )
    outputs, before = results[:2]
    assert_token_exact(subject.verdicts(wanted, outputs), "mixed batch, V1")
    texts = {tuple(o["token_ids"][0]) for o in outputs}
    assert len(texts) > len(outputs) / 2, "the arms must change the text for this to prove much"
    assert_counted(subject, wanted, outputs, before[0])
    check_cache(subject, results[2 : 2 + len(steps)], cache_wanted)
    messages, _, reloaded, after, mlp, stream, neurons = results[2 + len(steps) :]
    for (fields, expected), message in zip(BAD_REQUESTS, messages, strict=True):
        assert message.startswith("VLLMValidationError: cna_"), (fields, message)
        assert expected in message, (fields, message)
    new = subject.arm(("other", 1.0), scope="all")
    assert_token_exact(subject.verdicts([(prompts[-1], new)], reloaded), "reloaded")
    assert before[0]["addresses"] == after[0]["addresses"]
    assert len(after[0]["vectors"]) == 3 and set(after[0]["vectors"]) != set(before[0]["vectors"])
    for form, found in (("mlp", mlp), ("residual", stream)):
        assert_close(found, mean_difference(subject, groups, form))
    for name, ids in groups.items():
        inputs = [subject.oracle.down_proj_inputs(p).double().numpy() for p in ids]
        assert_close(neurons[name], np.mean(inputs, axis=0))


def assert_counted(subject: Subject, wanted: Any, outputs: Any, status: Any) -> None:
    """Steered rows of circuits and vectors; multipliers of 1, coefficients of 0 steer none."""
    expected = []
    for content in (*subject.circuits.values(), *subject.vectors.values()):
        named = [
            (prompt, replace(arm, circuits=((content, 0.0),)))
            if any(c is content and x != 1.0 for c, x in arm.circuits)
            or any(v is content and x != 0.0 for v, x in arm.vectors)
            else (prompt, PLAIN)
            for prompt, arm in wanted
        ]
        expected.append(steered_rows(named, outputs, content))
    assert sorted(status["steered_tokens"].values()) == sorted(n for n in expected if n)


def mean_difference(subject: Subject, groups: Mapping[str, Any], form: str) -> np.ndarray:
    means = [
        np.mean([subject.oracle.outputs(p, form).double().numpy() for p in groups[g]], axis=0)
        for g in ("positive", "negative")
    ]
    return np.asarray(means[0] - means[1])


def assert_close(found: Any, expected: np.ndarray) -> None:
    scale = np.abs(expected).max()
    assert np.abs(np.array(found) - expected).max() < 1e-5 * scale


def test_v2(steerable: Subject, files: dict[str, str]) -> None:
    """The GPU model runner with the real Triton kernels, both through the interpreter."""
    requests, wanted = steerable.requests(
        tiny_models.prompts(2, longest=9), matrix(steerable), max_tokens=5, ignore_eos=True
    )
    steps, cache_wanted = cache_steps(steerable)
    outputs, *cached = run_engine(
        config(steerable, files), [{"op": "generate", "requests": requests}, *steps], env=V2
    )
    assert_token_exact(steerable.verdicts(wanted, outputs), "mixed batch, V2")
    check_cache(steerable, cached, cache_wanted)


def test_two_ranks_with_chunked_prefill(steerable: Subject, files: dict[str, str]) -> None:
    """Every rank adds whole vectors after the sum over ranks, and both report what they record."""
    requests, wanted = steerable.requests(
        tiny_models.prompts(3), matrix(steerable), max_tokens=16, ignore_eos=True
    )
    groups = {"positive": tiny_models.prompts(2, 43), "negative": tiny_models.prompts(2, 44)}
    outputs, mlp, stream = run_engine(
        config(
            steerable, files, tensor_parallel_size=2, max_num_batched_tokens=16, max_num_seqs=16
        ),
        [
            {"op": "generate", "requests": requests},
            {"op": "mean_difference", **groups, "form": "mlp"},
            {"op": "mean_difference", **groups, "form": "residual"},
        ],
        env={**V1, "VLLM_CPU_OMP_THREADS_BIND": "0|1"},
    )
    assert_token_exact(steerable.verdicts(wanted, outputs), "tensor parallel 2, chunked")
    for form, found in (("mlp", mlp), ("residual", stream)):
        assert_close(found, mean_difference(steerable, groups, form))


@pytest.mark.slow
def test_compiled(steerable: Subject, files: dict[str, str], tmp_path: Path) -> None:
    """One more op a layer in one graph, and the effect in place survives Inductor."""
    requests, wanted = steerable.requests(
        tiny_models.prompts(3), matrix(steerable), max_tokens=16, ignore_eos=True
    )
    engine = config(steerable, files, enforce_eager=False)
    engine["additional_config"]["cna"]["record"] = False
    counts = tmp_path / "counts.json"
    (outputs,) = run_engine(
        engine,
        [{"op": "generate", "requests": requests}],
        env={
            **V1_HERE,
            "VLLM_CACHE_ROOT": str(tmp_path / "cache"),
            "COUNTS": str(counts),
        },
        setup=COUNT_OPS,
    )
    assert_token_exact(steerable.verdicts(wanted, outputs), "compiled")
    ops = {f"cna.{name}.default": LAYERS for name in ("act_and_mul_scaled", "add_vectors")}
    assert json.loads(counts.read_text()) == [ops]
