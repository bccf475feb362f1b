# SPDX-License-Identifier: Apache-2.0
"""Metrics: bounded labels, and workers' counters that only grow in Prometheus."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from cna_vllm.serving.front import metrics
from cna_vllm.serving.front.metrics import OTHER, ControlMetrics
from cna_vllm.serving.http import plugin


def counted(registry: CollectorRegistry, name: str) -> dict[str, float]:
    """circuit -> value of one counter."""
    return {
        sample.labels["circuit"]: sample.value
        for metric in registry.collect()
        for sample in metric.samples
        if sample.name == f"{name}_total"
    }


def report(*circuits: str, **tokens: int) -> dict[str, Any]:
    return {"circuits": len(circuits), "steered_tokens": tokens}


def test_labels_are_bounded_for_the_life_of_a_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "MAX_LABELS", 3)
    registry = CollectorRegistry()
    own = ControlMetrics(registry)
    for name in ("a", "b", "a", "c", "d", "e", "b"):
        own.count_request([name])
    own.count_request(["d", "a"])
    wanted = {"a": 3, "b": 2, "c": 1, OTHER: 3}
    assert counted(registry, "cna:steered_requests") == wanted
    own.take_status([report(x=5, y=1)], {"x": "a", "y": "new"})
    assert counted(registry, "cna:steered_tokens") == {"a": 5, OTHER: 1}


def test_status_brings_counters_up_to_the_workers() -> None:
    registry = CollectorRegistry()
    own = ControlMetrics(registry)
    names = {"x": "french"}
    own.take_status([report("x", "y", x=10, y=3)], names)
    own.take_status([report("x", x=10, y=3)], names)  # nothing new
    assert counted(registry, "cna:steered_tokens") == {"french": 10, OTHER: 3}
    assert registry.get_sample_value("cna:resident_circuits") == 1
    own.take_status([report("z", x=17, z=2)], {"x": "renamed", "z": "french"})
    assert counted(registry, "cna:steered_tokens") == {"french": 12, "renamed": 7, OTHER: 3}
    # Counters of an engine that started anew are behind: Prometheus' go on.
    own.take_status([report("z", x=1)], {"x": "renamed"})
    assert counted(registry, "cna:steered_tokens")["renamed"] == 8


def test_every_engine_counts() -> None:
    """Tokens add up over engines; circuits may be used that all of them hold."""
    registry = CollectorRegistry()
    own = ControlMetrics(registry)
    names = {"x": "french", "y": "polite"}
    own.take_status([report("x", "y", x=10), report("x", x=4, y=1)], names)
    own.take_status([report("x", "y", x=10), report("x", x=6, y=1)], names)
    assert counted(registry, "cna:steered_tokens") == {"french": 16, "polite": 1}
    assert registry.get_sample_value("cna:resident_circuits") == 1


def test_requests_are_counted_by_circuit_and_by_vector(monkeypatch: pytest.MonkeyPatch) -> None:
    registry = CollectorRegistry()
    own = ControlMetrics(registry)
    monkeypatch.setattr(metrics, "control_metrics", lambda: own)
    gate: Any = Gate()
    metrics.admit_counted(gate, {"cna_circuit": ["a", "b"], "cna_vector": "v"})
    metrics.admit_counted(gate, {"cna_vector": ["v", "w"]})
    assert counted(registry, "cna:steered_requests") == {"a": 1, "b": 1, "v": 2, "w": 1}


class Gate:
    """Admits everything as steered."""

    def admit(self, extra_args: Any, *, resumable: bool) -> dict[str, Any]:
        return {"cna_resolved": {}}


class Engine:
    """Alive for a number of looks; its workers fail at some of them."""

    def __init__(self, looks: int, failing: set[int]) -> None:
        self.looks, self.failing, self.at = looks, failing, 0

    @property
    def errored(self) -> bool:
        return self.at >= self.looks

    async def counters(self) -> list[dict[str, Any]]:
        self.at += 1
        if self.at in self.failing:
            raise RuntimeError("a worker is gone")
        return [report("x", x=self.at)]

    def names(self) -> Engine:
        return self

    def digests(self) -> dict[str, str]:
        return {"x": "steered"}


def test_reading_counters_goes_on_after_a_failure_and_ends_with_the_engine(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    registry = CollectorRegistry()
    own = ControlMetrics(registry)
    monkeypatch.setattr(plugin, "STATUS_SECONDS", 0)
    monkeypatch.setattr(metrics, "control_metrics", lambda: own)
    engine: Any = Engine(4, failing={2, 4})
    asyncio.run(asyncio.wait_for(plugin.read_counters(engine, engine, engine), 30))
    assert engine.at == 4
    assert counted(registry, "cna:steered_tokens") == {"steered": 3}
