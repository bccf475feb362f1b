# SPDX-License-Identifier: Apache-2.0
"""Discovery in the engine finds what Hugging Face hooks find."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from cna_vllm import Circuit
from tests.engine_job import V1, V2, run_engine
from tests.integration.conftest import Subject

pytestmark = pytest.mark.engine

POSITIVE = ["Bonjour, comment vas-tu ?", "Parle-moi de la mer.", "Écris un poème court."]
NEGATIVE = ["Hello, how are you?", "Tell me about the sea.", "Write a short poem.", "Why?"]


def oracle_delta(subject: Subject) -> torch.Tensor:
    """float64 [layers, intermediate_size] from hooks on the Hugging Face model."""
    tokenizer = AutoTokenizer.from_pretrained(subject.path)

    def mean(texts: list[str]) -> torch.Tensor:
        rows = []
        for text in texts:
            ids = tokenizer.apply_chat_template(
                [{"role": "user", "content": text}],
                tokenize=True,
                add_generation_prompt=True,
                return_dict=False,
            )
            rows.append(subject.oracle.down_proj_inputs(ids).double())
        return torch.stack(rows).mean(0)

    return mean(POSITIVE) - mean(NEGATIVE)


def check(circuit: Circuit, delta: torch.Tensor, k: int) -> None:
    """The k largest |delta|, in any order where relative differences are under 1e-5."""
    assert len(circuit) == k
    width = delta.shape[1]
    strength = delta.abs().flatten()
    threshold = float(strength.topk(k).values[-1])
    chosen = {n.layer * width + n.index for n in circuit.neurons}
    expected = set(strength.topk(k).indices.tolist())
    for index in chosen ^ expected:
        assert abs(float(strength[index]) - threshold) <= 1e-5 * threshold
    for neuron in circuit.neurons:
        want = float(delta[neuron.layer, neuron.index])
        assert abs(neuron.delta - want) <= 1e-4 * abs(want)


@pytest.mark.parametrize(
    ("runner", "options"),
    [(V1, {}), (V1, {"max_num_batched_tokens": 16, "max_num_seqs": 8}), (V2, {})],
    ids=["V1", "V1-chunked-16", "V2-interpreted"],
)
def test_discovery_equals_the_oracle(
    smollm2: Subject, runner: Mapping[str, str], options: Mapping[str, Any]
) -> None:
    engine = smollm2.config(additional_config={"cna": {"record": True}}, **options)
    sizes = (1, 46, 1000)
    steps = [
        {"op": "discover", "positive": POSITIVE, "negative": NEGATIVE, "top_k": k}
        for k in (sizes if runner is V1 else sizes[1:2])
    ]
    found = [Circuit.from_dict(c) for c in run_engine(engine, steps, env=runner)]
    delta = oracle_delta(smollm2)
    for circuit, step in zip(found, steps, strict=True):
        check(circuit, delta, step["top_k"])
    circuit = found[-1]
    assert circuit.architecture == "LlamaForCausalLM"
    assert (circuit.num_layers, circuit.intermediate_size) == (30, 1536)
    assert circuit.prompts["positive"] == 3
    assert circuit.prompts["negative"] == 4
