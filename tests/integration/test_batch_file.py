# SPDX-License-Identifier: Apache-2.0
"""vLLM's own batch runner with circuits: adapters as models, and fields, in one batch file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from tests.engine_forks import forks
from tests.integration.conftest import PLAIN, Subject
from tests.oracles import assert_token_exact
from tests.server import environment

pytestmark = [pytest.mark.engine, pytest.mark.slow]

QUESTION = [{"role": "user", "content": "Name three fruits that are red."}]
TOKENS = 12


def test_a_batch_file(smollm2: Subject, tmp_path: Path) -> None:
    """Every line gets its own arm; a line that is wrong gets an error, and costs no other line."""
    off = smollm2.arm(("one", 0.0))
    both = smollm2.arm(("one", 0.5), ("two", -1.0), scope="all")
    fields = {"cna_circuit": "one", "cna_multiplier": 0.0}
    lists = {"cna_circuit": ["one", "two"], "cna_multiplier": [0.5, -1.0], "cna_scope": "all"}
    lines: list[tuple[str, dict[str, Any], Any]] = [
        ("smollm2", {}, PLAIN),
        ("one-off", {}, off),
        ("smollm2", {"vllm_xargs": fields}, off),
        ("both", {}, both),
        ("smollm2", {"vllm_xargs": lists}, both),
        ("smollm2", {"vllm_xargs": {**fields, "cna_circuit": "nope"}}, "cna_circuit"),
        ("one-off", {"vllm_xargs": fields}, "sets the steering"),
        ("nope", {}, "does not exist"),
        ("smollm2", fields, "body.cna_circuit: is in body; put it into body.vllm_xargs"),
        ("smollm2", {"vllm_xargs": {"circuit": "one"}}, "did you mean cna_circuit?"),
        ("one-of", {}, "Did you mean one-off?"),
    ]
    ask = {"messages": QUESTION, "max_tokens": TOKENS, "temperature": 0, "return_token_ids": True}
    given, done = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    with given.open("w") as file:
        for number, (model, more, _) in enumerate(lines):
            line = {"custom_id": str(number), "method": "POST", "url": "/v1/chat/completions"}
            file.write(json.dumps({**line, "body": {**ask, "model": model, **more}}) + "\n")
    section = {
        "circuits": dict(smollm2.files),
        "adapters": {
            "one-off": {"circuit": "one", "multiplier": 0},
            "both": {"circuit": ["one", "two"], "multiplier": [0.5, -1], "scope": "all"},
        },
    }
    command = ["-i", str(given), "-o", str(done), "--model", smollm2.path]
    command += ["--served-model-name=smollm2", "--dtype=float32", "--enforce-eager"]
    command += ["--max-model-len=512", "--additional-config", json.dumps({"cna": section})]
    runner = "vllm.entrypoints.openai.run_batch"
    run = forks(interpreted=False).run_module(runner, command, environment(), timeout=600)
    assert run.status == 0, run.output[-6000:]
    replies = [json.loads(line) for line in done.read_text().splitlines()]
    assert [reply["custom_id"] for reply in replies] == [str(i) for i in range(len(lines))]
    prompt: list[int] = AutoTokenizer.from_pretrained(smollm2.path).apply_chat_template(
        QUESTION, tokenize=True, add_generation_prompt=True, return_dict=False
    )
    wanted, outputs = [], []
    for (model, _, expected), reply in zip(lines, replies, strict=True):
        response = reply["response"]
        if isinstance(expected, str):
            assert 400 <= response["status_code"] < 500, reply
            assert expected in json.dumps(reply), reply
        else:
            assert response["status_code"] == 200, reply
            assert response["body"]["model"] == model
            wanted.append((prompt, expected))
            outputs.append({"token_ids": [response["body"]["choices"][0]["token_ids"]]})
    assert_token_exact(smollm2.verdicts(wanted, outputs), "a batch file")
