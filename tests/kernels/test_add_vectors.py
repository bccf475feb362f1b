# SPDX-License-Identifier: Apache-2.0
"""``add_vectors``: the rule of rounding, the CPU path, compiled graphs, and compiled kernels."""

import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
from sass import THREADS, tool
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from cna_kernels import DTYPES, add_vectors, add_vectors_reference
from cna_kernels.add_vectors import BLOCK, add_vectors_kernel
from tests.kernels.cases import ROUTINGS, bits, make_hidden, make_row_slot, make_vectors, same

OP = torch.ops.cna.add_vectors.default
EACH_DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@EACH_DTYPE
def test_the_rule_of_rounding(dtype: torch.dtype) -> None:
    """x + c * v in float32, products and sums rounded one by one, in slot order, then once."""
    tables = make_vectors(33, "distinct", 6)
    hidden = torch.randn(6, 33, generator=torch.Generator().manual_seed(1)).to(dtype)
    before = hidden.clone()
    add_vectors(hidden, *tables)
    _, _, c, v = tables
    x = before.float()
    expected = [
        x[0] + c[0, 0] * v[0],
        (x[1] + c[1, 0] * v[2]) + c[1, 1] * v[1],
        x[2],
        x[3] + c[3, 1] * v[2],
        (x[4] + c[4, 0] * v[1]) + c[4, 1] * v[1],
        x[5],
    ]
    assert torch.equal(hidden, torch.stack(expected).to(dtype))
    assert torch.equal(bits(hidden[2]), bits(before[2]))


@EACH_DTYPE
@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("width", [1, 7, 33, 1000])
def test_equals_reference(dtype: torch.dtype, routing: str, width: int) -> None:
    for rows in (0, 1, 50):
        tables = make_vectors(width, routing, rows)
        hidden, expected = (make_hidden(width, rows, dtype, pad=3) for _ in range(2))
        untouched = hidden.clone()
        add_vectors(hidden, *tables)
        add_vectors_reference(expected, *tables)
        assert same(hidden, expected)
        plain = [r for r in range(rows) if tables.row_slot[r] in (-1, 2)]
        assert torch.equal(bits(hidden[plain]), bits(untouched[plain]))


def test_rows_over_the_size_of_a_temporary(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["cna_kernels.add_vectors"], "MAX_ELEMENTS", 100)
    tables = make_vectors(33, "skewed", 50)
    hidden, expected = (make_hidden(33, 50, torch.float32) for _ in range(2))
    add_vectors(hidden, *tables)
    add_vectors_reference(expected, *tables)
    assert same(hidden, expected)


def test_changes_of_the_tables_are_seen() -> None:
    """The routing of the last step is kept; not beyond a change in place."""
    tables = make_vectors(9, "identical", 4)
    for change in (
        lambda: None,
        lambda: tables.row_slot.copy_(make_row_slot("distinct", 4, 6)),
        lambda: tables.slot_vectors[0].fill_(2),
        lambda: tables.slot_coefficients[0].fill_(-3.0),
        lambda: tables.vectors.mul_(2.0),
    ):
        change()
        hidden, expected = (torch.ones(4, 9) for _ in range(2))
        add_vectors(hidden, *tables)
        add_vectors_reference(expected, *tables)
        assert torch.equal(hidden, expected)


class Layer(torch.nn.Module):
    """The use in a model: the output of a linear is written, then read."""

    def __init__(self) -> None:
        super().__init__()
        self.down = torch.nn.Linear(5, 9, bias=False)

    def forward(self, x: torch.Tensor, *tables: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.down(x)
        add_vectors(out, *tables)
        return out.cos()


@torch.inference_mode()
def test_compiled_graphs_keep_the_effect() -> None:
    torch.manual_seed(0)
    torch._dynamo.reset()
    layer = Layer()
    compiled: Any = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    for rows in (2, 7, 12):
        tables, x = make_vectors(9, "distinct", rows), torch.randn(rows, 5)
        assert torch.equal(compiled(x, *tables), layer(x, *tables))
        plain = tables._replace(row_slot=torch.full((rows,), -1, dtype=torch.int32))
        assert not torch.equal(compiled(x, *tables), compiled(x, *plain))


@EACH_DTYPE
def test_opcheck(dtype: torch.dtype) -> None:
    hidden = torch.randn(5, 9, generator=torch.Generator().manual_seed(0)).to(dtype)
    torch.library.opcheck(OP, (hidden, *make_vectors(9, "distinct", 5)))
    written = [a.is_write for a in (arg.alias_info for arg in OP._schema.arguments) if a]
    assert written == [True]


def compile_for(target: GPUTarget, dtype: str) -> Any:
    kernel: Any = add_vectors_kernel
    signature = {
        "hidden_ptr": f"*{dtype}",
        "row_slot_ptr": "*i32",
        "slot_vectors_ptr": "*i32",
        "slot_coefficients_ptr": "*fp32",
        "vectors_ptr": "*fp32",
        "row_stride": "i32",
        "size": "i32",
        "K": "constexpr",
        "BLOCK": "constexpr",
    }
    # Hidden sizes are multiples of 16 in every model.
    aligned = ("hidden_ptr", "vectors_ptr", "row_stride", "size")
    source = ASTSource(
        kernel,
        signature,
        constexprs={"K": 2, "BLOCK": BLOCK},
        attrs={(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    options = {"num_warps": THREADS // target.warp_size, "enable_fp_fusion": False}
    return triton.compile(source, target=target, options=options)


@pytest.fixture
def fresh_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton.knobs.cache, "dir", str(tmp_path / "cache"))


@pytest.mark.usefixtures("fresh_cache")
@pytest.mark.parametrize(("dtype", "accesses"), [("bf16", 1), ("fp16", 1), ("fp32", 2)])
@pytest.mark.parametrize("capability", [80, 90, 100])
def test_nvidia(tmp_path: Path, capability: int, dtype: str, accesses: int) -> None:
    cubin = tmp_path / "kernel.cubin"
    cubin.write_bytes(compile_for(GPUTarget("cuda", capability, 32), dtype).asm["cubin"])
    usage = tool("cuobjdump", "-res-usage", str(cubin))
    assert re.findall(r"(STACK|LOCAL):(\d+)", usage) == [("STACK", "0"), ("LOCAL", "0")]
    assembly = tool("nvdisasm", "-c", str(cubin))
    assert not re.findall(r"\b(?:LDL|STL|FFMA)\b", assembly)
    # hidden once in and once out, and float32 vectors, two accesses a slot.
    assert len(re.findall(r"\bLDG\.E\.128\b", assembly)) == accesses + 2 * 2
    assert len(re.findall(r"\bSTG\.E\.128\b", assembly)) == accesses


@pytest.mark.usefixtures("fresh_cache")
@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
def test_amd(dtype: str) -> None:
    assembly = compile_for(GPUTarget("hip", "gfx942", 64), dtype).asm["amdgcn"]
    for field in ("vgpr_spill_count", "sgpr_spill_count", "private_segment_fixed_size"):
        assert re.findall(rf"\.{field}:\s*(\d+)", assembly) == ["0"]
