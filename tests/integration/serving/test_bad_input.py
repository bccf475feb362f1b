# SPDX-License-Identifier: Apache-2.0
"""Malformed requests and files: each a 4xx that names what is wrong, and nothing else happens."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings

from tests.integration.serving import bad_input
from tests.integration.serving.deployment import Deployment, load
from tests.integration.test_fail_closed import BAD_REQUESTS

pytestmark = [pytest.mark.engine, pytest.mark.slow]


def post(http: httpx.Client, route: str, body: Any) -> httpx.Response:
    """Posts what `json` would refuse to write, NaN for instance; Python's servers take it."""
    headers = {"Content-Type": "application/json"}
    return http.post(route, content=json.dumps(body), headers=headers)


@pytest.mark.parametrize("stream", [False, True])
def test_bad_fields_are_4xx(deployed: Deployment, stream: bool) -> None:
    """An OpenAI-style error object that names the field, before any stream begins."""
    with deployed.server.http() as http:
        for fields, message in BAD_REQUESTS:
            body = {"model": "smollm2", "messages": [{"role": "user", "content": "Hello"}]}
            body |= {"max_tokens": 4, "stream": stream, "vllm_xargs": fields}
            reply = post(http, "/v1/chat/completions", body)
            assert reply.status_code == 400, fields
            if isinstance(fields.get("cna_resolved"), dict):
                continue  # vLLM's request model itself refuses nested values
            error = reply.json()["error"]
            assert error["param"].startswith("cna_"), fields
            # A boolean is refused by the request model, where it is still one.
            assert message in error["message"] or "not true" in error["message"], fields
        body = {"model": "smollm2", "messages": [{"role": "user", "content": "Hello"}]}
        body |= {"use_beam_search": True, "vllm_xargs": {"cna_circuit": "one", "cna_multiplier": 0}}
        reply = http.post("/v1/chat/completions", json=body)
        assert reply.status_code == 400 and "beam search cannot be steered" in reply.text


def test_malformed_input_is_always_a_4xx(deployed: Deployment) -> None:
    """2,000 requests and files that are wrong in every way; then everything is as it was."""
    counts: Counter[str] = Counter()
    with deployed.server.http() as http:
        before = [http.get(f"/v1/cna_{what}").json() for what in ("circuits", "adapters")]

        def refused(kind: str, reply: httpx.Response, *fields: str) -> None:
            assert 400 <= reply.status_code < 500, (reply.status_code, reply.text)
            error = reply.json()["error"] if "error" in reply.json() else reply.json()["detail"]
            assert any(field in json.dumps(error) for field in fields), (fields, reply.text)
            counts[kind] += 1

        @settings(max_examples=1000, deadline=None, suppress_health_check=list(HealthCheck))
        @given(bad_input.steering())
        def steering(body: dict[str, Any]) -> None:
            fields = ("cna_", "vllm_xargs", "model", "parsing", "JSON")
            refused("steering", post(http, "/v1/completions", body), *fields)

        @settings(max_examples=600, deadline=None, suppress_health_check=list(HealthCheck))
        @given(bad_input.control())
        def control(case: tuple[str, Any]) -> None:
            route, body = case
            reply = post(http, f"/v1/{route}", body)
            refused("control", reply, "circuit", "adapter", "body", "multiplier", "JSON", "parsing")

        @settings(max_examples=400, deadline=None, suppress_health_check=list(HealthCheck))
        @given(bad_input.circuit_file())
        def files(content: bytes) -> None:
            (deployed.folder / "circuits" / "bad.json").write_bytes(content)
            refused("file", load(http, "bad", "bad.json"), "circuit_path")

        for check in (steering, control, files):
            check()
        with open(deployed.folder / "circuits" / "giant.json", "wb") as giant:
            giant.truncate(2**30)
        refused("file", load(http, "bad", "giant.json"), "circuit_path")
        after = [http.get(f"/v1/cna_{what}").json() for what in ("circuits", "adapters")]
        assert after == before
        body = {"model": "one-off", "prompt": "Hello", "max_tokens": 2}
        assert http.post("/v1/completions", json=body).status_code == 200
    print(dict(counts))
    assert sum(counts.values()) >= 2000
