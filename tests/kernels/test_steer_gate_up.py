# SPDX-License-Identifier: Apache-2.0
"""``steer_gate_up``: what comes after it computes the steered rows, however it computes."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
from sass import tool
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from cna_kernels import CARRYING_DTYPES, EAGER, act_and_mul_scaled, steer_gate_up
from cna_kernels.steer_gate_up import BLOCK, CARRIER, MAX_ELEMENTS, steer_gate_up_kernel
from tests.kernels.cases import ROUTINGS, Tables, bits, make_ahead, make_tables, make_x, same
from tests.kernels.test_compiled_kernel import ACTIVATIONS, fresh_cache

OP = torch.ops.cna.steer_gate_up.default
EACH_DTYPE = pytest.mark.parametrize("dtype", CARRYING_DTYPES, ids=str)
__all__ = ["fresh_cache"]


@EACH_DTYPE
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("width", [1, 7, 33, 1000])
def test_what_follows_computes_the_steered_rows(
    dtype: torch.dtype, activation: str, routing: str, width: int
) -> None:
    """Rounded in between or not; all other elements of gate and up keep their bits."""
    for rows in (0, 1, 50):
        ahead = make_ahead(width, routing, rows, dtype)
        x = ahead.x.clone()
        steer_gate_up(ahead.x, *ahead.tables, activation)
        gate, up = ahead.x.chunk(2, 1)
        expected = act_and_mul_scaled(x, *ahead.tables, activation)
        assert same(EAGER[activation](gate) * up, expected)
        changed = ahead.changed
        unrounded = EAGER[activation](gate.float()) * up.float()
        assert same(unrounded[changed], expected.float()[changed])
        kept = ~changed.repeat(1, 2)
        assert torch.equal(bits(ahead.x)[kept], bits(x)[kept])
        assert not bool(changed[ahead.tables.row_slot[:rows] < 0].any())


def test_rows_over_the_size_of_a_temporary() -> None:
    rows = 2 * (MAX_ELEMENTS // 14336) + 3
    tables = make_tables(14336, "distinct", rows)
    x = make_x(14336, rows, torch.bfloat16)
    expected = act_and_mul_scaled(x, *tables, "silu")
    steer_gate_up(x, *tables, "silu")
    gate, up = x.chunk(2, 1)
    assert same(EAGER["silu"](gate) * up, expected)


def test_float16_would_lose_bits() -> None:
    """Why it is not among CARRYING_DTYPES: the quotient of a small value is subnormal."""
    value = torch.tensor(1.001 * 2.0**-12, dtype=torch.float16)
    assert value / CARRIER * CARRIER != value
    assert torch.float16 not in CARRYING_DTYPES


class Mlp(torch.nn.Module):
    """The use in a model: the output of a linear is written, then read."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_up = torch.nn.Linear(16, 66, bias=False)

    def forward(self, hidden: Tensor, *tables: Tensor) -> Tensor:
        x = self.gate_up(hidden)
        steer_gate_up(x, *tables, "silu")
        gate, up = x.chunk(2, 1)
        return torch.nn.functional.silu(gate) * up


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
    torch.library.opcheck(OP, (make_x(33, 9, dtype), *make_tables(33, "padded", 9), "silu"))
    written = [a.is_write for a in (arg.alias_info for arg in OP._schema.arguments) if a]
    assert written == [True]


@pytest.fixture(scope="module")
def quantizers() -> Iterator[list[Any]]:
    """vLLM's own, per tensor with a given scale, per token row, and per block of 128."""
    pytest.importorskip("vllm")
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.model_executor.layers.quantization.input_quant_fp8 import QuantFP8
    from vllm.model_executor.layers.quantization.utils.quant_utils import GroupShape

    with set_current_vllm_config(VllmConfig()):
        yield [
            (QuantFP8(static=True, group_shape=GroupShape.PER_TENSOR), torch.tensor(0.03)),
            (QuantFP8(static=False, group_shape=GroupShape.PER_TOKEN), None),
            (QuantFP8(static=False, group_shape=GroupShape(1, 128)), None),
        ]


@EACH_DTYPE
@pytest.mark.parametrize("routing", ROUTINGS)
def test_quantized_rows(quantizers: list[Any], dtype: torch.dtype, routing: str) -> None:
    """Values and scales are those of the quantized result of the unfused op, and those of rows
    that are not steered are vLLM's own."""
    from vllm.model_executor.layers.activation import SiluAndMul

    tables: Tables = make_tables(1000, routing, 20)
    x = make_x(1000, 20, dtype)
    stock = SiluAndMul.forward_native(x)
    unfused = act_and_mul_scaled(x, *tables, "silu")
    steer_gate_up(x, *tables, "silu")
    ahead = SiluAndMul.forward_native(x)
    plain = tables.row_slot[:20] < 0
    for quantize, scale in quantizers:
        (found, found_scale), (wanted, wanted_scale), (own, own_scale) = (
            quantize.forward_native(rows, scale) for rows in (ahead, unfused, stock)
        )
        assert torch.equal(found.view(torch.uint8), wanted.view(torch.uint8))
        assert torch.equal(found_scale, wanted_scale)
        assert torch.equal(found.view(torch.uint8)[plain], own.view(torch.uint8)[plain])
        assert scale is not None or torch.equal(found_scale[plain], own_scale[plain])
        assert bool(plain.all()) == torch.equal(found.view(torch.uint8), own.view(torch.uint8))


def compile_for(target: GPUTarget, dtype: str, activation: str) -> Any:
    kernel: Any = steer_gate_up_kernel
    signature = {
        "x_ptr": f"*{dtype}",
        "row_slot_ptr": "*i32",
        "slot_circuits_ptr": "*i32",
        "slot_multipliers_ptr": "*fp32",
        "masks_ptr": "*u8",
        "x_row_stride": "i32",
        "size": "i32",
        **dict.fromkeys(("K", "ACTIVATION", "CARRIER", "BLOCK"), "constexpr"),
    }
    aligned = ("x_ptr", "x_row_stride", "size")
    source = ASTSource(
        kernel,
        signature,
        constexprs={"K": 4, "ACTIVATION": activation, "CARRIER": CARRIER, "BLOCK": BLOCK},
        attrs={(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    return triton.compile(
        source, target=target, options={"num_warps": 1, "enable_fp_fusion": False}
    )


@pytest.mark.usefixtures("fresh_cache")
@pytest.mark.parametrize(
    ("dtype", "activation"), [("bf16", "silu"), ("bf16", "gelu"), ("fp32", "silu")]
)
@pytest.mark.parametrize("capability", [89, 90, 100])
def test_nvidia(tmp_path: Path, capability: int, dtype: str, activation: str) -> None:
    """No spills, and a warp waits for no other."""
    compiled = compile_for(GPUTarget("cuda", capability, 32), dtype, activation).asm
    cubin = tmp_path / "kernel.cubin"
    cubin.write_bytes(compiled["cubin"])
    usage = tool("cuobjdump", "-res-usage", str(cubin))
    assert re.findall(r"(STACK|LOCAL):(\d+)", usage) == [("STACK", "0"), ("LOCAL", "0")]
    (registers,) = re.findall(r"REG:(\d+)", usage)
    if (dtype, activation) == ("bf16", "silu"):
        assert int(registers) <= 65536 // (32 * 32), "32 programs an SM, as MAX_PROGRAMS says"
    assembly = tool("nvdisasm", "-c", str(cubin))
    assert not re.findall(r"\b(?:LDL|STL|BAR)\b", assembly)
    # One mask byte a slot, to find tiles that hold a member, and in those again or kept.
    assert len(re.findall(r"\bLDG\.E\.U8\b", assembly)) in (4, 8)


@pytest.mark.usefixtures("fresh_cache")
def test_amd() -> None:
    assembly = compile_for(GPUTarget("hip", "gfx942", 64), "bf16", "silu").asm["amdgcn"]
    for field in ("vgpr_spill_count", "sgpr_spill_count", "private_segment_fixed_size"):
        assert re.findall(rf"\.{field}:\s*(\d+)", assembly) == ["0"]
