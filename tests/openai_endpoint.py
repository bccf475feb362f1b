# SPDX-License-Identifier: Apache-2.0
"""A local server that speaks OpenAI's chat completions, and answers as a test wants it."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

GRADES = "#overall_reasoning It helps.\n#scores\n1.a No.\n1.b {}\n2.a So.\n2.b {}\n3.a So.\n3.b {}"
Reply = tuple[int, str | None]


class Endpoint(ThreadingHTTPServer):
    """`/v1/chat/completions`, answered by `reply`: from the request's body to status and text."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.reply: Callable[[dict[str, Any]], Reply] = lambda body: (200, "")
        self.bodies: list[dict[str, Any]] = []
        self.keys: list[str | None] = []

    @property
    def spec(self) -> str:
        return f"judge:url=http://127.0.0.1:{self.server_address[1]}/v1,model=grader"


class Handler(BaseHTTPRequestHandler):
    server: Endpoint

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.bodies.append(body)
        self.server.keys.append(self.headers["Authorization"])
        status, text = self.server.reply(body)
        answer: dict[str, Any] = {"error": {"message": text, "type": "x", "code": status}}
        if status == 200:
            message = {"role": "assistant", "content": text}
            choice = {"index": 0, "message": message, "finish_reason": "stop"}
            answer = {"id": "1", "object": "chat.completion", "created": 0, "model": "grader"}
            answer["choices"] = [choice]
        raw = json.dumps(answer).encode()
        self.send_response(status if self.path == "/v1/chat/completions" else 404)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(raw)))
        self.send_header("Retry-After-Ms", "1")
        self.end_headers()
        self.wfile.write(raw)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing on stderr."""


@contextmanager
def serving() -> Iterator[Endpoint]:
    """An endpoint, until the block is left."""
    with Endpoint() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()
