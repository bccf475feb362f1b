# SPDX-License-Identifier: Apache-2.0
"""check_tables accepts what the op can read and names what it cannot; pack_mask packs."""

from typing import Any

import pytest
import torch

from cna_kernels import check_tables, mask_width, pack_mask
from tests.kernels.cases import make_tables


def test_valid_tables_pass() -> None:
    check_tables(**make_tables(33, "distinct", 9)._asdict(), intermediate_size=33)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"row_slot": torch.zeros(3, dtype=torch.int64)}, "row_slot must be torch.int32"),
        ({"row_slot": torch.tensor([6], dtype=torch.int32)}, "row_slot must hold"),
        ({"row_slot": torch.zeros(8, dtype=torch.int32)[::2]}, "row_slot must be contiguous"),
        ({"slot_circuits": torch.full((6, 4), 5, dtype=torch.int32)}, "slot_circuits must hold"),
        ({"slot_circuits": torch.full((6, 4), -2, dtype=torch.int32)}, "slot_circuits must hold"),
        ({"slot_multipliers": torch.zeros(6, 3)}, "slot_multipliers must have the shape"),
        (
            {"slot_multipliers": torch.zeros(6, 4).double()},
            "slot_multipliers must be torch.float32",
        ),
        ({"masks": torch.zeros(5, 4, dtype=torch.uint8)}, "masks must have 5 bytes"),
        ({"masks": torch.zeros(5, dtype=torch.uint8)}, "masks must be torch.uint8 with 2"),
        ({"masks": torch.zeros(5, 5, dtype=torch.uint8, device="meta")}, "masks must be on cpu"),
    ],
)
def test_invalid_tables_are_named(change: dict[str, Any], message: str) -> None:
    tables = {**make_tables(33, "distinct", 9)._asdict(), **change}
    with pytest.raises(ValueError, match=message):
        check_tables(**tables, intermediate_size=33)


def test_pack_mask() -> None:
    assert [mask_width(size) for size in (1, 8, 9, 4864)] == [1, 1, 2, 608]
    assert pack_mask([0, 3, 8, 10], 11).tolist() == [0b1001, 0b101]
    for channel in (-1, 11):
        with pytest.raises(ValueError, match="is outside"):
            pack_mask([channel], 11)
