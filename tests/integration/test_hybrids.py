# SPDX-License-Identifier: Apache-2.0
"""MLPs between layers with a state: Mamba and linear attention. A state, too, is shared only among
requests that are steered alike up to its position."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests import models_half, tiny_models
from tests.engine_job import run_engine
from tests.integration.conftest import PLAIN
from tests.models_row import make_subject
from tests.models_zoo import build
from tests.oracles import assert_token_exact
from tests.torchvision_stand_in import SETUP

pytestmark = pytest.mark.engine

# Of vLLM's own choice, since a block of attention must have the size of a state.
BLOCK = 64


@pytest.mark.parametrize(
    "name",
    [
        "FalconH1ForCausalLM",
        "GraniteMoeHybridForCausalLM",
        "NemotronHForCausalLM",
    ],
)
def test_states_are_shared_as_blocks_are(name: str, tmp_path: Path) -> None:
    """One request after the other, each with the tokens that it finds; then all in one batch, in
    chunks, on what they left and on nothing."""
    build(name, tmp_path / "model")
    subject = make_subject(name, tmp_path)
    prompt = (tiny_models.prompts(1, seed=6)[0] * 99)[: 2 * BLOCK + 7]
    off = {scope: subject.arm(("one", 0.0), scope=scope) for scope in ("last", "all", "generated")}
    shared = [
        (PLAIN, 0),
        (off["last"], 2 * BLOCK),
        (off["generated"], 2 * BLOCK),
        (off["all"], 0),
        (off["all"], 2 * BLOCK),
        (subject.arm(("one", 0.5), scope="all"), 0),
        (subject.arm(("two", 0.0), scope="all"), 0),
        (PLAIN, 2 * BLOCK),
    ]
    params = {"max_tokens": 5, "ignore_eos": True}
    requests, wanted = subject.requests([prompt], [arm for arm, _ in shared], **params)
    many, asked = subject.requests([prompt[:90], prompt], subject.matrix(), **params)
    forget = {"op": "run", "code": "llm.reset_prefix_cache()"}
    *alone, warm, _, cold = run_engine(
        subject.config(
            skip_tokenizer_init=True,
            max_model_len=256,
            max_num_seqs=16,
            max_num_batched_tokens=96,
            enable_prefix_caching=True,
        ),
        [
            *({"op": "generate", "requests": [request]} for request in requests),
            {"op": "generate", "requests": many},
            forget,
            {"op": "generate", "requests": many},
        ],
    )
    outputs = [step[0] for step in alone]
    assert_token_exact(subject.verdicts(wanted, outputs), f"{name}, one by one")
    assert [output["cached"] for output in outputs] == [count for _, count in shared]
    for outputs, what in ((warm, "warm"), (cold, "cold")):
        assert_token_exact(subject.verdicts(asked, outputs), f"{name}, {what}")
    assert len({tuple(output["token_ids"][0]) for output in cold}) > len(cold) / 2


def test_states_of_linear_attention_are_shared_as_blocks_are(tmp_path: Path) -> None:
    """vLLM runs it in bfloat16 only, in which no oracle has its text: what is told are the tokens
    that each request finds, and that steering acts."""
    name = "Qwen3_5ForCausalLM"
    build(name, tmp_path / "model")
    files = models_half.circuits(name, tmp_path)
    block = 256  # of vLLM's own choice, too
    prompt = (tiny_models.prompts(1, seed=6)[0] * 200)[: block + 7]
    params = {"max_tokens": 5, "ignore_eos": True}
    plain = {"prompt": prompt, "params": params}

    def off(scope: str, multiplier: float = 0.0) -> dict[str, Any]:
        fields = {"cna_circuit": "part-0", "cna_multiplier": multiplier, "cna_scope": scope}
        return {"prompt": prompt, "params": {**params, "extra_args": fields}}

    shared = [
        (plain, 0),
        (off("last"), block),
        (off("generated"), block),
        (off("all"), 0),
        (off("all"), block),
        (off("all", 0.5), 0),
        (plain, block),
    ]
    steps = run_engine(
        {
            "model": str(tmp_path / "model"),
            "skip_tokenizer_init": True,
            "dtype": "bfloat16",
            "enforce_eager": True,
            "max_model_len": 320,
            "enable_prefix_caching": True,
            "additional_config": {"cna": {"circuits": files}},
        },
        [{"op": "generate", "requests": [request]} for request, _ in shared],
        setup=SETUP,
    )
    assert [step[0]["cached"] for step in steps] == [count for _, count in shared]
    texts = [step[0]["token_ids"] for step in steps]
    assert texts[0] not in (texts[1], texts[3], texts[5]) and texts[3] == texts[4]
