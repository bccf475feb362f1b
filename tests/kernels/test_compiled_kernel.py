# SPDX-License-Identifier: Apache-2.0
"""What the compilers make of the kernel, without a GPU: no spills, 128-bit accesses, rounding."""

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import triton
from triton.backends import nvidia
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from cna_kernels import EAGER
from cna_kernels.act_and_mul_scaled import BLOCK, act_and_mul_scaled_kernel

# What a launch specializes on: I and the row stride are multiples of 16 in every model, and
# torch allocates x and out at multiples of 16 bytes. The tables claim no alignment.
ALIGNED = ("out_ptr", "x_ptr", "x_row_stride", "size")
THREADS = 128
ACTIVATIONS = sorted(EAGER)


@pytest.fixture(autouse=True)
def fresh_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton.knobs.cache, "dir", str(tmp_path / "cache"))


def compile_for(target: GPUTarget, dtype: str, activation: str) -> Any:
    kernel: Any = act_and_mul_scaled_kernel
    signature = {
        "out_ptr": f"*{dtype}",
        "x_ptr": f"*{dtype}",
        "row_arm_ptr": "*i32",
        "arm_circuits_ptr": "*i32",
        "arm_multipliers_ptr": "*fp32",
        "masks_ptr": "*u8",
        "x_row_stride": "i32",
        "size": "i32",
        "K": "constexpr",
        "ACTIVATION": "constexpr",
        "BLOCK": "constexpr",
    }
    source = ASTSource(
        kernel,
        signature,
        constexprs={"K": 4, "ACTIVATION": activation, "BLOCK": BLOCK},
        attrs={(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in ALIGNED},
    )
    options = {"num_warps": THREADS // target.warp_size, "enable_fp_fusion": False}
    return triton.compile(source, target=target, options=options)


def disassemble(tool: str, *arguments: str) -> str:
    binary = Path(nvidia.__path__[0]) / "bin" / tool
    return subprocess.run([binary, *arguments], capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(("dtype", "accesses"), [("bf16", 1), ("fp16", 1), ("fp32", 2)])
@pytest.mark.parametrize("capability", [80, 90, 100])
def test_nvidia(
    tmp_path: Path, capability: int, dtype: str, accesses: int, activation: str
) -> None:
    compiled = compile_for(GPUTarget("cuda", capability, 32), dtype, activation).asm
    # The one instruction that does not round to nearest; the interpreter's tests allow for it.
    approximate = set(re.findall(r"\b\w+\.(?:approx|full)\b[.\w]*", compiled["ptx"]))
    assert approximate == ({"ex2.approx.ftz.f32"} if dtype == "bf16" else set())
    cubin = tmp_path / "kernel.cubin"
    cubin.write_bytes(compiled["cubin"])
    usage = disassemble("cuobjdump", "-res-usage", str(cubin))
    assert re.findall(r"(STACK|LOCAL):(\d+)", usage) == [("STACK", "0"), ("LOCAL", "0")]
    registers = re.findall(r"REG:(\d+)", usage)
    # Of 65,536 registers: 8 blocks of 128 threads, 5, and 4 where float64 enters.
    narrow = {"bf16": 64, "fp16": 96 if activation == "silu" else 128, "fp32": 128}
    assert int(registers[0]) <= narrow[dtype]

    assembly = disassemble("nvdisasm", "-c", str(cubin))
    assert len(re.findall(r"\bLDG\.E\.128\b", assembly)) == 2 * accesses  # gate and up
    assert len(re.findall(r"\bSTG\.E\.128\b", assembly)) == accesses
    assert len(re.findall(r"\bLDG\.E\.U8\b", assembly)) == 4  # one mask byte a slot
    assert not re.findall(r"\b(?:LDL|STL)\b", assembly)
    assert not re.findall(r"\b(?:LDG|STG)\.E\.(?:U16|64)\b", assembly)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(("dtype", "accesses"), [("bf16", 1), ("fp16", 1), ("fp32", 2)])
def test_amd(dtype: str, accesses: int, activation: str) -> None:
    assembly = compile_for(GPUTarget("hip", "gfx942", 64), dtype, activation).asm["amdgcn"]
    for field in ("vgpr_spill_count", "sgpr_spill_count", "private_segment_fixed_size"):
        assert re.findall(rf"\.{field}:\s*(\d+)", assembly) == ["0"]
    wide = re.findall(r"\b(?:global|buffer)_(load|store)_dwordx4\b", assembly)
    assert wide.count("load") == 2 * accesses
    assert wide.count("store") == accesses
    assert len(re.findall(r"\b(?:global|buffer)_load_ubyte\b", assembly)) == 4


def test_table_alignment_selects_no_variant() -> None:
    kernel: Any = act_and_mul_scaled_kernel
    fixed = {
        parameter.name for parameter in kernel.params if parameter.do_not_specialize_on_alignment
    }
    assert fixed == {"row_arm_ptr", "arm_circuits_ptr", "arm_multipliers_ptr", "masks_ptr"}
