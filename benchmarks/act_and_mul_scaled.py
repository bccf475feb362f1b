# SPDX-License-Identifier: Apache-2.0
"""Time of ``act_and_mul_scaled`` beside vLLM's SiluAndMul, by rows and width.

    PYTHONPATH=kernels python benchmarks/act_and_mul_scaled.py [--record]

Variants are interleaved, one sample of each a round, so that drift of the machine falls on all
of them. A ratio is the median over rounds of the quotient within a round. Steered rows take one
circuit of ``--circuit`` channels each: the same arm for all, or an arm and a circuit a row.
"Bytes" are what must move: gate, up and out, and row_slot. With --record one JSON row is appended
to benchmarks/results/act_and_mul_scaled.jsonl.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Final

import torch
import torch.nn.functional as F
from provenance import provenance, record
from torch import Tensor

from cna_kernels import act_and_mul_scaled, act_and_mul_scaled_reference, mask_width, pack_mask

MEASURE_SECONDS: Final = 2e-3
PLAIN: Final = "plain"

Variants = Mapping[str, Callable[[], object]]


def plain_activation(device: torch.device) -> tuple[str, Callable[[Tensor], Tensor]]:
    """vLLM's SiluAndMul for the device, or the same eager expression where vLLM is absent."""

    def eager(x: Tensor) -> Tensor:
        size = x.shape[-1] // 2
        return F.silu(x[..., :size]) * x[..., size:]

    try:
        from vllm.model_executor.layers.activation import SiluAndMul
    except ImportError:
        return "eager torch", eager
    if device.type == "cpu":
        return "vLLM SiluAndMul.forward_native", SiluAndMul.forward_native
    fused = torch.ops._C.silu_and_mul

    def vllm_cuda(x: Tensor) -> Tensor:
        out = torch.empty((x.shape[0], x.shape[1] // 2), dtype=x.dtype, device=x.device)
        fused(out, x)
        return out

    return "vLLM _C.silu_and_mul", vllm_cuda


def make_variants(
    rows: int, size: int, dtype: torch.dtype, device: torch.device, circuit: int
) -> Variants:
    """Closures over one x; the steered ones are checked against the reference (CPU: exactly)."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, 2 * size, generator=generator).to(device, dtype)
    masks = torch.stack(
        [
            pack_mask(torch.randperm(size, generator=generator)[:circuit].tolist(), size)
            for _ in range(rows)
        ]
    ).to(device)
    circuits = torch.full((rows, 4), -1, dtype=torch.int32)
    circuits[:, 1] = torch.arange(rows)
    multipliers = torch.full((rows, 4), 1.5).to(device)
    circuits = circuits.to(device)
    routings = {
        "idle": torch.full((rows,), -1),
        "steered, one arm": torch.zeros(rows),
        "steered, distinct arms": torch.arange(rows),
    }

    def steered(row_slot: Tensor, held: Tensor) -> Callable[[], Tensor]:
        operands = (x, row_slot, circuits, multipliers, held, "silu")
        expected = act_and_mul_scaled_reference(*operands)
        out = act_and_mul_scaled(*operands)
        tolerance = 0.0 if device.type == "cpu" else None
        torch.testing.assert_close(out, expected, rtol=tolerance, atol=tolerance)
        return lambda: act_and_mul_scaled(*operands)

    _, plain = plain_activation(device)
    variants = {PLAIN: lambda: plain(x)}
    for name, row_slot in routings.items():
        variants[name] = steered(row_slot.to(device, torch.int32), masks)
    distinct = torch.arange(rows, dtype=torch.int32, device=device)
    variants["steered, layer without bits"] = steered(distinct, torch.zeros_like(masks))
    return variants


def seconds(call: Callable[[], object], repeats: int, device: torch.device) -> float:
    """Mean seconds of a call: wall clock on the CPU, CUDA events around the batch on a GPU."""
    if device.type == "cpu":
        start = time.perf_counter()
        for _ in range(repeats):
            call()
        return (time.perf_counter() - start) / repeats
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(repeats):
        call()
    end.record()
    end.synchronize()
    milliseconds: float = begin.elapsed_time(end)
    return milliseconds / 1e3 / repeats


def captured(call: Callable[[], object], device: torch.device) -> Callable[[], object]:
    """The call itself on the CPU; on a GPU the replay of its CUDA graph, as in serving."""
    if device.type == "cpu":
        return call
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def measure(variants: Variants, rounds: int, device: torch.device) -> dict[str, dict[str, float]]:
    """Microseconds (median and quartiles over rounds) and ratio to PLAIN of every variant."""
    calls = {name: captured(call, device) for name, call in variants.items()}
    repeats = {}
    for name, call in calls.items():
        seconds(call, 20, device)
        repeats[name] = max(5, int(MEASURE_SECONDS / seconds(call, 20, device)))
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for index in range(rounds):
        order = list(calls) if index % 2 else list(reversed(calls))
        for name in order:
            samples[name].append(1e6 * seconds(calls[name], repeats[name], device))
    result = {}
    for name, values in samples.items():
        low, median, high = statistics.quantiles(values, n=4)
        ratios = [value / plain for value, plain in zip(values, samples[PLAIN], strict=True)]
        added = [value - plain for value, plain in zip(values, samples[PLAIN], strict=True)]
        result[name] = {
            "us": median,
            "us_low": low,
            "us_high": high,
            "ratio": statistics.median(ratios),
            "added_us": statistics.median(added),
        }
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description="Time act_and_mul_scaled beside SiluAndMul.")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 16, 64, 512])
    parser.add_argument("--sizes", type=int, nargs="+", default=[1536, 4864])
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16")
    parser.add_argument("--circuit", type=int, default=16, help="channels of a circuit in a layer")
    parser.add_argument("--rounds", type=int, default=41)
    parser.add_argument("--record", action="store_true")
    arguments = parser.parse_args()

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = getattr(torch, arguments.dtype)
    baseline, _ = plain_activation(device)
    print(f"{PLAIN} = {baseline}, {arguments.dtype}, {arguments.circuit} channels a circuit")
    cells = []
    for size in arguments.sizes:
        for rows in arguments.rows:
            with torch.inference_mode():
                variants = make_variants(rows, size, dtype, device, arguments.circuit)
                times = measure(variants, arguments.rounds, device)
            moved = rows * (3 * size * dtype.itemsize + 4)
            for name, cell in times.items():
                steered_bytes = rows * mask_width(size) if name.startswith("steered") else 0
                cell["bytes"] = moved + steered_bytes
                cell["gb_per_s"] = cell["bytes"] / cell["us"] / 1e3
                cells.append({"rows": rows, "size": size, "variant": name, **cell})
                print(
                    f"I={size:<6} T={rows:<4} {name:28} {cell['us']:9.1f} us "
                    f"[{cell['us_low']:.1f}, {cell['us_high']:.1f}]  x{cell['ratio']:.2f} "
                    f"{cell['added_us']:+8.1f} us  {cell['gb_per_s']:7.2f} GB/s"
                )
    if arguments.record:
        row = {
            **provenance(),
            "baseline": baseline,
            "dtype": arguments.dtype,
            "circuit": arguments.circuit,
            "rounds": arguments.rounds,
            "cells": cells,
        }
        record("act_and_mul_scaled", row)


if __name__ == "__main__":
    main()
