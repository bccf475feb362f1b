# SPDX-License-Identifier: Apache-2.0
"""What steering costs a whole engine: tokens/s of each variant as a ratio to stock vLLM's.

    python benchmarks/engine_throughput.py [--model M] [--restarts 6] [--rounds 3] [--record]

Variants: ``stock``, vLLM with no plugin loaded; ``control``, the same in a second process, whose
ratio to ``stock`` is 1 but for noise; ``idle``, circuits configured, no request steered;
``steered``, every request steered with a multiplier of its own. Rounds run all variants once, in
rotated order, one at a time.

Two processes of the same program differ by up to 6% for as long as they live, by where their
memory came to lie; rounds cannot average that out. So a restart starts all processes anew, in
rotated order, with transparent huge pages for malloc where the C library has them, and a ratio
is the median over restarts of the median over rounds of the quotient within a round. It is
printed with its lowest and highest restart: a difference smaller than the control's spread says
nothing. ``steered/idle`` compares two variants of one process, so it is free of that effect. CPU
ratios compare tokens per second of the process's CPU time, which other load on the machine
disturbs less. With --record a JSON row is appended to benchmarks/results/engine_throughput.jsonl.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from provenance import provenance, record
from workers import Worker

from cna_vllm import Circuit, Neuron, steer
from cna_vllm.checkpoints.models import model_dimensions, resolve_model

STOCK, CONTROL, IDLE, STEERED = "stock", "control", "idle", "steered"
VARIANTS = (STOCK, CONTROL, IDLE, STEERED)


def serve(model: str, circuits: str, batch: int, tokens: int, compiled: bool) -> None:
    """The worker: one engine, one measured batch for each line on standard input."""
    from vllm import LLM, SamplingParams, TokensPrompt

    rng = random.Random(0)
    llm = LLM(
        model=model,
        dtype="float32" if not _cuda() else "auto",
        enforce_eager=not compiled,
        max_model_len=512,
        max_num_seqs=batch,
        enable_prefix_caching=False,
        additional_config=json.loads(circuits),
    )
    prompts = [
        TokensPrompt(prompt_token_ids=[rng.randrange(100, 10_000) for _ in range(32)])
        for _ in range(batch)
    ]
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        steered = json.loads(line)
        params = [
            SamplingParams(
                temperature=0.0,
                max_tokens=tokens,
                ignore_eos=True,
                # Multipliers near 1, each another one: the text stays text, the work is the same.
                extra_args=steer("c", 1.001 + 0.001 * i) if steered else None,
            )
            for i in range(batch)
        ]
        wall, cpu = time.perf_counter(), time.process_time()
        llm.generate(prompts, params, use_tqdm=False)
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        print(json.dumps({"wall": batch * tokens / wall, "cpu": batch * tokens / cpu}), flush=True)


def _cuda() -> bool:
    import torch

    return torch.cuda.is_available()


def random_circuit(model: str, fraction: float, seed: int = 0) -> Circuit:
    """A circuit of ``fraction`` of all neurons, spread over all layers."""
    dimensions = model_dimensions(model)
    layers, width = dimensions["num_layers"], dimensions["intermediate_size"]
    chosen = random.Random(seed).sample(
        range(layers * width), max(1, int(fraction * layers * width))
    )
    return Circuit(neurons=tuple(Neuron(i // width, i % width, 1.0) for i in chosen), **dimensions)


Round = dict[str, dict[str, float]]


def restart(number: int, config: dict[str, Any], args: argparse.Namespace) -> list[Round]:
    """Fresh processes, a warm-up, and the measured rounds."""
    kinds: list[tuple[str, dict[str, Any], str | None]] = [
        (STOCK, {}, ""),
        (CONTROL, {}, ""),
        (IDLE, config, None),
    ]
    options = ["--model", args.model, "--batch", str(args.batch), "--tokens", str(args.tokens)]
    options += ["--compiled"] if args.compiled else []
    workers: dict[str, Worker] = {}
    for i in range(len(kinds)):
        name, section, plugins = kinds[(number + i) % len(kinds)]
        workers[name] = Worker(__file__, [*options, "--worker", json.dumps(section)], plugins)
    workers[STEERED] = workers[IDLE]
    for variant in VARIANTS:
        workers[variant].ask(variant == STEERED)
    rounds = []
    for turn in range(args.rounds):
        order = [VARIANTS[(turn + i) % len(VARIANTS)] for i in range(len(VARIANTS))]
        rounds.append({v: workers[v].ask(v == STEERED) for v in order})
    for worker in set(workers.values()):
        worker.close()
    return rounds


def ratios(restarts: list[list[Round]], clock: str) -> dict[str, list[float]]:
    """variant -> [lowest restart, median, highest restart] of the ratio of tokens per second."""
    pairs = [(v, STOCK) for v in VARIANTS[1:]] + [(STEERED, IDLE)]
    result = {}
    for variant, base in pairs:
        values = [
            statistics.median(r[variant][clock] / r[base][clock] for r in rounds)
            for rounds in restarts
        ]
        figures = (min(values), statistics.median(values), max(values))
        result[f"{variant}/{base}"] = [round(value, 4) for value in figures]
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default=None, help="default: SmolLM2-135M-Instruct")
    parser.add_argument("--restarts", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=3, help="after each restart")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--fraction", type=float, default=0.001, help="of all neurons")
    parser.add_argument("--compiled", action="store_true", help="torch.compile instead of eager")
    parser.add_argument("--record", action="store_true")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.model = resolve_model(args.model)
    if args.worker is not None:
        serve(args.model, args.worker, args.batch, args.tokens, args.compiled)
        return
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "circuit.json"
        circuit = random_circuit(args.model, args.fraction)
        circuit.save(file)
        config = {"cna": {"circuits": {"c": str(file)}}}
        restarts = []
        for number in range(args.restarts):
            restarts.append(restart(number, config, args))
            print(f"restart {number + 1} of {args.restarts}", file=sys.stderr)
    table = {clock: ratios(restarts, clock) for clock in ("wall", "cpu")}
    print(f"{'ratio of tokens/s':28} {'lowest':>8} {'median':>8} {'highest':>8}")
    for clock, rows in table.items():
        for name, (low, middle, high) in rows.items():
            print(f"{name + ', ' + clock:28} {low:8.3f} {middle:8.3f} {high:8.3f}")
    row = {
        "benchmark": "engine_throughput",
        "model": Path(args.model).name,
        "neurons": len(circuit),
        "restarts": args.restarts,
        "rounds": args.rounds,
        "batch": args.batch,
        "tokens": args.tokens,
        "compiled": args.compiled,
        "stock_tokens_per_second": round(
            statistics.median(r[STOCK]["wall"] for rounds in restarts for r in rounds), 1
        ),
        "ratios": table,
        **provenance(),
    }
    if args.record:
        record("engine_throughput", row)


if __name__ == "__main__":
    main()
