# SPDX-License-Identifier: Apache-2.0
"""Many clients at once while circuits come and go."""

from __future__ import annotations

import itertools
import random
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import pytest
from transformers import AutoTokenizer

from tests.integration.conftest import PLAIN
from tests.integration.serving.deployment import KV_BLOCKS, Deployment, extra, load, unload
from tests.oracles import Arm, Verdict, assert_token_exact

pytestmark = [pytest.mark.engine, pytest.mark.slow]

CLIENTS, TOKENS = 8, 4
# Without a chat template's system prompt, which would be most of the work.
PROMPTS = (
    "The capital of France is",
    "Once upon a time",
    "def main():",
    "Dear Sir or Madam,",
    "Yes",
)
# Of all processes together; the engine alone holds 700 MiB of weights and cache.
GROWTH_MIB = 32


@dataclass
class Traffic:
    """What clients got while an operator loaded, reloaded and unloaded the circuit `hot`."""

    deployed: Deployment
    models: Sequence[str]
    prompts: Sequence[list[int]]
    files: Sequence[str]
    outcomes: list[tuple[list[int], str, list[int]]] = field(default_factory=list)
    gone: int = 0
    changes: int = 0
    clients: int = 0

    def run(self, requests: int) -> None:
        """Each client sends ``requests``, one after the other."""
        done = threading.Event()
        with ThreadPoolExecutor(CLIENTS + 1) as pool:
            changer = pool.submit(self._change, done)
            try:
                seeds = range(self.clients, self.clients + CLIENTS)
                for asked in [pool.submit(self._ask, seed, requests) for seed in seeds]:
                    asked.result()
            finally:
                done.set()
                changer.result()
        self.clients += CLIENTS
        with self.deployed.server.http() as http:
            unload(http, "circuit", "hot")

    def _change(self, done: threading.Event) -> None:
        rng = random.Random(1)
        with self.deployed.server.http() as http:
            while not done.wait(0.05):
                if rng.random() < 0.2:
                    reply = unload(http, "circuit", "hot")
                    assert reply.status_code in (200, 404), reply.text
                else:
                    reply = load(http, "hot", rng.choice(self.files), load_inplace=True)
                    assert reply.status_code == 200, reply.text
                self.changes += 1

    def _ask(self, seed: int, requests: int) -> None:
        rng = random.Random(seed)
        with self.deployed.server.http() as http:
            for _ in range(requests):
                prompt, model = rng.choice(self.prompts), rng.choice([*self.models, "hot"])
                body = {
                    "model": "smollm2" if model == "hot" else model,
                    "prompt": prompt,
                    "max_tokens": TOKENS,
                    "temperature": 0,
                }
                hot = {"cna_circuit": "hot", "cna_multiplier": 0}
                body |= extra(hot if model == "hot" else None)
                reply = http.post("/v1/completions", json=body)
                if model == "hot" and reply.status_code == 400:
                    assert "no circuit is named 'hot'" in reply.text
                    self.gone += 1
                    continue
                assert reply.status_code == 200, reply.text
                self.outcomes.append((prompt, model, reply.json()["choices"][0]["token_ids"]))

    def verdicts(self, arms: Mapping[str, Sequence[Arm]]) -> list[Verdict]:
        """Every output is that of its arm; under a name that is reloaded, that of one of its
        contents."""
        oracle = self.deployed.subject.oracle
        unique = {(tuple(p), model, tuple(tokens)) for p, model, tokens in self.outcomes}
        found = []
        for prompt, model, tokens in sorted(unique):
            checks = [oracle.check(prompt, tokens, arm) for arm in arms[model]]
            found.append(max(checks, key=lambda v: (v.equal, v.near_tie)))
        return found


def touch_cache(deployed: Deployment) -> None:
    """Fills the KV cache once: its memory is the engine's from the first write on."""
    rng = random.Random(0)
    blocks_per_prompt = 4
    with deployed.server.http() as http:
        for _ in range(KV_BLOCKS // blocks_per_prompt + 1):
            prompt = [rng.randrange(100, 10_000) for _ in range(510)]
            body = {"model": "smollm2", "prompt": prompt, "max_tokens": 1}
            assert http.post("/v1/completions", json=body).status_code == 200


def test_under_load(deployed: Deployment) -> None:
    """512 requests of eight clients, arms mixed at random; the second half of them leaves the
    memory where the first half had it."""
    files = {"a.json": 5, "b.json": 6}
    contents = [deployed.write_circuit(name, seed) for name, seed in files.items()]
    arms = {"smollm2": [PLAIN], **{name: [arm] for name, arm in deployed.arms.items()}}
    models = list(arms)
    arms["hot"] = [Arm(((channels, 0.0),), "last") for channels in contents]

    touch_cache(deployed)
    tokenizer = AutoTokenizer.from_pretrained(deployed.subject.path)
    prompts = [tokenizer.encode(text) for text in PROMPTS]
    traffic = Traffic(deployed, models, prompts, list(files))
    traffic.run(32)
    before = deployed.server.memory()
    traffic.run(32)
    after = deployed.server.memory()
    grown = {name: (after[name] - before[name]) / 2**20 for name in after}
    print(f"{len(traffic.outcomes)} outputs, {traffic.gone} refused while unloaded")
    print(f"{traffic.changes} changes; MiB grown: {grown}")

    assert len(traffic.outcomes) + traffic.gone == 64 * CLIENTS
    assert traffic.changes > 20
    assert_token_exact(traffic.verdicts(arms), "under load")
    texts = {(model, tuple(p), tuple(tokens)) for p, model, tokens in traffic.outcomes}
    for one, other in itertools.combinations(models, 2):
        same = [{text[1:] for text in texts if text[0] == name} for name in (one, other)]
        assert same[0] != same[1], f"{one} and {other} must be told apart by their outputs"
    assert set(after) == set(before), "a process of the server was replaced"
    assert sum(grown.values()) < GROWTH_MIB
    with deployed.server.http() as http:
        assert "hot" not in {c["id"] for c in http.get("/v1/cna_circuits").json()["data"]}
        metrics = http.get("/metrics").text
        assert "vllm" in metrics and "cna:control_actions" in metrics
