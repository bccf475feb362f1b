# SPDX-License-Identifier: Apache-2.0
"""After a SIGKILL and a restart: what was acknowledged is there; LoRA adapters beside circuits."""

from __future__ import annotations

import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from tests.integration.conftest import PLAIN
from tests.integration.serving.deployment import (
    TOKENS,
    Deployment,
    Restart,
    answer,
    extra,
    load,
    unload,
)
from tests.lora import merged
from tests.oracles import Arm, HookedModel, assert_token_exact

pytestmark = [pytest.mark.engine, pytest.mark.slow]


def test_a_kill_loses_nothing_that_was_acknowledged(
    deployed: Deployment, restarted: Restart, prompt: list[int]
) -> None:
    """Every file is whole, and says what was told last, or what the unanswered action wanted."""
    operator = restarted.operator
    assert not operator.refused and operator.replies >= 40
    assert restarted.stored in operator.possible
    assert restarted.stored, "the state that was kept must not be the empty one"
    for state, models in restarted.listed:
        assert state == restarted.stored
        adapters = {name for name, entry in restarted.stored.items() if "digest" not in entry}
        assert adapters | set(deployed.arms) | {"smollm2", "lora"} == models
    verdicts = []
    for name, tokens in restarted.answers.items():
        channels = restarted.contents[restarted.stored[name]["digest"]]
        arm = Arm(((channels, 0.0),), "last")
        verdicts.append(deployed.subject.oracle.check(prompt, tokens, arm))
    assert_token_exact(verdicts, "circuits after a kill")


def test_lora_adapters_beside_and_together_with_circuits(
    deployed: Deployment, restarted: Restart, chats: list[list[int]]
) -> None:
    """All at once, on prompts they share, against the model and one with the LoRA merged."""
    off = deployed.arms["one-off"]
    adapter = {"adapter_name": "lora-off", "circuit": "one", "multiplier": 0, "lora": "lora"}
    fields = {"cna_circuit": "one", "cna_multiplier": 0.0}
    plain_oracle = deployed.subject.oracle
    lora_oracle = merged(deployed.subject.path, restarted.lora)
    forms: list[tuple[str, Mapping[str, Any] | None, Arm, HookedModel]] = [
        ("smollm2", None, PLAIN, plain_oracle),
        ("one-off", None, off, plain_oracle),
        ("lora", None, PLAIN, lora_oracle),
        ("lora", fields, off, lora_oracle),
        ("lora-off", None, off, lora_oracle),
    ]
    asked = [(prompt, *form) for prompt in chats[:4] for form in forms]
    with deployed.server.http() as http, ThreadPoolExecutor(8) as pool:
        assert http.post("/v1/load_cna_adapter", json=adapter).status_code == 200
        try:
            outputs = list(pool.map(lambda a: answer(http, a[1], a[0], a[2]), asked))
            ask = {"model": "lora-off", "prompt": chats[0], "max_tokens": TOKENS, "top_k": 1}
            streamed = http.post("/v1/completions", json={**ask, "stream": True, **extra()}).text
        finally:
            unload(http, "adapter", "lora-off")
        # Names are one space: neither may take the other's.
        reply = load(http, "lora", "k0.json")
        assert reply.status_code == 400 and "'lora' is that of a served model" in reply.text
        reply = http.post("/v1/load_cna_adapter", json={**adapter, "lora": "nope"})
        assert reply.status_code == 404 and reply.json()["error"]["param"] == "lora"
    chunks = [json.loads(line[6:]) for line in streamed.splitlines() if line.startswith("data: {")]
    pieces = [token for chunk in chunks for token in chunk["choices"][0]["token_ids"] or ()]
    assert pieces == outputs[len(forms) - 1] and {chunk["model"] for chunk in chunks} == {
        "lora-off"
    }
    verdicts = [
        oracle.check(prompt, tokens, arm)
        for (prompt, _, _, arm, oracle), tokens in zip(asked, outputs, strict=True)
    ]
    assert_token_exact(verdicts, "LoRA and circuits")
    first = [tuple(tokens) for tokens in outputs[: len(forms)]]
    assert len(set(first[:4])) == 4, "the four settings must be told apart by their outputs"
