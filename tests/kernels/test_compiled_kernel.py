# SPDX-License-Identifier: Apache-2.0
"""What the compilers make of the kernel, without a GPU: no spills, 128-bit accesses, rounding."""

import re
from pathlib import Path
from typing import Any

import pytest
import triton
from sass import compile_for, tool
from triton.backends.compiler import GPUTarget

from cna_kernels import EAGER
from cna_kernels.act_and_mul_scaled import act_and_mul_scaled_kernel

ACTIVATIONS = sorted(EAGER)
CIRCUITS = 4  # of a request


@pytest.fixture(autouse=True)
def fresh_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton.knobs.cache, "dir", str(tmp_path / "cache"))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(("dtype", "accesses"), [("bf16", 1), ("fp16", 1), ("fp32", 2)])
@pytest.mark.parametrize("capability", [80, 89, 90, 100])
def test_nvidia(
    tmp_path: Path, capability: int, dtype: str, accesses: int, activation: str
) -> None:
    compiled = compile_for(GPUTarget("cuda", capability, 32), dtype, activation, CIRCUITS).asm
    # The two instructions that do not round to nearest; the interpreter's tests allow for them.
    approximate = set(re.findall(r"\b\w+\.(?:approx|full)\b[.\w]*", compiled["ptx"]))
    assert approximate == {"ex2.approx.ftz.f32", "div.full.f32"}
    assert ".f64" not in compiled["ptx"]
    cubin = tmp_path / "kernel.cubin"
    cubin.write_bytes(compiled["cubin"])
    usage = tool("cuobjdump", "-res-usage", cubin)
    assert re.findall(r"(STACK|LOCAL):(\d+)", usage) == [("STACK", "0"), ("LOCAL", "0")]
    # Of 65,536 registers, 10 blocks of 128 threads at least; 16, all that a GPU holds, have 32.
    (registers,) = re.findall(r"REG:(\d+)", usage)
    assert int(registers) <= 48

    assembly = tool("nvdisasm", "-c", cubin)
    assert not re.findall(r"\bD(?:ADD|MUL|FMA|SETP)\b|F64", assembly)
    assert len(re.findall(r"\bLDG\.E\.128\b", assembly)) == 2 * accesses  # gate and up
    assert len(re.findall(r"\bSTG\.E\.128\b", assembly)) == accesses
    assert len(re.findall(r"\bLDG\.E\.U8\b", assembly)) == 4  # one mask byte a slot
    assert not re.findall(r"\b(?:LDL|STL)\b", assembly)
    assert not re.findall(r"\b(?:LDG|STG)\.E\.(?:U16|64)\b", assembly)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(("dtype", "accesses"), [("bf16", 1), ("fp16", 1), ("fp32", 2)])
def test_amd(dtype: str, accesses: int, activation: str) -> None:
    compiled = compile_for(GPUTarget("hip", "gfx942", 64), dtype, activation, CIRCUITS)
    assembly = compiled.asm["amdgcn"]
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
    assert fixed == {"row_slot_ptr", "slot_circuits_ptr", "slot_multipliers_ptr", "masks_ptr"}
