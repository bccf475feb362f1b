# SPDX-License-Identifier: Apache-2.0
"""What steering costs a server, and what resident circuits cost it.

    python benchmarks/serving.py [--model M] [--restarts 3] [--rounds 3] [--record]

Shorter, for 2 cores: --restarts 2 --rounds 2 --requests 12 --tokens 16.

Part ``load``: our server and plain vLLM's (no plugin loaded) are up side by side and take turns
with the same traffic. Variants: ``stock``; ``control``, a second plain server, whose ratio to
``stock`` is 1 but for noise; ``idle``, ours, no request steered; ``mixed``, ours, every request in
an arm drawn at random (plain, adapters of three scopes, fields with a multiplier); ``changing``,
the same while a circuit is loaded, replaced and unloaded without a pause. Memory is the resident
memory of all processes of a server: before the rounds (after a warm-up that writes the whole KV
cache once), the highest during them, and after them.

Part ``resident``: servers with 1, 100 and 1,000 circuits loaded over HTTP, every request steered by
one of its server's circuits drawn at random; and ``control``, a second server with the first count.
Time of a load, memory that a circuit costs, tokens/s and the server's CPU time per token as ratios
to the server with the first count.

Rounds run all variants once, in rotated order, one at a time. A restart starts all processes anew,
since two processes of one program differ by some percent for as long as they live. A ratio is the
median over restarts of the median over rounds of the quotient within a round, printed with its
lowest and highest restart; a difference smaller than the control's spread says nothing. With
--record a JSON row is appended to benchmarks/results/serving.jsonl.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from engine_throughput import random_circuit
from provenance import provenance, record
from servers import OURS, STOCK, Operator, Server, Traffic, serve

from cna_vllm.checkpoints.models import resolve_model

MODEL = "m"
PLAIN: Sequence[Mapping[str, Any]] = ({},)
MIXED: Sequence[Mapping[str, Any]] = (
    {},
    {"model": "off"},
    {"model": "more-all"},
    {"model": "less-generated"},
    {"vllm_xargs": {"cna_circuit": "c", "cna_multiplier": 1.1}},
)
ADAPTERS = ("off=c@0", "more-all=c@1.5:all", "less-generated=c@0.5:generated")
# variant -> (server, arms)
LOAD: Mapping[str, tuple[str, Sequence[Mapping[str, Any]]]] = {
    "stock": ("stock", PLAIN),
    "control": ("control", PLAIN),
    "idle": ("ours", PLAIN),
    "mixed": ("ours", MIXED),
    "changing": ("ours", MIXED),
}

Measured = dict[str, dict[str, float]]
Round = dict[str, Measured]


def rotated(names: Sequence[str], turn: int) -> list[str]:
    return [names[(turn + i) % len(names)] for i in range(len(names))]


def rounds(
    number: int, variants: Sequence[str], measure: Callable[[str, int], dict[str, float]]
) -> list[Measured]:
    """``number`` rounds of all variants in rotated order; a variant's seed is its round."""
    return [{v: measure(v, turn) for v in rotated(variants, turn)} for turn in range(number)]


def touch_cache(server: Server) -> None:
    """Writes all of the KV cache once, whose memory is the engine's only from then on; a GPU's is
    not in the processes' resident memory."""
    if torch.cuda.is_available():
        return
    rng = random.Random(0)
    with server.http() as http:
        metrics = http.get("/metrics").text
        line = next(at for at in metrics.splitlines() if at.startswith("vllm:cache_config_info"))
        blocks = int(line.split('num_gpu_blocks="')[1].split('"')[0])
        size = int(line.split('block_size="')[1].split('"')[0])
        for _ in range(blocks * size // 500 + 1):
            prompt = [rng.randrange(100, 10_000) for _ in range(500)]
            body = {"model": MODEL, "prompt": prompt, "max_tokens": 1}
            http.post("/v1/completions", json=body).raise_for_status()


def load_restart(number: int, folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Fresh servers side by side, and the measured rounds."""
    file = folder / "c.json"
    random_circuit(args.model, args.fraction).save(file)
    hot = ("hot-1.json", "hot-2.json")
    for seed, name in enumerate(hot, 1):
        random_circuit(args.model, args.fraction, seed).save(folder / name)
    ours = [f"--circuit=c={file}", *(f"--adapter={adapter}" for adapter in ADAPTERS)]
    ours += [f"--circuit-dir={folder}", f"--registry-dir={folder / f'registry-{number}'}"]
    kinds = {"stock": (STOCK, []), "control": (STOCK, []), "ours": (OURS, ours)}
    with ExitStack() as stack:
        servers = {}
        for kind in rotated(list(kinds), number):
            program, more = kinds[kind]
            servers[kind] = stack.enter_context(
                serve(program, args.model, [*args.common, *more], folder / f"{kind}.log")
            )
            touch_cache(servers[kind])

        def measure(variant: str, turn: int) -> dict[str, float]:
            kind, arms = LOAD[variant]
            if variant != "changing":
                return traffic(args, turn).run(servers[kind], MODEL, arms)
            with Operator(servers[kind], hot) as operator:
                measured = traffic(args, turn).run(servers[kind], MODEL, arms)
            return {**measured, "changes": operator.changes}

        rounds(1, list(LOAD), measure)
        before = {kind: server.memory() / 2**20 for kind, server in servers.items()}
        measured = rounds(args.rounds, list(LOAD), measure)
        after = {kind: server.memory() / 2**20 for kind, server in servers.items()}
    peak = {
        kind: max(one[v]["peak_mib"] for one in measured for v in LOAD if LOAD[v][0] == kind)
        for kind in servers
    }
    memory = {
        kind: {
            "before": round(before[kind]),
            "highest": round(peak[kind]),
            "after": round(after[kind]),
        }
        for kind in servers
    }
    return {"rounds": measured, "memory_mib": memory}


def resident_restart(number: int, folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """A server for each count, filled over HTTP, and the measured rounds."""
    circuits = folder / "circuits"
    circuits.mkdir(exist_ok=True)
    for i in range(max(args.counts)):
        random_circuit(args.model, args.fraction, i).save(circuits / f"c{i}.json")
    loads = {}
    with ExitStack() as stack:
        servers: dict[str, Server] = {}
        names = {str(count): count for count in args.counts} | {"control": args.counts[0]}
        for name in rotated(list(names), number):
            more = [f"--circuit-dir={circuits}", f"--max-circuits={max(args.counts)}"]
            servers[name] = stack.enter_context(
                serve(OURS, args.model, [*args.common, *more], folder / f"{name}.log")
            )
            loads[name] = fill(servers[name], names[name], max(args.counts))

        def measure(name: str, turn: int) -> dict[str, float]:
            arms = [
                {"vllm_xargs": {"cna_circuit": f"c{i}", "cna_multiplier": 1.1}}
                for i in range(names[name])
            ]
            return traffic(args, turn).run(servers[name], MODEL, arms)

        rounds(1, list(names), measure)
        return {"rounds": rounds(args.rounds, list(names), measure), "loads": loads}


def fill(server: Server, count: int, rows: int) -> dict[str, float]:
    """Loads ``count`` circuits over HTTP: seconds of a load, and bytes that a circuit costs.

    Of the server's resident memory, the table's row included, and of the row alone.
    """
    before, seconds = server.memory(), []
    with server.http() as http:
        for i in range(count):
            body = {"circuit_name": f"c{i}", "circuit_path": f"c{i}.json"}
            start = time.perf_counter()
            http.post("/v1/load_cna_circuit", json=body).raise_for_status()
            seconds.append(time.perf_counter() - start)
    return {
        "median_seconds": round(statistics.median(seconds), 5),
        "highest_seconds": round(max(seconds), 5),
        "bytes_per_circuit": round((server.memory() - before) / count),
        "bytes_per_row": round(table_bytes(server) / rows),
    }


def table_bytes(server: Server) -> float:
    """What the workers say, once the server has asked them."""
    with server.http() as http:
        for _ in range(60):
            for line in http.get("/metrics").text.splitlines():
                if line.startswith("cna:table_bytes ") and float(line.split()[1]) > 0:
                    return float(line.split()[1])
            time.sleep(1)
    raise RuntimeError("the server has not said how large its table is")


def traffic(args: argparse.Namespace, seed: int) -> Traffic:
    return Traffic(args.clients, args.requests, args.tokens, seed)


def ratios(
    restarts: Sequence[Sequence[Measured]], base: str, key: str = "tokens_per_second"
) -> dict[str, list[float]]:
    """variant -> [lowest restart, median, highest restart] of ``key`` as a ratio to ``base``."""
    found = {}
    for variant in restarts[0][0]:
        if variant == base:
            continue
        values = [
            statistics.median(one[variant][key] / one[base][key] for one in measured)
            for measured in restarts
        ]
        figures = (min(values), statistics.median(values), max(values))
        found[f"{variant}/{base}"] = [round(value, 4) for value in figures]
    return found


def figures(restarts: Sequence[Sequence[Measured]]) -> Measured:
    """variant -> median over all rounds of each figure, and of changes where there are any."""
    keys = ("tokens_per_second", "cpu_per_token", "p50", "p99", "changes")
    return {
        variant: {
            key: round(statistics.median(one[variant][key] for r in restarts for one in r), 4)
            for key in keys
            if key in first
        }
        for variant, first in restarts[0][0].items()
    }


def show(title: str, found: Measured, quotients: Mapping[str, Any]) -> None:
    print(f"{title:24} {'tokens/s':>9} {'CPU ms':>8} {'p50 s':>8} {'p99 s':>8}")
    for variant, values in found.items():
        rate, p50, p99 = values["tokens_per_second"], values["p50"], values["p99"]
        cpu = 1000 * values["cpu_per_token"]
        more = f"  {values['changes']:.0f} changes a round" if "changes" in values else ""
        print(f"{variant:24} {rate:9.1f} {cpu:8.2f} {p50:8.3f} {p99:8.3f}{more}")
    for of, found_ratios in quotients.items():
        print(f"{f'ratio of {of}':24} {'lowest':>9} {'median':>8} {'highest':>8}")
        for name, (low, middle, high) in found_ratios.items():
            print(f"{name:24} {low:9.3f} {middle:8.3f} {high:8.3f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default=None, help="default: SmolLM2-135M-Instruct")
    parser.add_argument("--part", choices=("load", "resident", "both"), default="both")
    parser.add_argument("--restarts", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=3, help="after each restart")
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--requests", type=int, default=16, help="of each client in a round")
    parser.add_argument("--tokens", type=int, default=32, help="of each reply")
    parser.add_argument("--counts", type=int, nargs="+", default=[1, 100, 1000])
    parser.add_argument("--fraction", type=float, default=0.001, help="of all neurons")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--record", action="store_true")
    args = parser.parse_args()
    args.model = resolve_model(args.model)
    args.common = [f"--served-model-name={MODEL}", f"--dtype={args.dtype}", "--enforce-eager"]
    args.common += ["--max-model-len=512", f"--max-num-seqs={2 * args.clients}"]
    if not torch.cuda.is_available():
        # Enough for every request, and soon written once; blocks are of 128 tokens on a CPU.
        args.common.append(f"--num-gpu-blocks-override={2 * args.clients * 512 // 128}")
    row: dict[str, Any] = {"benchmark": "serving", "model": Path(args.model).name}
    row |= {key: vars(args)[key] for key in ("restarts", "rounds", "clients", "requests")}
    row |= {"tokens": args.tokens, "fraction": args.fraction, "dtype": args.dtype}
    parts = {"load": load_restart, "resident": resident_restart}
    for part, restart in parts.items():
        if args.part not in (part, "both"):
            continue
        with tempfile.TemporaryDirectory() as folder:
            found = []
            for number in range(args.restarts):
                found.append(restart(number, Path(folder), args))
                print(f"{part}: restart {number + 1} of {args.restarts}", file=sys.stderr)
        measured = [one.pop("rounds") for one in found]
        base = next(iter(measured[0][0])) if part == "resident" else "stock"
        values = figures(measured)
        quotients = {
            "tokens/s": ratios(measured, base),
            "CPU time per token": ratios(measured, base, "cpu_per_token"),
        }
        show(part, values, quotients)
        for one in found:
            print(one)
        row[part] = {"figures": values, "ratios": quotients, "restarts": found}
    row |= provenance()
    if args.record:
        record("serving", row)


if __name__ == "__main__":
    main()
