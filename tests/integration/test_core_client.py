# SPDX-License-Identifier: Apache-2.0
"""Clients of the engine core that admit nothing: steered right or refused, never plain."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cna_vllm.steering.circuit import Circuit
from tests import core_client, tiny_models
from tests.integration.conftest import PLAIN, Subject
from tests.oracles import assert_token_exact
from tests.server import serve

pytestmark = pytest.mark.engine

LENGTH = {"max_tokens": 8, "ignore_eos": True}


def test_a_core_refuses_what_was_not_admitted_and_goes_on(tiny: Subject) -> None:
    (prompt,) = tiny_models.prompts(1)
    digest = Circuit.load(tiny.files["one"]).digest
    resolved = {"circuits": [[digest, 0.0]], "scope": "all"}
    arm = tiny.arm(("one", 0.0), scope="all")
    fields = tiny.fields(arm)["extra_args"]
    refused: list[tuple[dict[str, Any], str]] = [
        (fields, "cna_circuit: this request was not admitted"),
        ({"cna_scope": "all"}, "cna_scope: this request was not admitted"),
        ({"CNA_CIRCUIT": "one"}, "CNA_CIRCUIT: this request was not admitted"),
        ({"cna_resolved": resolved}, "cna_resolved: is set by the server only"),
        ({"cna_resolved": {**resolved, "seal": "0" * 64}}, "cna_resolved: is set by the server"),
        ({"cna_resolved": [1]}, "cna_resolved: malformed"),
        ({"cna_record": "positive"}, "cna_record: this engine does not record"),
    ]
    requests: list[dict[str, Any]] = [{"prompt": prompt}, {"prompt": prompt, "admit": fields}]
    requests += [{"prompt": prompt, "extra_args": extra_args} for extra_args, _ in refused]
    requests += [{"prompt": prompt, "admit": fields, "extra_args": {"cna_scope": "all"}}]
    requests += [{"prompt": prompt, "admit": fields}, {"prompt": prompt}]
    found = core_client.answers(tiny.config(), requests, LENGTH)
    good, bad = [*found[:2], *found[-2:]], found[2:-2]
    messages = [*(message for _, message in refused), "cna_scope: this request was not admitted"]
    for answer, message in zip(bad, messages, strict=True):
        assert not answer["token_ids"] and message in answer["error"], (message, answer)
    assert not any(answer["error"] for answer in good)
    arms = (PLAIN, arm, arm, PLAIN)
    outputs = [{"token_ids": [answer["token_ids"]]} for answer in good]
    assert_token_exact(
        tiny.verdicts([(prompt, a) for a in arms], outputs), "requests of the core's own client"
    )
    assert good[0] != good[1]


def test_a_core_without_circuits_refuses_too(tiny: Subject) -> None:
    (prompt,) = tiny_models.prompts(1)
    requests = [
        {"prompt": prompt, "extra_args": {"cna_circuit": "one", "cna_multiplier": 0.0}},
        {"prompt": prompt},
    ]
    bad, good = core_client.answers(tiny.config(additional_config={}), requests, LENGTH)
    assert "cna_circuit: this engine was started without circuits" in bad["error"]
    assert len(good["token_ids"]) == LENGTH["max_tokens"] and not good["error"]


def test_the_rust_front_end_is_refused_at_start(tiny: Subject, tmp_path: Path) -> None:
    """It admits nothing, so circuits would be of no use; the program is never run."""
    rust = {"VLLM_USE_RUST_FRONTEND": "1", "VLLM_RUST_FRONTEND_PATH": "/bin/false"}
    with (
        pytest.raises(AssertionError, match="the Rust front end does not admit requests"),
        serve(tiny.path, ["--skip-tokenizer-init"], tmp_path / "log", **rust),
    ):
        pass
