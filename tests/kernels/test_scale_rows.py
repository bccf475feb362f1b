# SPDX-License-Identifier: Apache-2.0
"""``scale_rows`` on the CPU, in compiled graphs, and what the compilers make of its kernel."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
from sass import tool
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from cna_kernels import DTYPES, cpu, scale_rows, scale_rows_reference
from cna_kernels.scale_rows import BLOCK, scale_rows_kernel
from tests.kernels.cases import (
    ROUTINGS,
    bits,
    inside_circuits,
    make_hidden,
    make_tables,
    same,
)
from tests.kernels.test_compiled_kernel import fresh_cache

OP = torch.ops.cna.scale_rows.default
EACH_DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=str)
__all__ = ["fresh_cache"]


@EACH_DTYPE
@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("width", [1, 7, 33, 1000])
@pytest.mark.parametrize("pad", [0, 3])
def test_equals_reference(dtype: torch.dtype, routing: str, width: int, pad: int) -> None:
    """In place, with a row stride over the width; what no circuit holds keeps its bits."""
    for rows in (0, 1, 50):
        tables = make_tables(width, routing, rows)
        a, expected, before = (make_hidden(width, rows, dtype, pad=pad) for _ in range(3))
        address = a.data_ptr()
        scale_rows(a, *tables)
        scale_rows_reference(expected, *tables)
        assert a.data_ptr() == address
        assert same(a, expected)
        outside = ~inside_circuits(tables, rows, width)
        assert torch.equal(bits(a)[outside], bits(before)[outside])


@pytest.mark.parametrize("elements", [1, 64, 5000])
@pytest.mark.parametrize("pad", [0, 3])
def test_blocks_of_rows(monkeypatch: pytest.MonkeyPatch, elements: int, pad: int) -> None:
    monkeypatch.setattr(cpu, "MAX_ELEMENTS", elements)
    tables = make_tables(33, "distinct", 70)
    a, expected = (make_hidden(33, 70, torch.bfloat16, pad=pad) for _ in range(2))
    scale_rows(a, *tables)
    scale_rows_reference(expected, *tables)
    assert same(a, expected)


class Mlp(torch.nn.Module):
    """The use in a model: the output of an activation is written, then read by a linear."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = torch.nn.Linear(16, 33), torch.nn.Linear(33, 16)

    def forward(self, hidden: Tensor, *tables: Tensor) -> Tensor:
        a = torch.nn.functional.gelu(self.up(hidden))
        scale_rows(a, *tables)
        out: Tensor = self.down(a)
        return out


@torch.inference_mode()
def test_compiled_graphs_keep_the_effect() -> None:
    torch.manual_seed(0)
    torch._dynamo.reset()
    mlp = Mlp()
    compiled: Any = torch.compile(mlp, fullgraph=True, dynamic=True, backend="aot_eager")
    for rows in (2, 7, 12):
        tables, hidden = make_tables(33, "distinct", rows), torch.randn(rows, 16)
        assert torch.equal(compiled(hidden, *tables), mlp(hidden, *tables))
        idle = tables._replace(row_slot=torch.full((rows,), -1, dtype=torch.int32))
        assert not torch.equal(compiled(hidden, *tables), compiled(hidden, *idle))


@EACH_DTYPE
def test_opcheck(dtype: torch.dtype) -> None:
    rows = torch.randn(9, 33, generator=torch.Generator().manual_seed(0)).to(dtype)
    torch.library.opcheck(OP, (rows, *make_tables(33, "padded", 9)))
    written = [a.is_write for a in (arg.alias_info for arg in OP._schema.arguments) if a]
    assert written == [True]


def compile_for(target: GPUTarget, dtype: str) -> Any:
    kernel: Any = scale_rows_kernel
    signature = {
        "a_ptr": f"*{dtype}",
        "row_slot_ptr": "*i32",
        "slot_circuits_ptr": "*i32",
        "slot_multipliers_ptr": "*fp32",
        "masks_ptr": "*u8",
        "a_row_stride": "i32",
        "size": "i32",
        **dict.fromkeys(("K", "BLOCK"), "constexpr"),
    }
    aligned = ("a_ptr", "a_row_stride", "size")
    source = ASTSource(
        kernel,
        signature,
        constexprs={"K": 4, "BLOCK": BLOCK},
        attrs={(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    return triton.compile(
        source, target=target, options={"num_warps": 1, "enable_fp_fusion": False}
    )


@pytest.mark.usefixtures("fresh_cache")
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("capability", [80, 90, 100])
def test_nvidia(tmp_path: Path, capability: int, dtype: str) -> None:
    """No spills, and a warp waits for no other; one mask byte an entry."""
    cubin = tmp_path / "kernel.cubin"
    cubin.write_bytes(compile_for(GPUTarget("cuda", capability, 32), dtype).asm["cubin"])
    usage = tool("cuobjdump", "-res-usage", str(cubin))
    assert re.findall(r"(STACK|LOCAL):(\d+)", usage) == [("STACK", "0"), ("LOCAL", "0")]
    (registers,) = re.findall(r"REG:(\d+)", usage)
    assert int(registers) <= 65536 // (32 * 32), "32 programs an SM, as MAX_PROGRAMS says"
    assembly = tool("nvdisasm", "-c", str(cubin))
    assert not re.findall(r"\b(?:LDL|STL|BAR|FFMA)\b", assembly)
    assert len(re.findall(r"\bLDG\.E\.U8\b", assembly)) == 4


@pytest.mark.usefixtures("fresh_cache")
def test_amd() -> None:
    assembly = compile_for(GPUTarget("hip", "gfx942", 64), "bf16").asm["amdgcn"]
    for field in ("vgpr_spill_count", "sgpr_spill_count", "private_segment_fixed_size"):
        assert re.findall(rf"\.{field}:\s*(\d+)", assembly) == ["0"]
