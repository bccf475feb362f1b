# SPDX-License-Identifier: Apache-2.0
"""Operands shared by the kernel tests."""

from typing import Final, NamedTuple

import torch
from torch import Tensor

from cna_kernels import mask_width, pack_mask, scale_reference

WIDTHS: Final = (1536, 4864, 14336, 1, 7, 33, 1000)
ROUTINGS: Final = ("none", "identical", "distinct", "skewed", "padded")
MULTIPLIERS: Final = (0.0, -0.0, 0.5, 2.0, -1.0, 1e4)
BITS: Final = {
    torch.float32: torch.int32,
    torch.bfloat16: torch.int16,
    torch.float16: torch.int16,
}


class Tables(NamedTuple):
    row_slot: Tensor
    slot_circuits: Tensor
    slot_multipliers: Tensor
    masks: Tensor


def bits(tensor: Tensor) -> Tensor:
    """Integer view, in which NaN payloads and the sign of zero count."""
    return tensor.view(BITS[tensor.dtype])


def same(a: Tensor, b: Tensor) -> bool:
    """Equal bits, except that any NaN equals any NaN: torch's payloads depend on alignment."""
    return torch.equal(a.isnan(), b.isnan()) and torch.equal(
        bits(a)[~a.isnan()], bits(b)[~b.isnan()]
    )


def make_masks(width: int, seed: int = 0) -> Tensor:
    """Five circuits: sparse, overlapping sparse, every channel with padding bits, last, none."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(width, generator=generator)[:48].tolist()
    full = torch.full((mask_width(width),), 255, dtype=torch.uint8)
    return torch.stack(
        [
            pack_mask(order[:32], width),
            pack_mask(order[16:], width),
            full,
            pack_mask([width - 1], width),
            pack_mask([], width),
        ]
    )


def make_row_slot(routing: str, rows: int, slots: int) -> Tensor:
    """int32 row_slot; "padded" is longer than rows, with indices past T that no table has."""
    match routing:
        case "none":
            row_slot = [-1] * rows
        case "identical":
            row_slot = [1] * rows
        case "distinct":
            row_slot = [row % slots for row in range(rows)]
        case "skewed":
            row_slot = [0 if row % 4 else (row // 4) % (slots + 1) - 1 for row in range(rows)]
        case "padded":
            row_slot = [row % (slots + 1) - 1 for row in range(rows)] + [1 << 30] * 5
        case _:
            raise ValueError(routing)
    return torch.tensor(row_slot, dtype=torch.int32)


def make_tables(width: int, routing: str, rows: int) -> Tables:
    """Six slots of four entries: holes anywhere, overlapping circuits, every one of MULTIPLIERS."""
    circuits = [
        [-1, 0, -1, 1],
        [0, 1, -1, -1],
        [-1, -1, -1, -1],
        [3, 2, 1, 0],
        [-1, 1, 4, -1],
        [3, -1, -1, 0],
    ]
    multipliers = torch.tensor(MULTIPLIERS)[torch.arange(24).reshape(6, 4) * 5 % 6]
    multipliers = multipliers.roll(1, 0)
    multipliers[3] = torch.tensor([0.1, 1.7, -0.3, 1.1])
    return Tables(
        make_row_slot(routing, rows, len(circuits)),
        torch.tensor(circuits, dtype=torch.int32),
        multipliers.contiguous(),
        make_masks(width),
    )


def make_x(
    width: int, rows: int, dtype: torch.dtype, *, hostile: bool = False, pad: int = 0
) -> Tensor:
    """x [rows, 2 * width] with row stride 2 * width + pad; hostile adds infinities and NaN."""
    generator = torch.Generator().manual_seed(width + rows)
    x = 3 * torch.randn(rows, 2 * width + pad, generator=generator)
    if hostile:
        special = torch.tensor([float("inf"), float("-inf"), float("nan"), 0.0, -0.0, 1e30])
        chosen = torch.rand(x.shape, generator=generator) < 0.2
        x[chosen] = special[torch.randint(6, (int(chosen.sum()),), generator=generator)]
    return x.to(dtype)[:, : 2 * width]


class VectorTables(NamedTuple):
    row_slot: Tensor
    slot_vectors: Tensor
    slot_coefficients: Tensor
    vectors: Tensor


def make_vectors(width: int, routing: str, rows: int) -> VectorTables:
    """Six slots of two entries: none, either, both, the same vector twice; every sign."""
    generator = torch.Generator().manual_seed(width)
    slot_vectors = [[0, -1], [2, 1], [-1, -1], [-1, 2], [1, 1], [0, 2]]
    coefficients = [[1.0, 7.0], [-0.3, 1.7], [3.0, 5.0], [9.0, -1.0], [0.1, 1e4], [0.0, -0.0]]
    return VectorTables(
        make_row_slot(routing, rows, len(slot_vectors)),
        torch.tensor(slot_vectors, dtype=torch.int32),
        torch.tensor(coefficients),
        torch.randn(3, width, generator=generator),
    )


def make_hidden(width: int, rows: int, dtype: torch.dtype, *, pad: int = 0) -> Tensor:
    """[rows, width] with row stride width + pad, infinities, NaN and both zeros among it."""
    return make_x(width + pad, rows, dtype, hostile=True)[:, :width]


def inside_circuits(tables: Tables, rows: int, width: int) -> Tensor:
    """bool [rows, width]: whether a circuit of the row's slot holds the channel."""
    zeroing = tables._replace(slot_multipliers=torch.zeros_like(tables.slot_multipliers))
    return scale_reference(torch.ones(rows, width), *zeroing) == 0


def overflow_case(
    dtype: torch.dtype, rows: int, width: int, slots: int, seed: int
) -> tuple[Tensor, Tensor]:
    """Hidden states, some rows of which are not finite or all zero, and a longer row_slot."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, width, generator=generator)
    special = (float("inf"), float("-inf"), float("nan"))
    for row in range(rows):
        match int(torch.randint(6, (1,), generator=generator)):
            case n if n < 3:
                hidden[row, int(torch.randint(width, (1,), generator=generator))] = special[n]
            case 3:
                hidden[row] = 0.0
    row_slot = torch.randint(-2, slots, (rows + 2,), generator=generator, dtype=torch.int32)
    return hidden.to(dtype), row_slot.clamp(min=-1)


class Ahead(NamedTuple):
    """x, what is to steer it, and bool [rows, width]: which channels a factor changes."""

    x: Tensor
    tables: Tables
    changed: Tensor


def make_ahead(width: int, routing: str, rows: int, dtype: torch.dtype) -> Ahead:
    """Operands of ``steer_gate_up``, with infinities and NaN in x, and a row stride over 2 * width.

    Of the multipliers, those of "skewed" are MULTIPLIERS, and those of all else more common.
    """
    tables = make_tables(width, routing, rows)
    if routing != "skewed":
        common = torch.tensor([0.0, 1.0, 2.0, 0.37, -1.0, 1.5])
        tables = tables._replace(slot_multipliers=common[torch.arange(24).reshape(6, 4) * 5 % 6])
    factor = scale_reference(torch.ones(rows, width), *tables)
    return Ahead(make_x(width, rows, dtype, hostile=True, pad=3), tables, factor != 1)
