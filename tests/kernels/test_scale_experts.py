# SPDX-License-Identifier: Apache-2.0
"""``scale_experts``: the rule, the CPU path, the interpreted kernel, and compiled kernels."""

import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
from sass import tool
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from cna_kernels import DTYPES, scale_experts, scale_experts_reference
from cna_kernels.scale_experts import BLOCK, NUM_WARPS, scale_experts_kernel
from tests.kernels import expert_interpreter
from tests.kernels.cases import bits, same
from tests.kernels.expert_cases import make_experts
from tests.kernels.interpreted import run_interpreted

OP = torch.ops.cna.scale_experts.default
EACH_DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@EACH_DTYPE
def test_the_rule(dtype: torch.dtype) -> None:
    """Two tokens, two choices: the first token's copies are scaled, each by its expert's list."""
    activation = torch.tensor([[1, 2, 3], [-4, 5, float("inf")], [7, 8, 9], [1, 1, 1]]).to(dtype)
    before = activation.clone()
    scale_experts(
        activation,
        topk_ids=torch.tensor([[1, 0], [1, 0]]),
        row_slot=torch.tensor([0, -1], dtype=torch.int32),
        slot_circuits=torch.tensor([[0, 1]], dtype=torch.int32),
        slot_multipliers=torch.tensor([[0.3, 0.0]]),
        offsets=torch.tensor([[0, 1, 3], [0, 2, 2]], dtype=torch.int32),
        neurons=torch.tensor([[0, 1, 2], [1, 2, -1]], dtype=torch.int32),
    )
    third = torch.tensor(0.3)
    expected = before.clone()
    expected[0, 1:] = (third * before[0, 1:].float()).to(dtype)
    expected[1] = torch.stack([(third * before[1, 0].float()).to(dtype), *torch.zeros(2).to(dtype)])
    assert torch.equal(bits(activation), bits(expected))


@EACH_DTYPE
@pytest.mark.parametrize("ids", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("width", [1, 33, 130])
def test_equals_reference(dtype: torch.dtype, ids: torch.dtype, width: int) -> None:
    for seed, tokens in enumerate((0, 1, 20)):
        case = make_experts(tokens, 3, 5, width, dtype, ids, seed)
        expected = case.activation.clone()
        scale_experts_reference(expected, *case[1:])
        plain = [r for r in range(tokens * 3) if case.row_slot[r // 3] in (-1, 0)]
        kept = case.activation[plain].clone()
        scale_experts(*case)
        assert same(case.activation, expected)
        assert torch.equal(bits(case.activation[plain]), bits(kept))


def test_more_than_is_resolved_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["cna_kernels.scale_experts"], "MAX_ENTRIES", 40)
    case = make_experts(30, 2, 4, 33, torch.float32)
    expected = case.activation.clone()
    scale_experts_reference(expected, *case[1:])
    scale_experts(*case)
    assert same(case.activation, expected)


def test_interpreted_kernel() -> None:
    """The Triton kernel, in a process whose kernels are interpreted, is the reference."""
    printed = run_interpreted(expert_interpreter.__file__)
    assert printed.strip() == f"{len(expert_interpreter.CASES)} equal"


@EACH_DTYPE
def test_opcheck(dtype: torch.dtype) -> None:
    torch.library.opcheck(OP, tuple(make_experts(4, 2, 3, 9, dtype)))
    written = [a.is_write for a in (arg.alias_info for arg in OP._schema.arguments) if a]
    assert written == [True]


def compile_for(target: GPUTarget, dtype: str, circuits: int) -> Any:
    kernel: Any = scale_experts_kernel
    signature = {
        "activation_ptr": f"*{dtype}",
        "topk_ids_ptr": "*i32",
        "row_slot_ptr": "*i32",
        "slot_circuits_ptr": "*i32",
        "slot_multipliers_ptr": "*fp32",
        "offsets_ptr": "*i32",
        "neurons_ptr": "*i32",
        "size": "i32",
        "topk": "i32",
        "experts": "i32",
        "capacity": "i32",
        "K": "constexpr",
        "BLOCK": "constexpr",
    }
    source = ASTSource(
        kernel,
        signature,
        constexprs={"K": circuits, "BLOCK": BLOCK},
        attrs={(kernel.arg_names.index("activation_ptr"),): [["tt.divisibility", 16]]},
    )
    options = {"num_warps": NUM_WARPS, "enable_fp_fusion": False}
    return triton.compile(source, target=target, options=options)


@pytest.fixture
def fresh_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton.knobs.cache, "dir", str(tmp_path / "cache"))


@pytest.mark.usefixtures("fresh_cache")
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("circuits", [1, 4])
def test_nvidia(tmp_path: Path, capability: int, dtype: str, circuits: int) -> None:
    """No spills, and registers for as many blocks of one warp as a multiprocessor holds: 32."""
    cubin = tmp_path / "kernel.cubin"
    compiled = compile_for(GPUTarget("cuda", capability, 32), dtype, circuits)
    cubin.write_bytes(compiled.asm["cubin"])
    usage = tool("cuobjdump", "-res-usage", str(cubin))
    assert re.findall(r"(STACK|LOCAL):(\d+)", usage) == [("STACK", "0"), ("LOCAL", "0")]
    (registers,) = re.findall(r"REG:(\d+)", usage)
    assert int(registers) <= 64
    assert not re.findall(r"\b(?:LDL|STL|FFMA)\b", tool("nvdisasm", "-c", str(cubin)))
