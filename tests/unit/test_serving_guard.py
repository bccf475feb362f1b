# SPDX-License-Identifier: Apache-2.0
"""The guard as an ASGI application: what passes does so byte for byte, the rest is a 400."""

from __future__ import annotations

import asyncio
import gzip
import json
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest

from cna_vllm.serving.front.guard import PLACES, SteeringGuard

SIGN = b'{"cna_circuit": "f"}'
PLAIN = b'{"prompt": "cna_circuit: circuit"}'


class Echo:
    """Keeps what it was sent."""

    def __init__(self) -> None:
        self.received: list[Any] = []

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        while True:
            message = await receive()
            self.received.append(message)
            if message["type"] != "http.request" or not message.get("more_body"):
                break
        if scope["type"] == "http":
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": b"{}"})


async def current(app: Any) -> None:
    pass


def ask(
    messages: Sequence[dict[str, Any]],
    path: str = "/v1/completions",
    *,
    names: Sequence[str] = (),
    **scope: Any,
) -> tuple[int, dict[str, Any], list[Any]]:
    """Status, answer, and what reached the application."""
    echo, sent = Echo(), []
    waiting = [*messages, {"type": "http.disconnect"}]

    async def receive() -> Any:
        return waiting.pop(0)

    async def send(message: Any) -> None:
        sent.append(message)

    full = {"type": "http", "method": "POST", "path": path, "query_string": b"", "app": None}
    full |= {"headers": [(b"content-type", b"application/json")], **scope}
    asyncio.run(SteeringGuard(echo, names=lambda app: names, catch_up=current)(full, receive, send))
    if full["type"] == "websocket":
        return sent[0].get("code", 0) if sent else 0, {}, echo.received
    body = b"".join(message.get("body", b"") for message in sent)
    return sent[0]["status"], json.loads(body), echo.received


def whole(body: bytes) -> list[dict[str, Any]]:
    return [{"type": "http.request", "body": body, "more_body": False}]


@pytest.mark.parametrize(
    "body",
    [
        b"",
        PLAIN,
        b"\xef\xbb\xbf" + PLAIN,
        PLAIN.decode().encode("utf-16"),
        b"{broken",
        b"[" * 10**6,
        b'{"prompt": "' + b"x" * 2**24 + b'"}',
        gzip.compress(SIGN, mtime=0),
        bytes(range(1, 97)) * 9,
    ],
    ids=["none", "text", "mark", "UTF-16", "broken", "deep", "huge", "gzip", "binary"],
)
def test_what_shows_no_sign_passes_unchanged(body: bytes) -> None:
    parts = [body[i : i + 2**20] for i in range(0, len(body), 2**20)] or [b""]
    messages = [{"type": "http.request", "body": part, "more_body": True} for part in parts]
    messages[-1]["more_body"] = False
    status, _, received = ask(messages)
    assert status == 200 and received == messages


def test_a_client_that_leaves_is_the_applications_to_see() -> None:
    messages = [{"type": "http.request", "body": SIGN[:9], "more_body": True}]
    _, _, received = ask(messages)
    assert [message["type"] for message in received] == ["http.request", "http.disconnect"]


@pytest.mark.parametrize("path", [*PLACES, "/tokenize", "/anything", "/v1/completions/"])
def test_a_sign_is_an_error_of_openais_form(path: str) -> None:
    for messages in (
        whole(SIGN),
        [{"type": "http.request", "body": SIGN[i : i + 1], "more_body": True} for i in range(99)],
    ):
        if messages[-1]["more_body"]:
            messages[-1]["more_body"] = False
        status, answer, received = ask(messages, path)
        assert status == 400 and not received
        error = answer["error"]
        assert error["param"] == "cna_circuit" and error["code"] == 400
        assert error["message"].startswith("cna_circuit: ") and error["type"] == "BadRequestError"


def test_the_place_depends_on_the_route_within_the_root() -> None:
    right = whole(b'{"vllm_xargs": {"cna_circuit": "f"}}')
    assert ask(right)[0] == 200
    assert ask(right, "/tokenize")[0] == 400
    assert ask(right, "/cna/v1/completions", root_path="/cna")[0] == 200
    assert ask(right, "/v1/completions", root_path="/cna")[0] == 200
    assert ask(right, "/cna/tokenize", root_path="/cna")[0] == 400
    generate = whole(b'{"sampling_params": {"extra_args": {"cna_circuit": "f"}}}')
    assert ask(generate, "/inference/v1/generate")[0] == 200
    assert ask(generate)[0] == 400


def test_queries_and_headers() -> None:
    for query in (b"cna_circuit=f", b"x=1&CNA=", b"circuit=f", b"c%6ea_x=1"):
        status, answer, _ = ask(whole(PLAIN), query_string=query)
        assert status == 400 and "query parameter" in answer["error"]["message"]
    assert ask(whole(PLAIN), query_string=b"x=cna&scope=other")[0] == 200
    for name in (b"X-CNA-Circuit", b"cna_circuit", b"Cna"):
        status, answer, _ = ask(whole(PLAIN), headers=[(name, b"f")])
        assert status == 400 and answer["error"]["param"] == name.decode().lower()
    assert ask(whole(PLAIN), headers=[(b"x-request-id", b"cna")])[0] == 200


def test_control_routes_and_reading_are_let_alone() -> None:
    for path in ("/v1/load_cna_adapter", "/v1/unload_cna_circuit"):
        assert ask(whole(b'{"circuit": "f", "scope": "all"}'), path)[0] == 200
    assert ask(whole(b""), "/v1/cna_circuits/f", method="GET")[0] == 200
    assert ask(whole(b""), "/health", method="GET", query_string=b"cna=1")[0] == 200


def test_forms_are_searched_for_names_only() -> None:
    """Their values are files, in which any bytes may be."""
    kind = [(b"content-type", b"multipart/form-data; boundary=b")]
    part = b'--b\r\nContent-Disposition: form-data; name="%s"; filename="cna"\r\n\r\n'
    part += b"\0cna\xff\r\n--b--"
    assert ask(whole(part % b"file"), "/v1/audio/transcriptions", headers=kind)[0] == 200
    for name in (b"cna_circuit", b"vllm_xargs[cna_circuit]", b"circuit"):
        status, answer, _ = ask(whole(part % name), "/v1/audio/transcriptions", headers=kind)
        assert status == 400 and answer["error"]["param"] == name.decode()
    kind = [(b"content-type", b"application/x-www-form-urlencoded")]
    assert ask(whole(b"x=cna"), headers=kind)[0] == 200
    assert ask(whole(b"c%6ea=x"), headers=kind)[0] == 400


def test_the_model_that_invocations_drops() -> None:
    """A name that stands for something is not taken from the body there, but from a header."""
    body, header = b'{"model": "f-off", "prompt": "x"}', b"X-Amzn-SageMaker-Adapter-Identifier"
    kind = (b"content-type", b"application/json")

    def status(names: list[str], *headers: tuple[bytes, bytes]) -> int:
        return ask(whole(body), "/invocations", names=names, headers=[kind, *headers])[0]

    assert status([]) == 200
    assert status(["f-off"]) == 400
    assert status(["f-off"], (header, b"f-off")) == 200
    assert status(["f-off"], (header, b"other")) == 400
    assert ask(whole(body), names=["f-off"])[0] == 200


def test_a_websocket_ends_at_the_first_sign() -> None:
    def code(**message: Any) -> tuple[int, str]:
        told = [{"type": "websocket.receive", **message}]
        found, _, received = ask(told, "/v1/realtime", type="websocket")
        return found, received[0]["type"]

    assert code(text=PLAIN.decode()) == (0, "websocket.receive")
    assert code(bytes=b"\xff") == (0, "websocket.receive")
    assert code(text=SIGN.decode()) == (1008, "websocket.disconnect")
    assert code(bytes=SIGN) == (1008, "websocket.disconnect")


def test_the_lifespan_is_let_alone() -> None:
    async def application(scope: Any, receive: Any, send: Any) -> None:
        await send(scope["type"])

    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    guard = SteeringGuard(application, names=lambda app: (), catch_up=current)
    asyncio.run(guard({"type": "lifespan"}, SimpleNamespace(), send))
    assert sent == ["lifespan"]
