# SPDX-License-Identifier: Apache-2.0
"""The op on this GPU: every finite 16-bit gate against float64, beside torch and vLLM's own op;
steered rows to the bit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from cna_kernels import DTYPES, EAGER, act_and_mul_scaled, scale_reference
from cna_kernels.act_and_mul_scaled import INTERPRETED
from cna_kernels.activations import ACCURATE
from gpu.parts import emit, finish, rehearsing
from tests.kernels.cases import ROUTINGS, WIDTHS, Tables, bits, make_tables, make_x, same
from tests.quick_interpreter import quicken

VLLM_OP = {"silu": "silu_and_mul", "gelu_tanh": "gelu_tanh_and_mul", "gelu": "gelu_and_mul"}
GATE_COLUMNS = 256
TINY = 2e-37
"""Results under it may vanish: the hardware's exponential has no subnormal numbers."""


class Sizes(NamedTuple):
    device: str
    dtypes: Sequence[torch.dtype]
    random: int
    """float32 gates of each standard deviation."""
    step: int
    """Every how many rows of 16-bit gates are taken."""
    widths: Sequence[int]
    rows: int
    routings: Sequence[str]


FULL = Sizes("cuda", DTYPES, 1 << 20, 1, WIDTHS, 37, ROUTINGS)
# Triton's interpreter truncates to bfloat16.
REHEARSAL = Sizes("cpu", (torch.float32, torch.float16), 256, 8, (7, 33), 5, ("skewed",))


def rounded(value: Tensor, dtype: torch.dtype) -> Tensor:
    """float64 rounded once to nearest. torch goes to 16 bits over float32, which is twice; from
    what lies beyond float32's last bit, kept in that bit, the second rounding sees all it must."""
    near = value.float()
    if dtype == torch.float32:
        return near
    raw = near.view(torch.int32)
    raw = raw - (near.double().abs() > value.abs()).int()
    sticky = torch.where(near.double() == value, raw, raw | 1)
    return sticky.view(torch.float32).to(dtype)


def ordinal(value: Tensor) -> Tensor:
    """Integers in the order of the numbers, neighbours one apart; both zeros are 0."""
    raw = bits(value).long()
    lowest = torch.iinfo(bits(value).dtype).min
    return torch.where(raw < 0, lowest - raw, raw)


def gates(dtype: torch.dtype, sizes: Sizes) -> Tensor:
    """[n, GATE_COLUMNS]: every finite number, of float32 some of all sizes."""
    if dtype == torch.float32:
        generator = torch.Generator().manual_seed(0)
        scales = torch.tensor([0.01, 1.0, 5.0, 20.0])
        return (torch.randn(sizes.random, 4, generator=generator) * scales).view(-1, GATE_COLUMNS)
    every = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    return every[every.isfinite()].view(-1, GATE_COLUMNS)[:: sizes.step]


def moved(tables: Tables, device: str) -> Tables:
    return Tables(*(tensor.to(device) for tensor in tables))


def check_gates(dtype: torch.dtype, activation: str, sizes: Sizes) -> list[str]:
    """Emits how many gates each implementation has off, and, tiny ones aside, by how many units."""
    gate = gates(dtype, sizes)
    exact = ACCURATE[activation](gate.double())
    expected, tiny = ordinal(rounded(exact, dtype)), exact.abs() < TINY
    x = torch.cat([gate, torch.ones_like(gate)], 1).to(sizes.device)
    idle = moved(make_tables(GATE_COLUMNS, "none", len(gate)), sizes.device)
    theirs = torch.empty(gate.shape, dtype=dtype, device=sizes.device)
    getattr(torch.ops._C, VLLM_OP[activation])(theirs, x)
    results = {
        "ours": act_and_mul_scaled(x, *idle, activation),
        "torch": EAGER[activation](x[:, :GATE_COLUMNS]),
        "vllm": theirs,
    }
    found = {}
    for name, result in results.items():
        units = (ordinal(result.cpu()) - expected).abs()
        found[name] = {
            "off": int((units > 0).sum()),
            "off_tiny": int(((units > 0) & tiny).sum()),
            "max_units": int(units.where(~tiny, 0).max()),
        }
    kind = str(dtype).removeprefix("torch.")
    emit({"dtype": kind, "activation": activation, "gates": gate.numel(), **found})
    worst = found["ours"]["max_units"]
    return [f"{kind} {activation}: off by {worst} units"] if worst > 1 and kind != "float32" else []


def check_steered(sizes: Sizes) -> list[str]:
    """Steered rows are exact products of the op's own plain ones, infinities and NaN included."""
    wrong, cases = [], 0
    for dtype in sizes.dtypes:
        for width in sizes.widths:
            x = make_x(width, sizes.rows, dtype, hostile=True).to(sizes.device)
            for routing in sizes.routings:
                tables = make_tables(width, routing, sizes.rows)
                there = moved(tables, sizes.device)
                idle = there._replace(row_slot=torch.full_like(there.row_slot, -1))
                for activation in EAGER:
                    plain = act_and_mul_scaled(x, *idle, activation).cpu()
                    out = act_and_mul_scaled(x, *there, activation).cpu()
                    cases += 1
                    if not same(out, scale_reference(plain, *tables)):
                        wrong.append(f"{dtype} {activation} width {width}, {routing}")
    emit({"cases": cases, "to_the_bit": cases - len(wrong), "wrong": wrong})
    return [f"steered rows differ: {'; '.join(wrong)}"] if wrong else []


def register_vllm_ops() -> None:
    """Makes ``torch.ops._C``; in a rehearsal, Triton's interpreter quicker as well."""
    import vllm._custom_ops  # noqa: F401

    if INTERPRETED:
        quicken()


def main() -> None:
    register_vllm_ops()
    sizes = REHEARSAL if rehearsing() else FULL
    wrong = [
        reason
        for dtype in sizes.dtypes
        for activation in EAGER
        for reason in check_gates(dtype, activation, sizes)
    ]
    finish(wrong + check_steered(sizes))


if __name__ == "__main__":
    main()
