# SPDX-License-Identifier: Apache-2.0
"""Time of the op beside vLLM's own, by dtype, width and rows.

Replays of CUDA graphs (plain calls on the CPU), variants interleaved. A graph goes over as many
buffers as exceed a GPU's L2, each variant writes as many outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from act_and_mul_scaled import PLAIN, measure
from torch import Tensor

from cna_kernels import act_and_mul_scaled, mask_width
from gpu.kernel_check import VLLM_OP, register_vllm_ops
from gpu.parts import emit, finish, rehearsing


class Sizes(NamedTuple):
    device: str
    dtypes: Sequence[torch.dtype]
    widths: Sequence[int]
    rows: Sequence[int]
    bytes: int
    """What the buffers of a graph hold together, at least."""
    circuits: int
    rounds: int


FULL = Sizes(
    "cuda",
    (torch.bfloat16, torch.float16, torch.float32),
    (4864, 14336),
    (1, 64, 256, 1024, 8192),
    128 << 20,
    256,
    11,
)
REHEARSAL = Sizes("cpu", (torch.float16,), (64,), (1,), 0, 4, 2)
FEWEST_BUFFERS = 2
MEMBERS = 16
"""Channels of a circuit in the layer."""

Variants = Mapping[str, Callable[[], Sequence[Tensor]]]


def variants(x: Sequence[Tensor], activation: str, circuits: int) -> Variants:
    """Each goes over all of x, [rows, 2 * width] each, and keeps all outputs until its end, so
    that none is written where the last one was."""
    rows, width, device = x[0].shape[0], x[0].shape[1] // 2, x[0].device
    generator = torch.Generator().manual_seed(0)
    masks = torch.zeros(circuits, mask_width(width), dtype=torch.uint8)
    places = torch.randint(0, mask_width(width), (circuits, MEMBERS), generator=generator)
    masks = masks.scatter_(1, places, 1).to(device)
    slot_circuits = torch.full((circuits, 4), -1, dtype=torch.int32)
    slot_circuits[:, 0] = torch.arange(circuits)
    slot_circuits = slot_circuits.to(device)
    multipliers = torch.full((circuits, 4), 1.5).to(device)
    routings = {
        "idle": torch.full((rows,), -1),
        "one arm": torch.zeros(rows),
        "distinct arms": torch.arange(rows) % circuits,
    }
    operator = getattr(torch.ops._C, VLLM_OP[activation])

    def theirs(of: Tensor) -> Tensor:
        out = torch.empty((rows, width), dtype=of.dtype, device=device)
        operator(out, of)
        return out

    def steered(row_slot: Tensor, held: Tensor) -> Callable[[], Sequence[Tensor]]:
        tables = (row_slot.to(device, torch.int32), slot_circuits, multipliers, held)
        return lambda: [act_and_mul_scaled(of, *tables, activation) for of in x]

    named = {name: steered(row_slot, masks) for name, row_slot in routings.items()}
    empty = steered(routings["distinct arms"], torch.zeros_like(masks))
    return {PLAIN: lambda: [theirs(of) for of in x], **named, "layer without bits": empty}


def bench(dtype: torch.dtype, width: int, rows: int, sizes: Sizes, activation: str) -> None:
    moved = rows * 3 * width * dtype.itemsize
    count = max(FEWEST_BUFFERS, -(-sizes.bytes // moved))
    device = torch.device(sizes.device)
    x = [torch.randn(rows, 2 * width, device=device).to(dtype) for _ in range(count)]
    times = measure(variants(x, activation, sizes.circuits), sizes.rounds, device)
    cells = {}
    for name, cell in times.items():
        us = cell["us"] / count
        cells["vllm" if name == PLAIN else name] = {
            "us": round(us, 3),
            "us_low": round(cell["us_low"] / count, 3),
            "us_high": round(cell["us_high"] / count, 3),
            "ratio": round(cell["ratio"], 4),
            "gb_per_s": round(moved / us / 1e3, 1),
        }
    emit(
        {
            "dtype": str(dtype).removeprefix("torch."),
            "activation": activation,
            "width": width,
            "rows": rows,
            "buffers": count,
            "rounds": sizes.rounds,
            "variants": cells,
        }
    )


def main() -> None:
    register_vllm_ops()
    sizes = REHEARSAL if rehearsing() else FULL
    with torch.inference_mode():
        for dtype in sizes.dtypes:
            for width in sizes.widths:
                for rows in sizes.rows:
                    bench(dtype, width, rows, sizes, "silu")
                    if sizes.device == "cuda":
                        torch.cuda.empty_cache()
    finish()


if __name__ == "__main__":
    main()
