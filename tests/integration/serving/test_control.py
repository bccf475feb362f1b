# SPDX-License-Identifier: Apache-2.0
"""Run-time control: seen by all API servers, and closed to everyone else."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path

import httpx
import psutil
import pytest
from prometheus_client.parser import text_string_to_metric_families

from cna_vllm.serving.front.store import RegistryStore, StoreError
from tests import tiny_models
from tests.integration.serving.deployment import Deployment, load, unload

pytestmark = [pytest.mark.engine, pytest.mark.slow]


def test_control_is_seen_by_all_servers(deployed: Deployment) -> None:
    """Two API servers share a port; a new connection may reach either."""
    deployed.write_circuit("c.json", 3)
    with deployed.server.http() as http:
        assert load(http, "third", "c.json").status_code == 200
        adapter = {"adapter_name": "third-off", "circuit": "third", "multiplier": 0}
        assert http.post("/v1/load_cna_adapter", json=adapter).status_code == 200
    body = {"model": "third-off", "prompt": "Hello", "max_tokens": 2}
    for _ in range(12):
        with deployed.server.http() as http:
            models = {card["id"] for card in http.get("/v1/models").json()["data"]}
            assert {"third-off", "one-off", "smollm2"} <= models
            found = http.get("/v1/cna_circuits/third").json()
            assert found["neurons"] == 30 * 80 and not found["pinned"]
            assert http.post("/v1/completions", json=body).status_code == 200
    with deployed.server.http() as http:
        for kind, name in (("adapter", "third-off"), ("circuit", "third")):
            assert unload(http, kind, name).status_code == 200
            assert unload(http, kind, name).status_code == 404
    for _ in range(12):
        with deployed.server.http() as http:
            assert http.post("/v1/completions", json=body).status_code == 404


def test_every_api_server_claims_the_registry_itself(deployed: Deployment) -> None:
    """They are spawned, so they inherit no descriptor, and may outlive who started them."""
    registry = deployed.folder / "registry"
    claimed = (registry / "server").stat().st_ino
    holders = set()
    for process in psutil.Process(deployed.server.process.pid).children(recursive=True):
        for info in Path(f"/proc/{process.pid}/fdinfo").iterdir():
            if re.search(rf"FLOCK .*:{claimed} ", info.read_text()):
                holders.add(process.cmdline()[0])
    assert {"VLLM::APIServer_0", "VLLM::APIServer_1"} <= holders
    with pytest.raises(StoreError, match="another server uses it"):
        RegistryStore(registry).claim()


def test_each_steered_token_is_counted_once(deployed: Deployment) -> None:
    """Under its circuit's name, though two API servers ask the same workers."""
    deployed.write_circuit("counted.json", 8)
    fields = {"cna_circuit": "counted", "cna_multiplier": 0.5, "cna_scope": "all"}
    body = {"model": "smollm2", "prompt": [5, 6, 7, 8, 9], "max_tokens": 4, "ignore_eos": True}
    rows = 5 + 4 - 1  # the last generated token is never an input
    with deployed.server.http() as http:

        def counted(name: str) -> float:
            for family in text_string_to_metric_families(http.get("/metrics").text):
                for sample in family.samples:
                    if sample.name == name and sample.labels.get("circuit") == "counted":
                        return sample.value
            return 0.0

        assert load(http, "counted", "counted.json").status_code == 200
        # The second look is a period of all servers' looks after the first.
        for number in (1, 2):
            reply = http.post("/v1/completions", json={**body, "vllm_xargs": fields})
            assert reply.status_code == 200, reply.text
            deadline = time.monotonic() + 60
            while counted("cna:steered_tokens_total") < number * rows:
                assert time.monotonic() < deadline, "the tokens were never counted"
                time.sleep(0.5)
            assert counted("cna:steered_tokens_total") == number * rows
            assert counted("cna:steered_requests_total") == number
        assert unload(http, "circuit", "counted").status_code == 200


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
    deployed.write_circuit("good.json", 4)
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
        channels = {0: (1, 2), 29: (1535,)}
        for name, content, status in (
            ("other.json", tiny_models.circuit_object(channels, 31, 1536), 400),
            ("plain.json", channels, 200),
        ):
            (deployed.folder / "circuits" / name).write_text(json.dumps(content))
            reply = load(http, "new", name)
            assert reply.status_code == status and "'smollm2'" in reply.text.replace('"', "'")
            assert deployed.subject.path not in reply.text + http.get("/v1/cna_circuits").text
        assert unload(http, "circuit", "new").status_code == 200
        listed = http.get("/v1/cna_circuits").text + http.get("/v1/models").text
        assert str(deployed.folder) not in listed
        assert set(deployed.subject.files) == {
            c["id"] for c in http.get("/v1/cna_circuits").json()["data"]
        }
