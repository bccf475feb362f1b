# SPDX-License-Identifier: Apache-2.0
"""Bodies of requests with the letters `cna` in some key, in every place and spelling."""

from __future__ import annotations

import copy
import json
import random
from typing import Any

from cna_vllm.steering.request import FIELDS
from tests.integration.forms import GENERATING, OTHERS, Body, Endpoint, Request

TRIES = 5000
_CONTAINERS = ("vllm_xargs", "extra_args", "sampling_params", "extra_body", "metadata", "tools")
_CONTAINERS += ("response_format", "chat_template_kwargs", "stream_options", "structured_outputs")
_CONTAINERS += ("documents", "kv_transfer_params", "logit_bias", "steering", "x")
_LETTERS = "abcnx_-. 1\u00e9\u2011\u200b"
_RIGHT: tuple[Body, ...] = (
    {"cna_circuit": "one", "cna_multiplier": 0.0},
    {"cna_circuit": "two", "cna_multiplier": -1, "cna_scope": "all"},
    {"cna_circuit": ["one", "two"], "cna_multiplier": [0.5, -1.0], "cna_scope": "generated"},
    {"cna_circuit": ["one"], "cna_multiplier": [2.0]},
    {"cna_circuit": "one", "cna_multiplier": 1.0},
)


class Fuzzer:
    """The same bodies for the same seed."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)

    def request(self) -> tuple[Endpoint, Request]:
        endpoint = self._random.choice(GENERATING if self._random.random() < 0.9 else OTHERS)
        body = copy.deepcopy(endpoint.body)
        right = self._random.random() < 0.3
        if right:
            at = body
            for key in endpoint.place:
                at = at.setdefault(key, {})
            at.update(copy.deepcopy(self._random.choice(_RIGHT)))
        for _ in range(self._random.randrange(1 - right, 3)):
            self._add(body)
        return endpoint, Request(body, content=self._written(body))

    def _add(self, body: Body) -> None:
        at = self._object(body)
        for _ in range(self._random.choice((0, 0, 1, 1, 2))):
            inner: Any = {}
            key = self._random.choice(_CONTAINERS)
            at[key] = [inner] if self._random.random() < 0.2 else inner
            at = inner
        at[self._key()] = self._value()

    def _object(self, body: Body) -> Body:
        """Any object of the body."""
        objects, queue = [], [body]
        while queue:
            value: Any = queue.pop()
            if isinstance(value, dict):
                objects.append(value)
            queue += value.values() if isinstance(value, dict) else value
            queue = [v for v in queue if isinstance(v, dict | list)]
        return self._random.choice([body, *objects])

    def _key(self) -> str:
        """With the letters, and not only in the middle of `...c` + `name`."""
        while True:
            key = self._random.choice((*FIELDS, "cna", "cna_resolved", "cna_record", "docname"))
            for _ in range(self._random.randrange(4)):
                at = self._random.randrange(len(key) + 1)
                rest = key[at + self._random.randrange(2) :]
                key = key[:at] + self._random.choice(_LETTERS) + rest
            key = "".join(c.upper() if self._random.random() < 0.2 else c for c in key)
            if "cna" in key.casefold().replace("cname", ""):
                return key

    def _value(self) -> Any:
        values = ("one", "one-off", 0.0, 2, None, True, "all", ["one"], {"circuit": "one"})
        return copy.deepcopy(self._random.choice(values))

    def _written(self, body: Body) -> bytes:
        text = json.dumps(body, ensure_ascii=self._random.random() < 0.5)
        if self._random.random() < 0.2:
            letter = self._random.choice("cnaA")
            text = text.replace(letter, f"\\u{ord(letter):04x}")
        encoding = self._random.choice(("utf-8",) * 6 + ("utf-8-sig", "utf-16", "utf-32-be"))
        return text.encode(encoding, "surrogatepass")


def arm_of(endpoint: Endpoint, request: Request) -> tuple[list[tuple[str, float]], str] | None:
    """(circuit, multiplier) pairs and a scope of a body whose only keys with `cna` are fields in
    their place; None for any other body."""
    assert request.content is not None
    body = json.loads(request.content)
    at: Any = body
    for key in endpoint.place:
        at = at.get(key, {}) if isinstance(at, dict) else {}
    if endpoint not in GENERATING or not isinstance(at, dict):
        return None
    fields = {key: at[key] for key in FIELDS if key in at}
    if len(fields) != _count(body) or "cna_circuit" not in fields:
        return None
    names, numbers = fields["cna_circuit"], fields["cna_multiplier"]
    if not isinstance(names, list):
        names, numbers = [names], [numbers]
    return list(zip(names, numbers, strict=True)), fields.get("cna_scope", "last")


def _count(value: Any) -> int:
    """Keys with the letters, at any depth."""
    if isinstance(value, dict):
        return sum(("cna" in key.casefold()) + _count(inner) for key, inner in value.items())
    return sum(map(_count, value)) if isinstance(value, list) else 0
