# SPDX-License-Identifier: Apache-2.0
"""Time of steered activation and FP8 quantization beside vLLM's own, and on a GPU its exactness.

    PYTHONPATH=kernels python benchmarks/steer_gate_up.py [--record]

"plain" is what vLLM runs: its fused op per tensor and per block of 128, and per token what its
compiler makes of both. "idle" and "steered" are ``steer_gate_up`` and then the same; "apart" is
``act_and_mul_scaled`` and then vLLM's quantization. On a CPU plain is eager torch, and nothing is
fused. Before anything is timed it is checked, and exit status 1 says that it does not hold: vLLM's
activation of what was steered has the bits of ``act_and_mul_scaled`` in every channel whose factor
is not 1, and quantized rows without an arm have vLLM's.

Predicted for an H100 at I = 14336 and 14 channels a row, from bytes (5 a channel in plain, 9 apart,
at 3 TB/s) and from instructions (47 a tile of 256 channels and warp, 330 more where it holds a
member): plain 6 us at 256 rows and 196 at 8,192, apart 12 and 352, idle 1 to 2 over plain and 5 at
8,192, steered 2 to 4 over plain at 256 rows.
"""

import argparse
import sys
from collections.abc import Callable
from typing import Any, Final

import torch
from act_and_mul_scaled import PLAIN, measure, plain_activation
from provenance import provenance, record
from torch import Tensor

from cna_kernels import act_and_mul_scaled, pack_mask, scale_reference, steer_gate_up

SCALE: Final = 0.03
Quantized = tuple[Tensor, Tensor]


def quantizers(device: torch.device) -> dict[str, tuple[Callable[..., Any], Callable[..., Any]]]:
    """By scheme: vLLM's activation with quantization, and its quantization alone, of one tensor."""
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.model_executor.layers.activation import SiluAndMul
    from vllm.model_executor.layers.quantization.input_quant_fp8 import QuantFP8
    from vllm.model_executor.layers.quantization.utils.quant_utils import GroupShape

    scale = torch.tensor(SCALE, device=device)
    shapes = {
        "tensor": (True, GroupShape.PER_TENSOR, (scale,)),
        "token": (False, GroupShape.PER_TOKEN, ()),
        "block": (False, GroupShape(1, 128), ()),
    }
    found = {}
    with set_current_vllm_config(VllmConfig()):
        for name, (static, shape, given) in shapes.items():
            quant = QuantFP8(static=static, group_shape=shape)
            alone = quant.forward_native if device.type == "cpu" else quant.forward_cuda

            def native(x: Tensor, quant: Any = quant, given: Any = given) -> Quantized:
                result: Quantized = quant.forward_native(SiluAndMul.forward_native(x), *given)
                return result

            def apart(a: Tensor, alone: Any = alone, given: Any = given) -> Quantized:
                result: Quantized = alone(a, *given)
                return result

            fused: Callable[..., Any] = native
            if device.type != "cpu":
                fused = torch.compile(native, dynamic=False)
                if name == "tensor":
                    fused = per_tensor(scale)
                elif name == "block" and hasattr(torch.ops._C, "silu_and_mul_per_block_quant"):
                    fused = per_block
            found[name] = fused, apart
    return found


def per_tensor(scale: Tensor) -> Callable[[Tensor], Quantized]:
    def fused(x: Tensor) -> Quantized:
        out = torch.empty((x.shape[0], x.shape[1] // 2), dtype=torch.float8_e4m3fn, device=x.device)
        torch.ops._C.silu_and_mul_quant(out, x, scale)
        return out, scale

    return fused


def per_block(x: Tensor) -> Quantized:
    rows, size = x.shape[0], x.shape[1] // 2
    out = torch.empty((rows, size), dtype=torch.float8_e4m3fn, device=x.device)
    scales = torch.empty((rows, size // 128), dtype=torch.float32, device=x.device)
    torch.ops._C.silu_and_mul_per_block_quant(out, x, scales, 128, None, False)
    return out, scales


def steered(x: Tensor, fused: Callable[..., Any], *operands: Any) -> Callable[[], Tensor]:
    def call() -> Tensor:
        steer_gate_up(x, *operands)
        out: Tensor = fused(x)[0]
        return out

    return call


def operands(rows: int, size: int, circuit: int, device: torch.device) -> tuple[Tensor, ...]:
    """A circuit and an arm a row. m = -1, since x is steered in place again and again."""
    generator = torch.Generator().manual_seed(0)
    chosen = [torch.randperm(size, generator=generator)[:circuit].tolist() for _ in range(rows)]
    circuits = torch.full((rows, 4), -1, dtype=torch.int32)
    circuits[:, 1] = torch.arange(rows)
    masks = torch.stack([pack_mask(channels, size) for channels in chosen])
    multipliers = torch.full((rows, 4), -1.0)
    return circuits.to(device), multipliers.to(device), masks.to(device)


def holds(x: Tensor, schemes: Any, row_slot: Tensor, *tables: Tensor) -> bool:
    """Whether the claims of this file's first lines do; x is left as it is."""
    _, activation = plain_activation(x.device)
    ahead, rows = x.clone(), slice(0, min(len(x), 64))
    steer_gate_up(ahead, row_slot, *tables, "silu")
    unfused = act_and_mul_scaled(x, row_slot, *tables, "silu")[rows]
    ones = torch.ones(unfused.shape, dtype=torch.float32, device=x.device)
    changed = scale_reference(ones, row_slot, *tables) != 1
    plain = row_slot < 0
    return torch.equal(activation(ahead)[rows][changed], unfused[changed]) and all(
        torch.equal(fused(ahead)[0][plain].view(torch.uint8), fused(x)[0][plain].view(torch.uint8))
        for fused, _ in schemes.values()
    )


@torch.inference_mode()
def main() -> int:
    parser = argparse.ArgumentParser(description="Time steering ahead of a fused quantization.")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 32, 256, 8192])
    parser.add_argument("--sizes", type=int, nargs="+", default=[14336])
    parser.add_argument("--circuit", type=int, default=14, help="channels of a circuit in a layer")
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--record", action="store_true")
    arguments = parser.parse_args()

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    schemes = quantizers(device)
    cells: list[dict[str, Any]] = []
    for size in arguments.sizes:
        for rows in arguments.rows:
            x = torch.randn(rows, 2 * size, device=device).bfloat16()
            tables = operands(min(rows, 256), size, arguments.circuit, device)
            arms = torch.arange(rows, dtype=torch.int32, device=device) % len(tables[0])
            idle = torch.full_like(arms, -1)
            if not holds(x, schemes, torch.where(arms % 3 == 1, idle, arms), *tables):
                print(f"I={size} T={rows}: the steered rows are not what they should be")
                return 1
            for scheme, (fused, apart) in schemes.items():
                variants: dict[str, Callable[[], Tensor]] = {
                    PLAIN: lambda fused=fused, x=x: fused(x)[0],  # type: ignore[misc]
                    "idle": steered(x.clone(), fused, idle, *tables, "silu"),
                    "steered": steered(x.clone(), fused, arms, *tables, "silu"),
                    "apart": lambda apart=apart, x=x, arms=arms, tables=tables: apart(  # type: ignore[misc]
                        act_and_mul_scaled(x, arms, *tables, "silu")
                    )[0],
                }
                for name, cell in measure(variants, arguments.rounds, device).items():
                    where = {"rows": rows, "size": size, "scheme": scheme, "variant": name}
                    cells.append({**where, **cell})
                    print(
                        f"I={size:<6} T={rows:<5} {scheme:7} {name:8} {cell['us']:9.1f} us "
                        f"[{cell['us_low']:.1f}, {cell['us_high']:.1f}]  x{cell['ratio']:.2f}"
                    )
    if arguments.record:
        about = {"circuit": arguments.circuit, "rounds": arguments.rounds, "cells": cells}
        record("steer_gate_up", {**provenance(), **about})
    return 0


if __name__ == "__main__":
    sys.exit(main())
