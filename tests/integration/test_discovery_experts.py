# SPDX-License-Identifier: Apache-2.0
"""Discovery of routed experts in the engine finds what hooks on Hugging Face's experts find.

Oracle: the down projection's input of every expert that a prompt's last token ran through, 0 for
all others; delta, counts and filter are written out below.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from cna_vllm import Circuit
from tests import tiny_models
from tests.engine_job import V1, V1_HERE, V2, run_engine
from tests.expert_models import DENSE, ExpertArm, ExpertModel, save
from tests.oracles import assert_token_exact

pytestmark = pytest.mark.engine

RULE = {"fraction": 0.1, "threshold": 0.5}
TOP = 40
# Of the largest mean activation: what float32's rounding leaves, in another order of sums.
TOLERANCE = 1e-5


@dataclass(frozen=True)
class Truth:
    """Of prompts, in the order of (layer, expert, index): activations float64 [prompts, neurons],
    and which prompts ran through a neuron's MLP."""

    triples: list[tuple[int, int, int]]
    values: NDArray[np.float64]
    routed: NDArray[np.bool_]

    @classmethod
    def of(cls, oracle: ExpertModel, prompts: Sequence[Sequence[int]]) -> Truth:
        triples = sorted(
            (layer, expert, index)
            for layer, widths in enumerate(oracle.widths())
            for expert, width in widths.items()
            for index in range(width)
        )
        seen = [oracle.neurons(prompt) for prompt in prompts]
        values = [[float(s[t[:2]][t[2]]) if t[:2] in s else 0.0 for t in triples] for s in seen]
        routed = [[t[:2] in s for t in triples] for s in seen]
        return cls(triples, np.array(values), np.array(routed))

    def strongest(self, k: int) -> list[set[int]]:
        """Of each prompt, its k neurons of largest |a|."""
        return [set(np.argsort(-np.abs(row), kind="stable")[:k].tolist()) for row in self.values]


def check(
    found: Mapping[str, Any], oracle: ExpertModel, above: Truth, below: Truth, universal: set[int]
) -> None:
    circuit = Circuit.from_dict(found)
    triples = above.triples
    delta = above.values.mean(0) - below.values.mean(0)
    scale = np.maximum(np.abs(above.values), 0).max()
    strength = np.abs(delta)
    strength[list(universal)] = 0
    order = np.argsort(-strength, kind="stable")
    expected = {triples[i] for i in order[:TOP]}
    chosen = {n.place for n in circuit.neurons}
    assert len(chosen) == TOP
    edge = strength[order[TOP - 1]]
    for place in chosen ^ expected:  # none but what rounding may change
        assert abs(strength[triples.index(place)] - edge) <= TOLERANCE * scale
    assert len(chosen & expected) >= TOP - 1
    routed = found["method"]["routed"]
    columns = (routed["positive"], routed["negative"], routed["delta"])
    for neuron, *says in zip(circuit.neurons, *columns, strict=True):
        at = triples.index(neuron.place)
        assert abs(neuron.delta - delta[at]) <= TOLERANCE * scale
        if neuron.expert is None:
            assert says == [None] * 3
            continue
        counts = [int(truth.routed[:, at].sum()) for truth in (above, below)]
        assert says[:2] == counts
        if not all(counts):
            assert says[2] is None
            continue
        means = [t.values[t.routed[:, at], at].mean() for t in (above, below)]
        assert abs(says[2] - (means[0] - means[1])) <= TOLERANCE * scale
    first = 3 * len(oracle.widths()) // 4
    late = [n.layer >= first for n in circuit.neurons if n.expert is not None]
    assert late, "the circuit must have routed neurons for this to prove much"
    assert routed["late"]["first_layer"] == first
    assert routed["late"]["routed"] == sum(late) / len(late)
    assert circuit.shape.widths == tuple(w.get(DENSE, 0) for w in oracle.widths())


def sets(longest: int = 60) -> tuple[list[list[int]], list[list[int]], list[list[int]]]:
    """Positive, negative and diverse prompts; those of one set begin alike."""
    above = [[7, 8, 9, *p] for p in tiny_models.prompts(5, seed=1, longest=longest)]
    below = [[17, 18, 19, *p] for p in tiny_models.prompts(4, seed=2, longest=longest)]
    return above, below, tiny_models.prompts(6, seed=3, longest=longest)


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "glm4_moe"])
def test_the_same_neurons(name: str, tmp_path: Path) -> None:
    """In chunks of prompts, the second pass with a warm prefix cache; in one of them with a
    bootstrap, scores of prompts that were held out, and the activations themselves."""
    engine = {"max_num_batched_tokens": 48, "block_size": 32}
    run(name, tmp_path, V1_HERE, longest=60, more=name == "glm4_moe", **engine)


def test_the_same_neurons_v2(tmp_path: Path) -> None:
    """Through the GPU model runner, kernels interpreted."""
    run("qwen3_moe", tmp_path, V2, longest=6)


def test_the_same_neurons_on_two_ranks(tmp_path: Path) -> None:
    """Each rank has half of every MLP; recorded among requests that are not, in one batch."""
    ranks = {**V1, "VLLM_CPU_OMP_THREADS_BIND": "0|1"}
    run("deepseek_v2", tmp_path, ranks, longest=60, mixed=True, tensor_parallel_size=2)


def run(
    name: str,
    folder: Path,
    runner: Mapping[str, str],
    *,
    longest: int,
    more: bool = False,
    mixed: bool = False,
    **options: Any,
) -> None:
    oracle = ExpertModel(tiny_models.add_tokenizer(save(name, folder / "model")))
    positive, negative, diverse = sets(longest)
    prompts = {"positive": positive, "negative": negative, "top_k": TOP}
    steps: list[dict[str, Any]] = [
        {"op": "discover", **prompts, "universal": "none"},
        {"op": "discover", **prompts, "universal": diverse, "rule": RULE},
    ]
    if more:
        steps += [
            {"op": "discover", **prompts, "universal": "none", "bootstrap": 3},
            {"op": "discover", **prompts, "universal": "none", "holdout": 0.4},
            {"op": "activations", "prompts": positive, "layers": [0, 3]},
            {"op": "generate", "requests": [{"prompt": p, "params": {}} for p in positive]},
            {"op": "self_test"},
        ]
    plain = tiny_models.prompts(3, seed=4, longest=longest)
    others = [{"prompt": p, "params": {"max_tokens": 4, "ignore_eos": True}} for p in plain]
    if mixed:
        groups = {"positive": positive, "negative": negative}
        steps.append({"op": "record_among", "recorded": groups, "others": others})
    engine = {
        "model": str(folder / "model"),
        "dtype": "float32",
        "enforce_eager": True,
        "max_model_len": 128,
        "max_num_seqs": 32,
        "enable_prefix_caching": True,
        "additional_config": {"cna": {"record": True}},
        **options,
    }
    unfiltered, filtered, *rest = run_engine(engine, steps, env=runner)
    above, below, spread = (Truth.of(oracle, p) for p in (positive, negative, diverse))
    size = len(above.triples)
    check(unfiltered, oracle, above, below, set())
    k = int(RULE["fraction"] * size)
    top = spread.strongest(k)
    needed = int(np.ceil(RULE["threshold"] * len(diverse)))
    universal = {i for i in range(size) if sum(i in prompt for prompt in top) >= needed}
    assert universal and filtered["method"]["universal"]["found"] == len(universal)
    check(filtered, oracle, above, below, universal)
    if more:
        resampled, held_out, rows, outputs, checks = rest
        assert [c["claim"] for c in checks if not c["holds"]] == [], "the doctor's self-test"
        assert any(output["cached"] for output in outputs), "later passes had a warm cache"
        check(resampled, oracle, above, below, set())
        assert len(resampled["method"]["bootstrap"]["frequency"]) == TOP
        assert 0 <= held_out["method"]["holdout"]["auroc"] <= 1
        layers = np.array([layer for layer, _, _ in above.triples])
        for layer, values in rows.items():
            expected = above.values[:, layers == int(layer)]
            assert np.abs(np.array(values) - expected).max() <= TOLERANCE * np.abs(expected).max()
    if mixed:
        (among,) = rest
        for group, truth in (("positive", above), ("negative", below)):
            found = np.concatenate(among["means"][group])
            expected = truth.values.mean(0)
            assert np.abs(found - expected).max() <= TOLERANCE * np.abs(truth.values).max()
        verdicts = [
            oracle.check(prompt, tokens, ExpertArm())
            for prompt, output in zip(plain, among["others"], strict=True)
            for tokens in output["token_ids"]
        ]
        assert_token_exact(verdicts, "beside a recording")
