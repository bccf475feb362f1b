# SPDX-License-Identifier: Apache-2.0
"""What a core keeps resident: circuits of requests that run, wait, or are still on their way."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from cna_vllm.serving.config import CircuitTableError
from cna_vllm.serving.core.ledger import Ledger
from cna_vllm.serving.seal import Seal, deployment_secret
from cna_vllm.serving.seams import engine_core
from cna_vllm.serving.seams.engine_core import ResidentContent
from cna_vllm.steering.packed import Packed
from cna_vllm.steering.request import RESOLVED_FIELD
from cna_vllm.steering.resolved import Steering

A, B, C = "a" * 64, "b" * 64, "c" * 64


def request(*digests: str, request_id: str = "r") -> Any:
    pairs = tuple((digest, 0.5) for digest in digests)
    sealed = Seal(deployment_secret()).sealed
    extra = {RESOLVED_FIELD: sealed(Steering(pairs))} if pairs else {"other": 1}
    params = SimpleNamespace(extra_args=extra)
    return SimpleNamespace(request_id=request_id, sampling_params=params, resumable=False)


PLAIN = [
    request(),
    SimpleNamespace(request_id="none", sampling_params=SimpleNamespace(extra_args=None)),
    SimpleNamespace(request_id="pooling", sampling_params=None),
]


def load(content: ResidentContent, digest: str, *resident: list[str]) -> None:
    content.begin_load(())
    content.end_load("circuit", digest, [{"resident": digests} for digests in resident])


def holding(*digests: str) -> ResidentContent:
    content = ResidentContent()
    for digest in digests:
        load(content, digest, [*digests])
    return content


def test_nothing_is_there_until_the_workers_say_so() -> None:
    with pytest.raises(CircuitTableError, match="is not resident"):
        ResidentContent().hold("r", (A,))
    content = holding(A, B)
    content.hold("r", (A, B))
    assert content.begin_load(PLAIN) == [A, B]


def test_a_request_is_wanted_from_its_arrival_on() -> None:
    content = holding(A)
    content.hold("on its way", (A,))
    assert content.begin_load([request(B, C)]) == [A, B, C]
    content.release("on its way")
    content.release("never seen")
    assert content.begin_load([request(B)]) == [B]
    assert content.begin_load([]) == []


def test_a_request_whose_circuit_was_evicted_is_refused_alone() -> None:
    content = holding(A, B)
    load(content, C, [A, B], [A, B, C])  # one rank of two did not take it
    content.hold("good", (A, B))
    with pytest.raises(CircuitTableError, match=f"{C[:12]} is not resident.*send it again"):
        content.hold("late", (A, C))
    assert content.begin_load([]) == [A, B], "the refused request holds nothing"
    load(content, C, [C])
    content.hold("late", (C,))
    with pytest.raises(CircuitTableError):
        content.hold("later", (A,))


def test_while_workers_load_no_request_gets_what_they_may_overwrite() -> None:
    """Nothing waits for them either: what is loaded, or wanted already, is had at once."""
    content = holding(A, B, C)
    content.hold("running", (B,))
    for digest in (B, C):
        content.unload(digest)
    content.hold("before", (C,))
    content.release("before")
    assert content.begin_load([]) == [B]
    content.hold("new", (A, B))
    with pytest.raises(CircuitTableError, match="send it again"):
        content.hold("late", (C,))
    content.end_load("circuit", "d" * 64, [{"resident": [A, B, C]}])
    content.hold("again", (C,))


class Core:
    """An engine core with the methods that the seams wrap."""

    def __init__(self, *running: Any) -> None:
        self.scheduler = SimpleNamespace(requests={r.request_id: r for r in running})
        self.calls: list[tuple[str, dict[str, Any]]] = []
        self.resident = [A, B]
        self.broken = False
        self.is_sleeping = False
        self.model_executor = self  # vLLM's core has one, whose workers it asks

    def _initialize_kv_caches(self, vllm_config: Any) -> str:
        return "blocks"

    def preprocess_add_request(self, request: Any) -> Any:
        if self.broken:
            raise ValueError("no such grammar")
        return request

    def add_request(self, request: Any) -> None:
        self.scheduler.requests[request.request_id] = request

    def collective_rpc(
        self, method: str, timeout: Any = None, args: Any = (), kwargs: Any = None
    ) -> list[Any]:
        self.calls.append((method, dict(kwargs or {})))
        return [{"resident": self.resident}]


@pytest.fixture
def core() -> Core:
    class Wrapped(Core):
        _initialize_kv_caches = engine_core._initialize_kv_caches(Core._initialize_kv_caches)
        preprocess_add_request = engine_core._preprocess_add_request(Core.preprocess_add_request)
        add_request = engine_core._add_request(Core.add_request)
        collective_rpc = engine_core._collective_rpc(Core.collective_rpc)

    built = Wrapped(request(A, request_id="running"))
    config = SimpleNamespace(additional_config={"cna": {}})
    assert built._initialize_kv_caches(config) == "blocks"
    for digest in (A, B):
        built.collective_rpc("cna_load", args=packed(digest))
    return built


def packed(digest: str = C) -> tuple[Any, ...]:
    return Packed("circuit", digest, b"", b"")


def test_counters_are_the_cores_own(core: Core) -> None:
    core.scheduler.cna_ledger, calls = Ledger("float16"), len(core.calls)
    (report,) = core.collective_rpc("cna_counters")
    assert report == {"circuits": 2, "steered_tokens": {}} and len(core.calls) == calls


def test_a_core_that_sleeps_loads_nothing(core: Core) -> None:
    core.is_sleeping, calls = True, len(core.calls)
    (report,) = core.collective_rpc("cna_load", args=packed())
    assert "wake it up" in report["refused"] and len(core.calls) == calls


def test_workers_are_told_what_they_must_keep(core: Core) -> None:
    core.preprocess_add_request(request(B, request_id="new"))
    core.collective_rpc("cna_load", args=packed())
    assert core.calls[-1] == ("cna_load", {"wanted": [A, B]})
    core.add_request(request(B, request_id="new"))
    core.collective_rpc("cna_load", args=packed())
    assert core.calls[-1] == ("cna_load", {"wanted": [A, B]}), "now by the scheduler"
    core.scheduler.requests.clear()
    core.collective_rpc("cna_load", args=packed(), kwargs={"x": 1})
    assert core.calls[-1] == ("cna_load", {"x": 1, "wanted": []})
    core.collective_rpc("cna_status")
    assert core.calls[-1] == ("cna_status", {})


def test_an_evicted_circuit_is_noticed_before_the_worker_sees_it(core: Core) -> None:
    core.resident = [B]
    core.collective_rpc("cna_load", args=packed())
    with pytest.raises(CircuitTableError, match="send it again"):
        core.preprocess_add_request(request(A))
    for plain in PLAIN:
        assert core.preprocess_add_request(plain) is plain


def wanted(core: Core) -> Any:
    core.collective_rpc("cna_load", args=packed())
    return core.calls[-1][1]["wanted"]


def test_a_request_that_fails_in_preprocessing_holds_nothing(core: Core) -> None:
    core.broken = True
    with pytest.raises(ValueError, match="no such grammar"):
        core.preprocess_add_request(request(B, request_id="bad"))
    assert wanted(core) == [A]


def test_a_load_that_fails_leaves_the_core_with_what_its_workers_hold(core: Core) -> None:
    def fail(self: Any, method: str, *args: Any) -> list[Any]:
        if method == "cna_load":
            raise RuntimeError("the second worker failed")
        return [{"resident": [A]}, {"resident": [A, B]}]

    collective_rpc = engine_core._collective_rpc(fail)
    with pytest.raises(RuntimeError, match="second worker"):
        collective_rpc(core, "cna_load", args=packed())
    with pytest.raises(CircuitTableError, match="is not resident"):
        core.preprocess_add_request(request(B))
    core.preprocess_add_request(request(A))
