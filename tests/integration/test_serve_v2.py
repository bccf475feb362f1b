# SPDX-License-Identifier: Apache-2.0
"""The server on the GPU model runner (V2) with the real Triton kernel, through the interpreter."""

from __future__ import annotations

import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests import tiny_models
from tests.engine_job import V2
from tests.integration.conftest import PLAIN, Subject
from tests.oracles import Arm, assert_token_exact
from tests.server import serve
from tests.vector_files import random_vectors, save_vectors

pytestmark = [pytest.mark.engine, pytest.mark.slow]


def test_names_and_fields(tiny: Subject, tmp_path: Path) -> None:
    """Adapters and fields, mixed in one batch; and LoRA adapters may not take their names, nor
    that of a set of vectors."""
    env = {**V2, "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"}
    off, both = tiny.arm(("one", 0.0)), tiny.arm(("one", 0.5), ("two", -1.0), scope="all")
    lists = {"cna_circuit": ["one", "two"], "cna_multiplier": [0.5, -1.0], "cna_scope": "all"}
    forms: list[tuple[str, Mapping[str, Any] | None, Arm]] = [
        ("tiny", None, PLAIN),
        ("off", None, off),
        ("tiny", {"cna_circuit": "one", "cna_multiplier": 0.0}, off),
        ("both", None, both),
        ("tiny", lists, both),
    ]
    caa = save_vectors(tmp_path, {"caa": random_vectors("mlp", (0,), 3, 0.5)})
    arguments = [
        *(f"--circuit={name}={file}" for name, file in tiny.files.items()),
        "--adapter=off=one@0",
        f"--additional-config={json.dumps({'cna': {'vectors': caa, 'max_vectors': 1}})}",
        "--adapter=both=one@0.5+two@-1:all",
        "--served-model-name=tiny",
        "--skip-tokenizer-init",
        "--max-model-len=128",
        "--max-num-seqs=16",
    ]
    asked = [(prompt, form) for prompt in tiny_models.prompts(2) for form in forms]
    with serve(tiny.path, arguments, tmp_path / "log", **env) as server, server.http() as http:

        def answer(one: tuple[list[int], tuple[str, Mapping[str, Any] | None, Arm]]) -> list[int]:
            prompt, (model, fields, _) = one
            body = {"model": model, "prompt": prompt, "max_tokens": 6, "temperature": 0}
            body |= {"ignore_eos": True, "return_token_ids": True}
            body |= {} if fields is None else {"vllm_xargs": fields}
            reply = http.post("/v1/completions", json=body)
            assert reply.status_code == 200 and reply.json()["model"] == model, reply.text
            tokens: list[int] = reply.json()["choices"][0]["token_ids"]
            return tokens

        with ThreadPoolExecutor(len(asked)) as pool:
            outputs = list(pool.map(answer, asked))
        for name in ("one", "off", "caa"):
            clash = {"lora_name": name, "lora_path": "/nowhere"}
            reply = http.post("/v1/load_lora_adapter", json=clash)
            assert reply.status_code == 400 and f"lora_name: '{name}'" in reply.text
    assert "Using V2 Model Runner" in (tmp_path / "log").read_text()
    wanted = [(prompt, arm) for prompt, (_, _, arm) in asked]
    verdicts = tiny.verdicts(wanted, [{"token_ids": [tokens]} for tokens in outputs])
    assert_token_exact(verdicts, "the server on the V2 runner")
