# SPDX-License-Identifier: Apache-2.0
"""`cna-vllm serve` on SmolLM2 with two API server processes, driven by the openai client."""

from __future__ import annotations

import json
import random
import threading
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from hypothesis import HealthCheck, given, settings
from transformers import AutoTokenizer

from tests import tiny_models
from tests.integration import bad_input
from tests.integration.conftest import PLAIN, Subject
from tests.integration.test_fail_closed import BAD_REQUESTS
from tests.oracles import Arm, assert_token_exact
from tests.server import Server, serve

pytestmark = [pytest.mark.engine, pytest.mark.slow]

TOKENS = 12
QUESTION = "Name three fruits that are red."


@dataclass(frozen=True)
class Deployment:
    """A running server, what it was given, and the folders it reads and writes."""

    server: Server
    subject: Subject
    folder: Path
    arms: Mapping[str, Arm]
    arguments: Sequence[str]


@pytest.fixture(scope="module")
def deployed(smollm2: Subject, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    folder = tmp_path_factory.mktemp("serve")
    (folder / "circuits").mkdir()
    arms = {
        "one-off": smollm2.arm(("one", 0.0)),
        "one-half-all": smollm2.arm(("one", 0.5), scope="all"),
        "both": smollm2.arm(("one", 0.5), ("two", -1.0), scope="generated"),
    }
    arguments = [
        *(f"--circuit={name}={file}" for name, file in smollm2.files.items()),
        "--adapter=one-off=one@0",
        "--adapter=one-half-all=one@0.5:all",
        "--adapter=both=one@0.5+two@-1:generated",
        f"--circuit-dir={folder / 'circuits'}",
        f"--registry-dir={folder / 'registry'}",
        "--served-model-name=smollm2",
        "--max-circuits=6",
        "--max-model-len=512",
        "--max-num-seqs=16",
        "--api-server-count=2",
        "--enable-auto-tool-choice",
        "--tool-call-parser=hermes",
    ]
    with serve(smollm2.path, arguments, folder / "log") as server:
        yield Deployment(server, smollm2, folder, arms, arguments)


@pytest.fixture(scope="module")
def prompt(smollm2: Subject) -> list[int]:
    tokenizer = AutoTokenizer.from_pretrained(smollm2.path)
    ids: list[int] = tokenizer.apply_chat_template(
        [{"role": "user", "content": QUESTION}],
        tokenize=True,
        add_generation_prompt=True,
        return_dict=False,
    )
    return ids


def extra(fields: Mapping[str, Any] | None = None, **more: Any) -> dict[str, Any]:
    body: dict[str, Any] = {"return_token_ids": True, **more}
    return body if fields is None else {**body, "vllm_xargs": dict(fields)}


def test_every_form_of_selection_on_every_endpoint(deployed: Deployment, prompt: list[int]) -> None:
    """Fields and adapters; chat, completions and responses; whole and streamed; n and logprobs."""
    client = deployed.server.openai()
    names = {model.id: model for model in client.models.list()}
    assert {"smollm2", *deployed.arms} <= set(names)
    assert all(names[name].model_extra["parent"] == "smollm2" for name in deployed.arms)

    chat: dict[str, Any] = {
        "messages": [{"role": "user", "content": QUESTION}],
        "max_tokens": TOKENS,
        "temperature": 0,
    }
    fields = {"cna_circuit": "one", "cna_multiplier": 0.0}
    forms = [("smollm2", None, PLAIN), ("smollm2", fields, deployed.arms["one-off"])]
    forms += [(name, None, arm) for name, arm in deployed.arms.items()]
    wanted: list[tuple[list[int], Arm]] = []
    outputs: list[dict[str, Any]] = []

    def seen(token_ids: Sequence[int], arm: Arm) -> None:
        if (prompt, arm) in wanted:
            assert list(token_ids) in (o["token_ids"][0] for o in outputs)
        else:
            wanted.append((prompt, arm))
            outputs.append({"token_ids": [list(token_ids)]})

    for model, xargs, arm in forms:
        reply = client.chat.completions.create(
            model=model, logprobs=True, top_logprobs=2, extra_body=extra(xargs), **chat
        )
        assert reply.model == model
        choice = reply.choices[0]
        assert choice.logprobs is not None and len(choice.logprobs.content or ()) == len(
            choice.model_extra["token_ids"]
        )
        seen(choice.model_extra["token_ids"], arm)

        streamed: list[int] = []
        for chunk in client.chat.completions.create(
            model=model, stream=True, extra_body=extra(xargs), **chat
        ):
            assert chunk.model == model
            for part in chunk.choices:
                streamed += part.model_extra.get("token_ids") or []
        seen(streamed, arm)

        text = client.completions.create(
            model=model,
            prompt=[prompt, prompt],
            max_tokens=TOKENS,
            extra_body=extra(xargs, top_k=1),
            n=2,
        )
        assert len(text.choices) == 4
        for one in text.choices:
            seen(one.model_extra["token_ids"], arm)

        response = client.responses.create(
            model=model,
            input=QUESTION,
            max_output_tokens=TOKENS,
            temperature=0,
            extra_body={} if xargs is None else {"vllm_xargs": dict(xargs)},
        )
        assert response.output_text == choice.message.content
    assert_token_exact(deployed.subject.verdicts(wanted, outputs), "every form of selection")


def test_structured_output_and_tools_of_an_adapter(deployed: Deployment) -> None:
    client = deployed.server.openai()
    schema = {
        "type": "object",
        "properties": {"fruit": {"enum": ["apple", "cherry"]}},
        "required": ["fruit"],
        "additionalProperties": False,
    }
    ask: dict[str, Any] = {
        "model": "one-off",
        "messages": [{"role": "user", "content": "Which fruit?"}],
        "max_tokens": 40,
        "temperature": 0,
    }
    reply = client.chat.completions.create(
        response_format={
            "type": "json_schema",
            "json_schema": {"name": "fruit", "schema": schema, "strict": True},
        },
        **ask,
    )
    assert json.loads(reply.choices[0].message.content or "")["fruit"] in ("apple", "cherry")
    tool = {"type": "function", "function": {"name": "pick", "parameters": schema}}
    fields = {"cna_circuit": "one", "cna_multiplier": 0.0}
    calls = [
        client.chat.completions.create(
            **{**ask, "model": model}, tools=[tool], tool_choice="required", extra_body=body
        )
        .choices[0]
        .message
        for model, body in (("one-off", {}), ("smollm2", {"vllm_xargs": fields}))
    ]
    assert calls[0].content == calls[1].content
    arguments = [[c.function.arguments for c in call.tool_calls or ()] for call in calls]
    assert arguments[0] == arguments[1]


def test_a_base_model_cannot_be_named_twice(deployed: Deployment) -> None:
    """An adapter sets the steering; fields of the request beside it are refused."""
    client = deployed.server.openai()
    with pytest.raises(openai.BadRequestError, match="sets the steering") as error:
        client.chat.completions.create(
            model="one-off",
            messages=[{"role": "user", "content": "x"}],
            extra_body=extra({"cna_circuit": "two", "cna_multiplier": 0}),
        )
    assert error.value.param == "cna_circuit"
    tokens = deployed.server.http().post("/tokenize", json={"model": "one-off", "prompt": "Hello"})
    assert tokens.status_code == 200


def write_circuit(deployed: Deployment, name: str, seed: int) -> Mapping[int, tuple[int, ...]]:
    """A circuit file in the operator's folder; replaced as a whole."""
    channels = tiny_models.channels(30, 1536, 80, seed=seed)
    path = deployed.folder / "circuits" / name
    path.with_suffix(".new").write_text(json.dumps(tiny_models.circuit_object(channels, 30, 1536)))
    path.with_suffix(".new").rename(path)
    return channels


def post(http: httpx.Client, route: str, body: Any) -> httpx.Response:
    """Posts what `json` would refuse to write, NaN for instance; Python's servers take it."""
    headers = {"Content-Type": "application/json"}
    return http.post(route, content=json.dumps(body), headers=headers)


def load(http: httpx.Client, name: str, path: str, **more: Any) -> httpx.Response:
    return http.post(
        "/v1/load_cna_circuit", json={"circuit_name": name, "circuit_path": path, **more}
    )


def test_control_is_seen_by_all_servers_and_survives_a_kill(deployed: Deployment) -> None:
    """Two API servers share a port; a new connection may reach either."""
    write_circuit(deployed, "c.json", 3)
    with deployed.server.http() as http:
        assert load(http, "third", "c.json").status_code == 200
        adapter = {"adapter_name": "third-off", "circuit": "third", "multiplier": 0}
        assert http.post("/v1/load_cna_adapter", json=adapter).status_code == 200

    def listed(server: Server) -> None:
        for _ in range(12):
            with server.http() as http:
                models = {card["id"] for card in http.get("/v1/models").json()["data"]}
                assert {"third-off", "one-off", "smollm2"} <= models
                found = http.get("/v1/cna_circuits/third").json()
                assert found["neurons"] == 30 * 80 and not found["pinned"]
                body = {"model": "third-off", "prompt": "Hello", "max_tokens": 2}
                assert http.post("/v1/completions", json=body).status_code == 200

    listed(deployed.server)
    # A second server on the same registry, as after a kill: nothing that was acknowledged is lost.
    manifest = (deployed.folder / "registry" / "registry.json").read_text()
    assert set(json.loads(manifest)["circuits"]) == {"third"}
    with deployed.server.http() as http:
        for route, name in (("adapter", "third-off"), ("circuit", "third")):
            body = {f"{route}_name": name}
            assert http.post(f"/v1/unload_cna_{route}", json=body).status_code == 200
            assert http.post(f"/v1/unload_cna_{route}", json=body).status_code == 404
    for _ in range(12):
        with deployed.server.http() as http:
            body = {"model": "third-off", "prompt": "Hello", "max_tokens": 2}
            assert http.post("/v1/completions", json=body).status_code == 404


def test_isolation(deployed: Deployment) -> None:
    """No route without the key; no name that is taken; no path out, and none in a message."""
    routes = [
        ("GET", "/v1/cna_circuits"),
        ("GET", "/v1/cna_circuits/one"),
        ("GET", "/v1/cna_adapters"),
        *(
            ("POST", f"/v1/{do}_cna_{what}")
            for do in ("load", "unload")
            for what in ("circuit", "adapter")
        ),
    ]
    for method, route in routes:
        for headers in ({}, {"Authorization": "Bearer wrong"}):
            reply = httpx.request(method, deployed.server.url + route, headers=headers, json={})
            assert reply.status_code == 401, route
    write_circuit(deployed, "good.json", 4)
    outside = deployed.folder / "outside.json"
    outside.write_text((deployed.folder / "circuits" / "good.json").read_text())
    link = deployed.folder / "circuits" / "link.json"
    link.symlink_to(outside)
    with deployed.server.http() as http:
        for name in ("smollm2", "one", "one-off"):
            assert load(http, name, "good.json", load_inplace=True).status_code == 400, name
        for path in ("../outside.json", str(outside), "link.json", "nope.json", "./good.json", "."):
            reply = load(http, "new", path)
            assert reply.status_code == 400, path
            assert reply.json()["error"]["param"] == "circuit_path"
            assert str(deployed.folder) not in reply.text
        listed = http.get("/v1/cna_circuits").text + http.get("/v1/models").text
        assert str(deployed.folder) not in listed
        assert set(deployed.subject.files) == {
            c["id"] for c in http.get("/v1/cna_circuits").json()["data"]
        }


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


def test_under_load(deployed: Deployment, chats: list[list[int]]) -> None:
    """500 requests of eight clients while a circuit is loaded, reloaded and unloaded throughout.

    Every output is that of its arm; under a name that is reloaded, that of one of its contents.
    """
    contents = {
        name: write_circuit(deployed, name, seed)
        for seed, name in enumerate(("a.json", "b.json"), 5)
    }
    prompts = chats[:5]
    fixed = {"smollm2": PLAIN, **deployed.arms}
    hot = [Arm(((channels, 0.0),), "last") for channels in contents.values()]
    done = threading.Event()
    outcomes: list[tuple[list[int], str, list[int]]] = []
    gone: list[str] = []
    actions = []

    def change() -> None:
        rng = random.Random(1)
        with deployed.server.http() as http:
            while not done.is_set():
                if rng.random() < 0.2:
                    body = {"circuit_name": "hot"}
                    reply = http.post("/v1/unload_cna_circuit", json=body)
                    assert reply.status_code in (200, 404), reply.text
                else:
                    reply = load(http, "hot", rng.choice(list(contents)), load_inplace=True)
                    assert reply.status_code == 200, reply.text
                actions.append(reply.status_code)

    def ask(seed: int) -> None:
        rng = random.Random(seed)
        with deployed.server.http() as http:
            for _ in range(64):
                prompt, model = rng.choice(prompts), rng.choice([*fixed, "hot"])
                body: dict[str, Any] = {
                    "model": "smollm2" if model == "hot" else model,
                    "prompt": prompt,
                    "max_tokens": 5,
                    "temperature": 0,
                    "return_token_ids": True,
                }
                if model == "hot":
                    body["vllm_xargs"] = {"cna_circuit": "hot", "cna_multiplier": 0}
                reply = http.post("/v1/completions", json=body)
                if model == "hot" and reply.status_code == 400:
                    assert "no circuit is named 'hot'" in reply.text
                    gone.append(reply.text)
                    continue
                assert reply.status_code == 200, reply.text
                outcomes.append((prompt, model, reply.json()["choices"][0]["token_ids"]))

    with ThreadPoolExecutor(9) as pool:
        changer = pool.submit(change)
        for asked in [pool.submit(ask, seed) for seed in range(8)]:
            asked.result()
        done.set()
        changer.result()
    assert len(outcomes) + len(gone) == 512
    print(f"{len(outcomes)} outputs, {len(gone)} refused while unloaded, {len(actions)} changes")
    assert len(actions) > 20
    unique = {(tuple(p), model, tuple(tokens)) for p, model, tokens in outcomes}
    oracle = deployed.subject.oracle
    verdicts = []
    for prompt, model, tokens in sorted(unique):
        arms = hot if model == "hot" else [fixed[model]]
        checks = [oracle.check(prompt, tokens, arm) for arm in arms]
        verdicts.append(max(checks, key=lambda v: (v.equal, v.near_tie)))
    assert_token_exact(verdicts, "under load")
    with deployed.server.http() as http:
        http.post("/v1/unload_cna_circuit", json={"circuit_name": "hot"})
        assert "hot" not in {c["id"] for c in http.get("/v1/cna_circuits").json()["data"]}
        assert (
            "vllm" in http.get("/metrics").text
            and "cna:control_actions" in http.get("/metrics").text
        )
