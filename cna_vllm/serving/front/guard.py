# SPDX-License-Identifier: Apache-2.0
"""Refuses requests that ask for steering where vLLM would not see it, before vLLM reads them.

A request passes unchanged, byte for byte, or is refused in vLLM's own form of errors. One that
shows no sign of steering is not parsed.
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from typing import Any
from urllib.parse import parse_qsl

from cna_vllm.serving.front.metrics import count_refused
from cna_vllm.steering.content import show
from cna_vllm.steering.misplaced import (
    EXTRA_ARGS,
    XARGS,
    Pairs,
    Path,
    first_sign,
    first_sign_in_text,
    top_level,
)
from cna_vllm.steering.request import SteeringError

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

INVOCATIONS = "/invocations"
ADAPTER_HEADER = "x-amzn-sagemaker-adapter-identifier"
_GENERATING = (
    "/v1/chat/completions",
    "/v1/chat/completions/batch",
    "/v1/completions",
    "/v1/messages",
    "/v1/responses",
)
PLACES: dict[str, Path] = {
    **dict.fromkeys(_GENERATING, XARGS),
    **{f"{path}/render": XARGS for path in _GENERATING if not path.endswith("/batch")},
    INVOCATIONS: XARGS,
    "/inference/v1/generate": EXTRA_ARGS,
}
"""Where each route takes steering fields; all others take none."""

_OURS = ("/v1/cna_", "/v1/load_cna_", "/v1/unload_cna_")
_READING = ("GET", "HEAD", "OPTIONS")
_FORM_NAMES = re.compile(rb'\bname="?([^";\r\n]*)')
_CLOSE_FOR_POLICY = 1008


class SteeringGuard:
    """ASGI middleware."""

    def __init__(
        self,
        app: App,
        names: Callable[[Any], Iterable[str]],
        catch_up: Callable[[Any], Awaitable[None]],
    ) -> None:
        """names: of circuits and adapters, for an application. catch_up: awaited before each HTTP
        request, so that what follows finds the names as they are now."""
        self._app = app
        self._names = names
        self._catch_up = catch_up

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = _route_path(scope)
        if scope["type"] == "http":
            await self._catch_up(scope["app"])
        if scope["type"] == "websocket":
            receive = _checked(receive, send)
        elif (
            scope["type"] == "http"
            and scope["method"] not in _READING
            and not path.startswith(_OURS)
        ):
            messages = [await receive()]
            while messages[-1].get("more_body"):
                messages.append(await receive())
            body = b"".join(m.get("body", b"") for m in messages)
            try:
                if messages[-1]["type"] == "http.request":  # the client is still there
                    self._check(scope, path, body)
            except SteeringError as error:
                await _refuse(error, scope, receive, send)
                return
            receive = _replayed(messages, receive)
        await self._app(scope, receive, send)

    def _check(self, scope: Scope, path: str, body: bytes) -> None:
        """Raises SteeringError for a request that would be answered plain."""
        place = PLACES.get(path)
        headers = {key.decode("latin-1").lower(): value for key, value in scope["headers"]}
        for name in headers:
            if name.removeprefix("x-").startswith("cna"):
                raise SteeringError(name, "is a header, which steers nothing; " + _use(place))
        query = Pairs(parse_qsl(scope["query_string"].decode("latin-1"), keep_blank_values=True))
        if (error := first_sign(query, None)) is not None:
            problem = "is a query parameter, which steers nothing; " + _use(place)
            raise SteeringError(error.field, problem)
        content_type = headers.get("content-type", b"").lower()
        if content_type.startswith((b"multipart/", b"application/x-www-form-urlencoded")):
            error = first_sign(_form(body, content_type), None)
        else:
            error = first_sign_in_text(body, place)
        if error is not None:
            raise error
        if path == INVOCATIONS:
            self._check_dropped_model(scope, headers, body)

    def _check_dropped_model(
        self, scope: Scope, headers: MutableMapping[str, bytes], body: bytes
    ) -> None:
        """vLLM takes the model of ``/invocations`` from a header, and drops the body's."""
        model = top_level(body, "model")
        header = headers.get(ADAPTER_HEADER, b"").decode("latin-1")
        if isinstance(model, str) and model != header and model in self._names(scope["app"]):
            raise SteeringError(
                "model",
                f"{show(model)} is not taken from the body here, but from the header "
                f"{ADAPTER_HEADER}; name an adapter there",
            )


def _use(place: Path | None) -> str:
    return "remove it" if place is None else f"use {'.'.join(place)} in the body"


def _route_path(scope: Scope) -> str:
    path: str = scope.get("path", "")
    root: str = scope.get("root_path", "").rstrip("/")
    return path[len(root) :] if path.startswith(f"{root}/") else path


def _form(body: bytes, content_type: bytes) -> Pairs:
    """The fields of a form, without their values, which may be files."""
    if content_type.startswith(b"multipart/"):
        names = [name.decode("utf-8", "replace") for name in _FORM_NAMES.findall(body)]
    else:
        pairs = parse_qsl(body.decode("latin-1"), keep_blank_values=True)
        names = [name for name, _ in pairs]
    return Pairs((name, None) for name in names)


def _replayed(messages: list[Message], receive: Receive) -> Receive:
    """What was read, and then what is still to come."""
    left = iter(messages)

    async def replay() -> Message:
        for message in left:
            return message
        return await receive()

    return replay


def _checked(receive: Receive, send: Send) -> Receive:
    """Ends a connection at the first message that asks for steering."""

    async def checked() -> Message:
        message = await receive()
        if message["type"] == "websocket.receive":
            raw = message.get("bytes") or (message.get("text") or "").encode("utf-8", "replace")
            if (error := first_sign_in_text(raw, None)) is not None:
                count_refused(error)
                reason = str(error).encode("ascii", "replace")[:120].decode()
                code = _CLOSE_FOR_POLICY
                await send({"type": "websocket.close", "code": code, "reason": reason})
                return {"type": "websocket.disconnect", "code": code, "reason": reason}
        return message

    return checked


async def _refuse(error: SteeringError, scope: Scope, receive: Receive, send: Send) -> None:
    from starlette.responses import JSONResponse

    count_refused(error)
    body = {"message": str(error), "type": "BadRequestError", "param": error.field, "code": 400}
    await JSONResponse({"error": body}, status_code=400)(scope, receive, send)
