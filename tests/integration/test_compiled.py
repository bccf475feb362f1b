# SPDX-License-Identifier: Apache-2.0
"""torch.compile, the default on GPUs: one op a layer, no graph break, the same tokens."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests import tiny_models
from tests.engine_job import V1_HERE, run_engine
from tests.integration.conftest import PLAIN, Subject
from tests.models_row import arms, make_subject
from tests.models_zoo import build
from tests.oracles import assert_token_exact

pytestmark = [pytest.mark.engine, pytest.mark.slow]

# Writes how often each of our ops stands in each graph that reaches Inductor. vLLM compiles with
# fullgraph=True, so a graph break would already be an error.
COUNT_OPS = """
import collections, json, os
from torch._inductor import compile_fx

original = compile_fx.compile_fx
counted = {}

def count(graph, *args, **kwargs):
    names = collections.Counter(str(n.target) for n in graph.graph.nodes)
    counted[id(graph)] = {k: v for k, v in names.items() if k.startswith("cna.")}
    with open(os.environ["COUNTS"], "w") as handle:
        json.dump(list(counted.values()), handle)
    return original(graph, *args, **kwargs)

compile_fx.compile_fx = count
"""


def test_compiled_equals_eager_and_oracle(tiny: Subject, tmp_path: Path) -> None:
    """Plain and steered rows; and addresses that loads, unloads and steps do not change."""
    requests, wanted = tiny.requests(
        tiny_models.prompts(6), tiny.matrix(), max_tokens=24, ignore_eos=True
    )
    plain, _ = tiny.requests(tiny_models.prompts(6), [PLAIN], max_tokens=24, ignore_eos=True)
    steps = [
        {"op": "status"},
        {"op": "generate", "requests": requests},
        {
            "op": "load",
            "name": "three",
            "circuit": tiny_models.circuit_object(
                tiny_models.channels(tiny_models.LAYERS, tiny_models.WIDTH, 7, seed=3)
            ),
        },
        {"op": "generate", "requests": requests},
        {"op": "unload", "name": "three"},
        {"op": "generate", "requests": plain},
        {"op": "status"},
    ]
    counts = tmp_path / "counts.json"
    results = run_engine(
        tiny.config(enforce_eager=False, enable_prefix_caching=False),
        steps,
        env={
            **V1_HERE,
            "VLLM_CACHE_ROOT": str(tmp_path / "cache"),
            "COUNTS": str(counts),
        },
        setup=COUNT_OPS,
    )
    before, outputs, _, again, _, unsteered, after = results
    assert_token_exact(tiny.verdicts(wanted, outputs), "compiled")
    assert [o["token_ids"] for o in again] == [o["token_ids"] for o in outputs]
    assert before[0]["addresses"] == after[0]["addresses"]

    eager = run_engine(
        tiny.config(enable_prefix_caching=False), [steps[1], {"op": "generate", "requests": plain}]
    )
    assert [o["token_ids"] for o in outputs] == [o["token_ids"] for o in eager[0]]
    assert [o["token_ids"] for o in unsteered] == [o["token_ids"] for o in eager[1]]

    graphs = json.loads(counts.read_text())
    assert graphs == [{"cna.act_and_mul_scaled.default": tiny_models.LAYERS}]


def test_compiled_mlps_without_a_gate(tmp_path: Path) -> None:
    """An op that writes in place, between an activation that is compiled and a linear."""
    name = "NemotronForCausalLM"
    build(name, tmp_path / "model")
    subject = make_subject(name, tmp_path)
    wanted_arms = arms(subject)
    requests, wanted = subject.requests(
        tiny_models.prompts(3), wanted_arms, max_tokens=12, ignore_eos=True
    )
    counts = tmp_path / "counts.json"
    (outputs,) = run_engine(
        subject.config(enforce_eager=False, skip_tokenizer_init=True),
        [{"op": "generate", "requests": requests}],
        env={**V1_HERE, "VLLM_CACHE_ROOT": str(tmp_path / "cache"), "COUNTS": str(counts)},
        setup=COUNT_OPS,
    )
    assert_token_exact(subject.verdicts(wanted, outputs), "compiled, without a gate")
    assert len({tuple(output["token_ids"][0]) for output in outputs}) > len(outputs) / 2
    # vLLM's activation is also a graph of its own, which has none of our ops.
    graphs = [graph for graph in json.loads(counts.read_text()) if graph]
    assert graphs == [{"cna.scale_rows.default": tiny_models.LAYERS}]
