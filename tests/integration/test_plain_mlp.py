# SPDX-License-Identifier: Apache-2.0
"""MLPs without a gate where the table of models does not look: the GPU model runner with the Triton
kernel, both interpreted, two ranks, prompts in chunks and a warm prefix cache."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from tests import tiny_models
from tests.engine_job import V1, V2, run_engine
from tests.integration.conftest import Subject
from tests.models_row import GROUPS, arms, discovers_the_same, make_subject
from tests.models_zoo import build
from tests.oracles import assert_token_exact

pytestmark = [pytest.mark.engine, pytest.mark.slow]

TWO_RANKS = {**V1, "VLLM_CPU_OMP_THREADS_BIND": "0|1"}


@pytest.fixture(scope="module", params=["NemotronForCausalLM", "OPTForCausalLM"])
def subject(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Subject:
    """A module of its own between an activation and a linear, and a layer that is its own MLP."""
    folder = tmp_path_factory.mktemp(request.param)
    build(request.param, folder / "model")
    return make_subject(request.param, folder)


@pytest.mark.parametrize(
    ("env", "ranks"), [(V2, 1), (TWO_RANKS, 2)], ids=["v2", "tensor parallel 2"]
)
def test_steering_and_discovery(subject: Subject, env: Mapping[str, str], ranks: int) -> None:
    (short,) = tiny_models.prompts(1, longest=8)
    prompts = [short, (short * 80)[:80]]  # the second fills two blocks
    requests, wanted = subject.requests(prompts, arms(subject), max_tokens=5, ignore_eos=True)
    generate = {"op": "generate", "requests": requests}
    cold, warm, means = run_engine(
        subject.config(
            skip_tokenizer_init=True,
            max_model_len=128,
            max_num_seqs=16,
            max_num_batched_tokens=16,
            enable_prefix_caching=True,
            block_size=32,
            tensor_parallel_size=ranks,
            additional_config={"cna": {"circuits": dict(subject.files), "record": True}},
        ),
        [generate, generate, {"op": "record", "groups": GROUPS}],
        env=env,
    )
    for outputs in (cold, warm):
        assert_token_exact(subject.verdicts(wanted, outputs), "without a gate")
    assert len({tuple(output["token_ids"][0]) for output in cold}) > len(cold) / 2
    assert any(output["cached"] for output in warm)
    assert discovers_the_same(subject, means)
