# SPDX-License-Identifier: Apache-2.0
"""Host time of one step's routing, ``SteeringState.fill``, in microseconds.

    python benchmarks/fill.py [--device cuda] [--requests 256] [--record]

Needs no model: the time does not depend on layers or width. Cases: ``steady``, every request is
steered and decodes; ``replaced``, one of them ends and a new one takes its place each step
(removal and registration are timed too); ``prefilling``, one of them prefills 100 tokens beside
the others, another each step; ``plain``, the same batch with no steered request. Interleaved, one
step of each a round; the spread is the 95th percentile over the median. And what blocks a step
while a circuit of 100,000 neurons is loaded (32 layers of 14,336 and 80 of 28,672), the median of
several such circuits. With --record one JSON row is appended to benchmarks/results/fill.jsonl.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch
from provenance import provenance, record

from cna_vllm.serving.worker.state import SteeringState
from cna_vllm.serving.worker.table import CircuitTable
from cna_vllm.steering.circuit import Circuit, Neuron
from cna_vllm.steering.resolved import Steering

WIDTH, PROMPT, MAX_TOKENS, SLOTS = 512, 100, 8192, 4
LARGE, SHAPES = 100_000, ((32, 14336), (80, 28672))
SETTINGS = ((1, 256), (3, 256), (1, 4096))
"""Circuits a request, and resident circuits."""


class Engine:
    """A batch of decoding requests with as many circuits each, and their routing."""

    def __init__(self, table: CircuitTable, requests: int, circuits: int) -> None:
        self.state = SteeringState(table, requests, MAX_TOKENS, SLOTS)
        self._digests, self._circuits = table.loaded(), circuits
        self.ids = [f"cmpl-{i:032x}-0" for i in range(requests)]
        self.ones = np.ones(requests, dtype=np.int32)
        self.computed = np.full(requests, PROMPT, dtype=np.int32)

    def add(self, at: int, number: int) -> None:
        """Puts a new request in the place of the batch's request ``at``."""
        self.state.remove(self.ids[at])
        self.ids[at] = f"cmpl-{number:032x}-0"
        some = (self._digests[(number + i) % len(self._digests)] for i in range(self._circuits))
        pairs = tuple((digest, 1.5 + number / 999) for digest in sorted(some))
        self.state.add(self.ids[at], Steering(pairs), PROMPT)

    def steady(self, _: int) -> None:
        self.computed += 1
        self.state.fill(self.ids, self.ones, self.computed)

    def replaced(self, number: int) -> None:
        self.add(number % len(self.ids), 10**6 + number)
        self.steady(number)

    def prefilling(self, number: int) -> None:
        at = number % len(self.ids)
        scheduled, computed = self.ones.copy(), self.computed.copy()
        scheduled[at], computed[at] = PROMPT, 0
        self.state.fill(self.ids, scheduled, computed)


def resident(count: int, device: torch.device) -> CircuitTable:
    """A table full of different circuits."""
    table = CircuitTable(range(2), 0, WIDTH, count, device)
    for i in range(count):
        neurons = (Neuron(0, i % WIDTH), Neuron(1, i // WIDTH))
        table.load(Circuit("m", "A", 2, WIDTH, neurons).packed())
    return table


def time_loads(layers: int, width: int, device: torch.device, count: int = 9) -> dict[str, float]:
    """Median of ``CircuitTable.load`` in milliseconds, and the slowest over it."""
    table, rng = CircuitTable(range(layers), 0, width, count + 1, device), random.Random(0)
    taken = []
    for _ in range(count + 1):
        places = rng.sample(range(layers * width), LARGE)
        neurons = tuple(Neuron(*divmod(place, width)) for place in places)
        content = Circuit("m", "A", layers, width, neurons).packed()
        started = time.perf_counter()
        table.load(content)
        if device.type != "cpu":
            torch.accelerator.synchronize()
        taken.append((time.perf_counter() - started) * 1e3)
    median = statistics.median(taken[1:])  # the first has the rest of the start-up
    return {"ms": median, "slowest": max(taken[1:]) / median}


def measure(
    table: CircuitTable, requests: int, circuits: int, rounds: int
) -> dict[str, dict[str, float]]:
    """Median of each case in microseconds, and its spread."""
    cases: dict[str, Callable[[int], None]] = {}
    for name in ("steady", "replaced", "prefilling", "plain"):
        engine = Engine(table, requests, circuits)
        for i in range(requests if name != "plain" else 0):
            engine.add(i, i)
        cases[name] = engine.steady if name == "plain" else getattr(engine, name)
    taken: dict[str, list[float]] = {name: [] for name in cases}
    for number in range(-rounds // 10, rounds):
        for name, step in cases.items():
            started = time.perf_counter()
            step(number)
            elapsed = (time.perf_counter() - started) * 1e6
            if number >= 0:
                taken[name].append(elapsed)
        if table.device.type != "cpu" and number % 2:
            torch.accelerator.synchronize()  # two steps are in flight, as under a real scheduler
    result = {}
    for name, times in taken.items():
        median = statistics.median(times)
        result[name] = {"us": median, "p95": statistics.quantiles(times, n=20)[-1] / median}
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description="Time SteeringState.fill.")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--requests", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=1000)
    parser.add_argument("--record", action="store_true")
    options = parser.parse_args()
    device, cells = torch.device(options.device), []
    for circuits, count in SETTINGS:
        table = resident(count, device)
        cases = measure(table, options.requests, circuits, options.rounds)
        cells.append({"circuits": circuits, "resident": count, "cases": cases})
        shown = ", ".join(f"{n} {c['us']:.1f} us (p95 x{c['p95']:.2f})" for n, c in cases.items())
        print(f"{options.requests} requests, {circuits} of {count} circuits each: {shown}")
    loads = {f"{n} x {width}": time_loads(n, width, device) for n, width in SHAPES}
    for shape, cell in loads.items():
        print(f"load of {LARGE:,} neurons, {shape}: {cell['ms']:.2f} ms (x{cell['slowest']:.2f})")
    if options.record:
        row = {"requests": options.requests, "rounds": options.rounds, "cells": cells}
        record("fill", {**provenance(), "on": str(device), **row, "loads": loads})


if __name__ == "__main__":
    main()
