# SPDX-License-Identifier: Apache-2.0
"""Every form of asking for steering, at every endpoint, on every kind of server: steered exactly,
or a 4xx that names the field; never answered plain."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests import tiny_models
from tests.integration import body_fuzzer, forms
from tests.integration.conftest import PLAIN, Subject, subject
from tests.integration.forms import CONTROLS, GENERATING, Endpoint, Form
from tests.oracles import Arm
from tests.server import serve

pytestmark = [pytest.mark.engine, pytest.mark.slow]

# Arguments and environment of each kind of server.
SERVERS: dict[str, tuple[list[str], dict[str, str]]] = {
    "one API server": (
        ["--api-server-count=1"],
        {"VLLM_SKIP_MODEL_NAME_VALIDATION": "1", "VLLM_ENABLE_RESPONSES_API_STORE": "1"},
    ),
    "two API servers": (["--api-server-count=2"], {}),
    "data parallel 2": (
        ["--api-server-count=1", "--data-parallel-size=2"],
        # vLLM 0.33 gives each engine a NUMA node of its own; these share what there is.
        {"VLLM_CPU_OMP_THREADS_BIND": "auto", "VLLM_CPU_SIM_MULTI_NUMA": "1"},
    ),
}


@pytest.fixture(scope="module")
def spoken(tmp_path_factory: pytest.TempPathFactory) -> Subject:
    """A tiny random Llama with a tokenizer and a chat template."""
    folder = tmp_path_factory.mktemp("spoken")
    path = tiny_models.add_tokenizer(tiny_models.llama(folder / "model"))
    return subject(str(path), folder, tiny_models.LAYERS, tiny_models.WIDTH, 20, {})


def arm_of(spoken: Subject, form: Form) -> Arm:
    if form.arm is None:
        return PLAIN
    pairs, scope = form.arm
    return spoken.arm(*pairs, scope=scope)


def greedy(spoken: Subject, prompt: Sequence[int], tokens: Sequence[int], arm: Arm) -> bool:
    """Whether these are the oracle's tokens for the arm, and for that only."""
    is_arm = spoken.oracle.check(prompt, tokens, arm).equal
    return is_arm and (arm == PLAIN or not spoken.oracle.check(prompt, tokens, PLAIN).equal)


def wrong(
    spoken: Subject, endpoint: Endpoint, form: Form, asked: tuple[httpx.Response, Any]
) -> str | None:
    """What is wrong with the answer to one cell, or None."""
    reply, outputs = asked
    if forms.takes(endpoint, form) or form in CONTROLS:
        if outputs is None:
            return f"{reply.status_code} {reply.text[:300]}"
        wanted = arm_of(spoken, form)
        if len(outputs) == 0 or not all(
            greedy(spoken, endpoint.prompt, o[-forms.TOKENS :], wanted) for o in outputs
        ):
            return f"other tokens than the oracle's: {outputs}"
        return None
    if not 400 <= reply.status_code < 500:
        return f"{reply.status_code} {reply.text[:300]}"
    said = (form.said,) if endpoint in GENERATING else (form.said, "cna", "steer")
    if not any(words in reply.text.replace('\\"', '"') for words in said):
        return f"says nothing of {form.said!r}: {reply.text[:300]}"
    if "cna_resolved" in reply.text and form.name != "resolved":
        return f"tells of what no client wrote: {reply.text[:300]}"
    return None


@pytest.mark.parametrize("name", SERVERS)
def test_steered_or_refused(spoken: Subject, name: str, tmp_path: Path) -> None:
    arguments, env = SERVERS[name]
    arguments = [
        *(f"--circuit={circuit}={file}" for circuit, file in spoken.files.items()),
        "--adapter=one-off=one@0",
        "--adapter=both=one@0.5+two@-1:all",
        f"--served-model-name={forms.BASE}",
        "--max-model-len=256",
        "--max-num-seqs=16",
        "--enable-scale-out",
        *arguments,
    ]
    problems, counts = [], Counter[str]()
    log = tmp_path / "log"
    with serve(spoken.path, arguments, log, **env) as server, server.http() as http:
        for number, (endpoint, form, request) in enumerate(forms.cells()):
            if form.name == "mistyped adapter" and "VLLM_SKIP_MODEL_NAME_VALIDATION" in env:
                continue  # the operator lets every name that stands for nothing be the base model
            if name.startswith("data parallel"):
                rank = {"X-data-parallel-rank": str(number % 2)}
                request = replace(request, headers={**request.headers, **rank})
            problem = wrong(spoken, endpoint, form, endpoint.ask(http, request))
            counts["steered" if forms.takes(endpoint, form) else "refused"] += 1
            if problem is not None:
                problems.append(f"{endpoint.path}, {form.name}: {problem}")
        for endpoint in GENERATING:
            for form in CONTROLS:
                request = form.put(endpoint, endpoint.request())
                assert request is not None
                problem = wrong(spoken, endpoint, form, endpoint.ask(http, request))
                counts["plain"] += 1
                if problem is not None:
                    problems.append(f"{endpoint.path}, {form.name}: {problem}")
        if name == "one API server":
            problems += fuzz(spoken, http)
            problems += models(http) + kept_responses(spoken, http)
            # Who has no key learns nothing of fields.
            keyless = httpx.post(f"{server.url}/v1/completions", json=forms.FIELDS)
            problems += [] if keyless.status_code == 401 else [keyless.text]
    print(name, dict(counts))
    assert not problems, f"{len(problems)}:\n" + "\n".join(problems[:40])
    assert counts["steered"] + counts["refused"] >= 300


def fuzz(spoken: Subject, http: httpx.Client) -> list[str]:
    """5,000 bodies in which the letters cna are in some key: none is answered plain."""
    problems = []
    counts = Counter[str]()
    fuzzer = body_fuzzer.Fuzzer(seed=11)

    @cache
    def steered(prompt: tuple[int, ...], tokens: tuple[int, ...], arm: str) -> bool:
        pairs, scope = json.loads(arm)
        wanted = spoken.arm(*((name, number) for name, number in pairs), scope=scope)
        is_arm = spoken.oracle.check(prompt, tokens, wanted).equal
        neutral = all(number == 1 for _, number in pairs)
        return is_arm and (neutral or not spoken.oracle.check(prompt, tokens, PLAIN).equal)

    for number in range(body_fuzzer.TRIES):
        endpoint, request = fuzzer.request()
        reply, outputs = endpoint.ask(http, request)
        counts[str(reply.status_code)] += 1
        if 400 <= reply.status_code < 500:
            continue
        arm = body_fuzzer.arm_of(endpoint, request)
        if (
            outputs is None
            or arm is None
            or not all(
                steered(tuple(endpoint.prompt), tuple(tokens), json.dumps(arm))
                for tokens in outputs
            )
        ):
            problems.append(f"try {number}, {endpoint.path}: {request}: {reply.text[:200]}")
    print("bodies", dict(counts))
    if counts["200"] < 100:
        problems.append(f"the fuzzer has hardly any body that is right: {counts}")
    return problems


def models(http: httpx.Client) -> list[str]:
    """Each model by its name, as OpenAI's clients ask for it."""
    cards = {card["id"]: card for card in http.get("/v1/models").json()["data"]}
    names = (forms.BASE, "one-off", "both", "one")
    found = {name: http.get(f"/v1/models/{name}") for name in names}
    problems = [name for name in names if (found[name].status_code == 200) != (name in cards)]
    if found["one-off"].json().get("parent") != forms.BASE:
        problems.append(found["one-off"].text)
    return problems


def kept_responses(spoken: Subject, http: httpx.Client) -> list[str]:
    """In the background, and after another one: each response as its own request asks."""
    ask = {"model": forms.BASE, "input": forms.WORDS, "max_output_tokens": forms.TOKENS}
    ask |= {"temperature": 0, "store": True, "vllm_xargs": forms.FIELDS}
    arm, problems = spoken.arm(("one", 0.0)), []
    first = http.post("/v1/responses", json={**ask, "background": True}).json()
    deadline = time.monotonic() + 60
    while first.get("status") != "completed" and time.monotonic() < deadline:
        time.sleep(0.05)
        first = http.get(f"/v1/responses/{first['id']}").json()
    prompt, tokens = forms.CHAT, forms.tokens_of_text(first["output"][0]["content"][0]["text"])
    if not greedy(spoken, prompt, tokens, arm):
        problems.append(f"background: {first}")
    prompt = [*prompt, *tokens, *forms.CHAT]
    for more, wanted in (({}, arm), ({"vllm_xargs": None}, PLAIN), ({"model": "one-off"}, arm)):
        after = {**ask, "previous_response_id": first["id"], **more}
        after = {k: v for k, v in after.items() if "model" not in more or k != "vllm_xargs"}
        reply = http.post("/v1/responses", json=after)
        (output,) = forms.tokens_of(reply)
        if not greedy(spoken, prompt, output, wanted):
            problems.append(f"after another, {more}: {reply.text}")
    return problems
