# SPDX-License-Identifier: Apache-2.0
"""Every Python block of the pages that is a client runs against a server as it is written, but for
the server's address and key."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.integration.serving.deployment import Deployment, load, unload
from tests.pages import Block, blocks
from tests.server import KEY

pytestmark = [pytest.mark.engine, pytest.mark.slow]

CLIENTS = [b for b in blocks("python") if "localhost:8000" in b.text and b.reason is None]
ADAPTERS = {
    "french-off": {"circuit": "french", "multiplier": 0},
    "french-more": {"circuit": "french", "multiplier": 2, "scope": "all"},
}


@pytest.fixture(scope="module")
def french(deployed: Deployment) -> Iterator[Deployment]:
    """The circuit and the adapters that the pages name."""
    deployed.write_circuit("french.json", 5)
    with deployed.server.http() as http:
        assert load(http, "french", "french.json").status_code == 200
        for name, adapter in ADAPTERS.items():
            body = {"adapter_name": name, **adapter}
            assert http.post("/v1/load_cna_adapter", json=body).status_code == 200
        yield deployed
        for name in ADAPTERS:
            assert unload(http, "adapter", name).status_code == 200
        assert unload(http, "circuit", "french").status_code == 200


def test_there_are_clients() -> None:
    assert len(CLIENTS) == 2


@pytest.mark.parametrize("block", CLIENTS, ids=lambda block: block.name)
def test_clients(french: Deployment, block: Block) -> None:
    text = block.text.replace("http://localhost:8000", french.server.url)
    assert 'api_key="none"' in text and "http://localhost" not in text
    text = text.replace('api_key="none"', f"api_key={KEY!r}")
    exec(compile(text, block.name, "exec"), {"__name__": "__main__"})
