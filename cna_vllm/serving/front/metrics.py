# SPDX-License-Identifier: Apache-2.0
"""Prometheus metrics beside vLLM's own, in the registry that its ``/metrics`` shows.

Labels are names of circuits and vectors, which only an operator chooses, and at most
``MAX_LABELS`` of them in the life of a process; what comes after shares the label ``other``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache, partial
from typing import Any

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge, Histogram

from cna_vllm.serving.front.admission import Admission, admit_or_refuse
from cna_vllm.steering.request import (
    FIELD_CIRCUIT,
    FIELD_VECTOR,
    FIELDS,
    RESOLVED_FIELD,
    SteeringError,
)

MAX_LABELS = 200
OTHER = "other"


class ControlMetrics:
    """What one API server process counts; made once a process, see ``control_metrics``."""

    def __init__(self, registry: CollectorRegistry = REGISTRY) -> None:
        counter = partial(Counter, registry=registry)
        gauge = partial(Gauge, multiprocess_mode="mostrecent", registry=registry)
        self.requests = counter(
            "cna:steered_requests",
            "Steered requests that were admitted, by circuit or vector.",
            ["circuit"],
        )
        self.refused = counter(
            "cna:refused_requests", "Requests refused for their steering fields.", ["field"]
        )
        self.failed = counter(
            "cna:failed_requests",
            "Steered requests that the engine ended: overflow, uncounted, refused.",
            ["reason"],
        )
        self.steered_tokens = counter(
            "cna:steered_tokens",
            "Token rows that engines steered, by circuit or vector (of one rank of each).",
            ["circuit"],
        )
        self.resident = gauge(
            "cna:resident_circuits", "Circuits that requests may use, on every engine."
        )
        self.table_bytes = gauge("cna:table_bytes", "Memory of the resident table on one rank.")
        self.actions = counter(
            "cna:control_actions",
            "Control actions by outcome: done, refused, failed.",
            ["action", "outcome"],
        )
        self.load_seconds = Histogram(
            "cna:circuit_load_seconds",
            "Time to load a circuit on every worker and write it to the registry.",
            buckets=(0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30),
            registry=registry,
        )
        self._labels: set[str] = set()
        self._counted: dict[int, Mapping[str, int]] = {}

    def label(self, circuit: str) -> str:
        """The circuit's or vector's name, or ``other`` when there have been too many."""
        if circuit in self._labels:
            return circuit
        if len(self._labels) >= MAX_LABELS:
            return OTHER
        self._labels.add(circuit)
        return circuit

    def count_request(self, names: Iterable[str]) -> None:
        """One admitted request that these circuits and vectors steer."""
        for name in names:
            self.requests.labels(circuit=self.label(name)).inc()

    def take_status(self, reports: Sequence[Mapping[str, Any]], names: Mapping[str, str]) -> None:
        """Brings the gauge and the token counters up to the reports of all engines, in rank order.

        names: content digest -> a name that stands for it; tokens of other content are ``other``.
        """
        self.resident.set(min(report["circuits"] for report in reports))
        for rank, report in enumerate(reports):
            counted = self._counted.get(rank, {})
            for digest, tokens in report["steered_tokens"].items():
                # Behind is what was left out meanwhile, or an engine that started anew.
                before = counted.get(digest, 0)
                new = tokens - before if tokens >= before else tokens
                if new > 0:
                    name = names.get(digest)
                    label = OTHER if name is None else self.label(name)
                    self.steered_tokens.labels(circuit=label).inc(new)
            self._counted[rank] = report["steered_tokens"]


def admit_counted(
    gate: Admission | None, extra_args: Mapping[str, Any], *, resumable: bool = False
) -> dict[str, Any] | None:
    """``admit_or_refuse``, counted. Raises what that raises."""
    try:
        admitted = admit_or_refuse(gate, extra_args, resumable=resumable)
    except SteeringError as error:
        count_refused(error)
        raise
    if admitted and RESOLVED_FIELD in admitted and RESOLVED_FIELD not in extra_args:
        for field in (FIELD_CIRCUIT, FIELD_VECTOR):
            names = extra_args.get(field, ())
            control_metrics().count_request([names] if isinstance(names, str) else names)
    return admitted


def count_refused(error: SteeringError) -> None:
    """Clients choose the names of unknown fields: those share a label."""
    field = error.field if error.field in FIELDS else OTHER
    control_metrics().refused.labels(field=field).inc()


@lru_cache(maxsize=1)
def control_metrics() -> ControlMetrics:
    """The metrics of this process: Prometheus takes each name once."""
    return ControlMetrics()
