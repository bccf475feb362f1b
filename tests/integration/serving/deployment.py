# SPDX-License-Identifier: Apache-2.0
"""A server under test with the folders it reads and writes, and an operator who changes it."""

from __future__ import annotations

import json
import random
import threading
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from tests import tiny_models
from tests.integration.conftest import Subject
from tests.oracles import Arm
from tests.server import Server, serve

TOKENS = 8
KV_BLOCKS = 20  # of 128 tokens: 16 short requests, or 5 of the longest kind
QUESTION = "Name three fruits that are red."

State = dict[str, dict[str, Any]]
"""circuit name -> {"digest"}, adapter name -> its object: what a registry directory says."""


@dataclass
class Deployment:
    """A running server and what it was given; ``start`` replaces one that was killed."""

    subject: Subject
    folder: Path
    arms: Mapping[str, Arm]
    arguments: Sequence[str]
    stack: ExitStack
    server: Server = field(init=False)

    def start(self, *more: str, spawned: bool = False) -> None:
        arguments, log = [*self.arguments, *more], self.folder / "log"
        self.server = self.stack.enter_context(
            serve(self.subject.path, arguments, log, spawned=spawned)
        )

    def write_circuit(self, name: str, seed: int) -> Mapping[int, tuple[int, ...]]:
        """A circuit file in the operator's folder; replaced as a whole."""
        channels = tiny_models.channels(30, 1536, 80, seed=seed)
        path = self.folder / "circuits" / name
        new = path.with_suffix(".new")
        new.write_text(json.dumps(tiny_models.circuit_object(channels, 30, 1536)))
        new.rename(path)
        return channels

    def listed(self) -> tuple[State, set[str]]:
        """What one of the API servers says: everything that is not pinned, and all models."""
        with self.server.http() as http:
            found = {what: http.get(f"/v1/cna_{what}s").json()["data"] for what in KINDS}
            models = {card["id"] for card in http.get("/v1/models").json()["data"]}
        state: State = {}
        for what, entries in found.items():
            for entry in entries:
                if not entry["pinned"]:
                    kept = {"digest"} if what == "circuit" else {"circuit", "multiplier", "scope"}
                    state[entry["id"]] = {key: entry[key] for key in kept}
        return state, models

    def stored(self) -> State:
        """What the registry directory says. Fails if any file there is not whole."""
        from cna_vllm import Circuit

        registry = self.folder / "registry"
        manifest = json.loads((registry / "registry.json").read_text())
        for file in (registry / "circuits").glob("*.json"):
            assert Circuit.load(file).digest == file.stem
        for digest in manifest["circuits"].values():
            assert (registry / "circuits" / f"{digest}.json").exists()
        return {
            **{name: {"digest": digest} for name, digest in manifest["circuits"].items()},
            **manifest["adapters"],
        }


KINDS = ("circuit", "adapter")


def load(http: httpx.Client, name: str, path: str, **more: Any) -> httpx.Response:
    return http.post(
        "/v1/load_cna_circuit", json={"circuit_name": name, "circuit_path": path, **more}
    )


def unload(http: httpx.Client, kind: str, name: str) -> httpx.Response:
    return http.post(f"/v1/unload_cna_{kind}", json={f"{kind}_name": name})


class Operator(threading.Thread):
    """Loads, reloads and unloads at random until the server is gone; keeps what it was told.

    acknowledged: the state after the last reply. possible: that, and the state that the action
    without a reply would have led to.
    """

    def __init__(self, server: Server, files: Mapping[str, str]) -> None:
        """files: path in the operator's folder -> content digest."""
        super().__init__()
        self._server, self._files = server, files
        self._random = random.Random(3)
        self.acknowledged: State = {}
        self.possible: list[State] = []
        self.replies = 0
        self.refused: list[str] = []

    def run(self) -> None:
        with self._server.http() as http:
            while True:
                route, body, after = self._action()
                self.possible = [self.acknowledged, after]
                try:
                    reply = http.post(f"/v1/{route}", json=body)
                except httpx.TransportError:
                    return
                if reply.status_code != 200:
                    self.refused.append(f"{route} {body}: {reply.text}")
                    return
                self.acknowledged = after
                self.replies += 1

    def _action(self) -> tuple[str, dict[str, Any], State]:
        """A route, a body, and the state after it; circuits k0.., each with an adapter at times."""
        now = self.acknowledged
        name = f"k{self._random.randrange(3)}"
        adapter = f"{name}-off"
        if name not in now or self._random.random() < 0.4:
            path = self._random.choice(sorted(self._files))
            body = {"circuit_name": name, "circuit_path": path, "load_inplace": True}
            return "load_cna_circuit", body, {**now, name: {"digest": self._files[path]}}
        if adapter not in now:
            if self._random.random() < 0.3:
                rest = {key: value for key, value in now.items() if key != name}
                return "unload_cna_circuit", {"circuit_name": name}, rest
            fields = {"circuit": name, "multiplier": 0, "scope": "last"}
            return (
                "load_cna_adapter",
                {"adapter_name": adapter, **fields},
                {**now, adapter: fields},
            )
        rest = {key: value for key, value in now.items() if key != adapter}
        return "unload_cna_adapter", {"adapter_name": adapter}, rest


def extra(fields: Mapping[str, Any] | None = None, **more: Any) -> dict[str, Any]:
    body: dict[str, Any] = {"return_token_ids": True, **more}
    return body if fields is None else {**body, "vllm_xargs": dict(fields)}


def answer(
    http: httpx.Client, model: str, prompt: list[int], fields: Mapping[str, Any] | None = None
) -> list[int]:
    """Greedy tokens of one completion."""
    body = {"model": model, "prompt": prompt, "max_tokens": TOKENS, "temperature": 0}
    reply = http.post("/v1/completions", json=body | extra(fields))
    assert reply.status_code == 200 and reply.json()["model"] == model, reply.text
    tokens: list[int] = reply.json()["choices"][0]["token_ids"]
    return tokens


@dataclass(frozen=True)
class Restart:
    """What an operator was told, what lay on disk after a SIGKILL, and what came up again."""

    operator: Operator
    contents: Mapping[str, Mapping[int, tuple[int, ...]]]
    stored: State
    listed: Sequence[tuple[State, set[str]]]
    answers: Mapping[str, list[int]]
    lora: Path
