# SPDX-License-Identifier: Apache-2.0
"""Host time of the account of steered rows in one decoding step, beside the step's routing.

    python benchmarks/accounting.py [--requests 256] [--hidden 4096] [--record]

Needs no model. Of a step in which every request is steered: ``fill`` (the routing, as before),
``report`` (what the worker tells, the check for overflow included, on this machine's device) and
``check`` (the core's comparison). Interleaved, medians over rounds; a microsecond a request and
step is what vLLM's own scheduler takes many times over.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch
from provenance import provenance, record

from cna_vllm.serving.core.ledger import Ledger
from cna_vllm.serving.step_report import StepReport
from cna_vllm.serving.worker.state import SteeringState
from cna_vllm.serving.worker.table import CircuitTable
from cna_vllm.steering.circuit import Circuit, Neuron
from cna_vllm.steering.resolved import Steering

PROMPT = 100


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=256)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--record", action="store_true")
    options = parser.parse_args()
    count = options.requests
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    table = CircuitTable(range(32), 0, 14336, 8, device)
    circuit = Circuit("m", "A", 32, 14336, (Neuron(0, 0),))
    table.load(circuit.packed())
    state = SteeringState(table, count, 8192, 4)
    ids = [f"request-{i}" for i in range(count)]
    steering = Steering(((circuit.digest, 0.0),))
    for name in ids:
        state.add(name, steering, PROMPT)
    ledger, ones = Ledger("bfloat16"), np.ones(count, dtype=np.int32)
    for name in ids:
        ledger.begin(name, steering, PROMPT)
    scheduled, before = dict.fromkeys(ids, 1), [(name, PROMPT) for name in ids]
    computed = np.full(count, PROMPT, dtype=np.int32)
    marks = torch.zeros(count, dtype=torch.int32, device=device)

    def report() -> StepReport:
        assert state.step is not None
        return StepReport(state.step, marks.to("cpu", non_blocking=True, copy=True), 1)

    def check() -> None:
        assert ledger.check(scheduled, before, report()) == {}

    parts: dict[str, Callable[[], object]] = {
        "fill": lambda: state.fill(ids, ones, computed),
        "report": report,
        "report and check": check,
    }
    taken: dict[str, list[float]] = {name: [] for name in parts}
    for _ in range(options.rounds):
        for name, act in parts.items():
            started = time.perf_counter()
            act()
            taken[name].append((time.perf_counter() - started) * 1e6)
    medians = {name: statistics.median(times) for name, times in taken.items()}
    for name, value in medians.items():
        print(f"{name:18} {value:8.1f} us, {value / count:.2f} a request")
    if options.record:
        record("accounting", {**provenance(), "requests": count, "microseconds": medians})


if __name__ == "__main__":
    main()
