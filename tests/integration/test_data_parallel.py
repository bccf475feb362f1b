# SPDX-License-Identifier: Apache-2.0
"""Two data-parallel engines: both change or none does, and counters are of both."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests import tiny_models
from tests.integration.conftest import PLAIN, Subject
from tests.oracles import Arm, Channels, HookedModel, assert_token_exact
from tests.server import serve

pytestmark = pytest.mark.engine

TOKENS = 8
RANKS = (0, 1)
LONG = 3900  # tokens of a request that outlives what is tried beside it
# vLLM 0.33 gives each engine a NUMA node of its own; these share what there is.
CORES = {"VLLM_CPU_OMP_THREADS_BIND": "auto", "VLLM_CPU_SIM_MULTI_NUMA": "1"}


@dataclass(frozen=True)
class Deployment:
    """A server with room for one circuit on each engine, and files of three."""

    http: httpx.Client
    oracle: HookedModel
    channels: dict[str, Channels]

    def complete(self, rank: int, prompt: list[int], circuit: str | None) -> httpx.Response:
        """One request on the engine ``rank``, ablating ``circuit`` in scope `last`."""
        fields = {"cna_circuit": circuit, "cna_multiplier": 0.0} if circuit else None
        return self.http.post(
            "/v1/completions",
            headers={"X-data-parallel-rank": str(rank)},
            json=body(prompt, fields, TOKENS),
        )

    def check(self, prompts: list[list[int]], circuit: str | None) -> None:
        """Every prompt on both engines, against the oracle."""
        arm = Arm(((self.channels[circuit], 0.0),), "last") if circuit else PLAIN
        verdicts = []
        for prompt in prompts:
            for rank in RANKS:
                reply = self.complete(rank, prompt, circuit)
                assert reply.status_code == 200, reply.text
                tokens = reply.json()["choices"][0]["token_ids"]
                verdicts.append(self.oracle.check(prompt, tokens, arm))
        assert_token_exact(verdicts, f"{circuit} on both engines")

    def load(self, name: str) -> httpx.Response:
        wanted = {"circuit_name": name, "circuit_path": f"{name}.json"}
        return self.http.post("/v1/load_cna_circuit", json=wanted)

    def unload(self, name: str) -> None:
        reply = self.http.post("/v1/unload_cna_circuit", json={"circuit_name": name})
        assert reply.status_code == 200, reply.text

    def names(self) -> list[str]:
        return [entry["id"] for entry in self.http.get("/v1/cna_circuits").json()["data"]]

    def metric(self, line: str) -> float:
        """One sample of ``/metrics``; 0 where it is not there."""
        found = [x for x in self.http.get("/metrics").text.splitlines() if x.startswith(line)]
        return float(found[0].split()[-1]) if found else 0.0


def body(prompt: list[int], fields: dict[str, Any] | None, tokens: int) -> dict[str, Any]:
    ask = {"model": "tiny", "prompt": prompt, "max_tokens": tokens, "temperature": 0}
    return {**ask, "ignore_eos": True, "return_token_ids": True, "vllm_xargs": fields}


@pytest.fixture(scope="module")
def deployed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    folder = tmp_path_factory.mktemp("dp")
    model = tiny_models.llama(folder / "model", max_position_embeddings=4096)
    tiny_models.add_tokenizer(model)
    circuits = folder / "circuits"
    circuits.mkdir()
    channels = {
        name: tiny_models.channels(tiny_models.LAYERS, tiny_models.WIDTH, 20, seed=seed)
        for seed, name in enumerate("abc", 1)
    }
    for name, by_layer in channels.items():
        (circuits / f"{name}.json").write_text(json.dumps(tiny_models.circuit_object(by_layer)))
    arguments = [
        "--data-parallel-size=2",
        "--api-server-count=1",  # forks of a process cannot share its metrics
        f"--circuit-dir={circuits}",
        "--max-circuits=1",
        "--served-model-name=tiny",
        "--max-model-len=4096",
        "--max-num-seqs=8",
    ]
    with serve(str(model), arguments, folder / "log", **CORES) as server, server.http() as http:
        yield Deployment(http, HookedModel(str(model)), channels)


def test_loads_and_counters_are_of_all_engines(deployed: Deployment) -> None:
    prompts = tiny_models.prompts(3)
    assert deployed.load("a").status_code == 200
    deployed.check(prompts, "a")
    deployed.check(prompts, None)
    assert deployed.complete(1, prompts[0], "a").status_code == 200
    # Scope last: the last prompt token and all generated ones but the last.
    expected = TOKENS * (len(prompts) * len(RANKS) + 1)
    counter = 'cna:steered_tokens_total{circuit="a"}'
    deadline = time.monotonic() + 20
    while deployed.metric(counter) < expected and time.monotonic() < deadline:
        time.sleep(0.5)
    assert deployed.metric(counter) == expected
    deployed.unload("a")
    for rank in RANKS:
        assert deployed.complete(rank, prompts[0], "a").status_code == 400
    # There is one row: the unload reached both engines, or one of them would refuse this.
    assert deployed.load("b").status_code == 200
    deployed.check(prompts, "b")
    deployed.unload("b")


def test_a_load_that_one_engine_refuses_is_none(deployed: Deployment) -> None:
    """A request that still runs on the second engine keeps the only row there."""
    (prompt,) = tiny_models.prompts(1)
    assert deployed.load("a").status_code == 200
    fields = {"cna_circuit": "a", "cna_multiplier": 0.0}
    asked = {**body(prompt, fields, LONG), "stream": True}
    headers = {"X-data-parallel-rank": "1"}
    with deployed.http.stream("POST", "/v1/completions", json=asked, headers=headers) as running:
        chunks = running.iter_lines()
        assert next(chunks).startswith("data: ")
        deployed.unload("a")
        reply = deployed.load("b")
        assert reply.status_code == 409, reply.text
        assert "all 1 circuit rows are in use" in reply.json()["error"]["message"]
        assert deployed.names() == []
        for rank in RANKS:
            reply = deployed.complete(rank, prompt, "b")
            assert reply.status_code == 400 and "no circuit is named 'b'" in reply.text
        # The first engine gave its row back: it can hold again what the second one still holds.
        assert deployed.load("a").status_code == 200
        deployed.check([prompt], "a")
        deployed.unload("a")
        assert next(chunk for chunk in chunks if chunk), "the request was to outlive all that"
    deadline = time.monotonic() + 20
    while (reply := deployed.load("c")).status_code == 409 and time.monotonic() < deadline:
        time.sleep(0.2)
    assert reply.status_code == 200, reply.text
    deployed.check([prompt], "c")
    assert deployed.names() == ["c"]
    deployed.unload("c")


def test_engines_that_a_front_end_does_not_reach_are_refused_at_start(
    tiny: Subject, tmp_path: Path
) -> None:
    """One node of two, each with a front end for its own engine."""
    arguments = ["--data-parallel-size=2", "--data-parallel-size-local=1"]
    arguments += ["--data-parallel-hybrid-lb", "--data-parallel-start-rank=0"]
    arguments += ["--skip-tokenizer-init", f"--circuit-dir={tmp_path}"]
    with (
        pytest.raises(AssertionError, match="circuit_dir: with external or hybrid load"),
        serve(tiny.path, arguments, tmp_path / "log", **CORES),
    ):
        pass
