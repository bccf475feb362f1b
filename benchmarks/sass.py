# SPDX-License-Identifier: Apache-2.0
"""Instructions of the steered activation's kernel, from its cubin and without a GPU, beside vLLM's.

    python benchmarks/sass.py [--vllm-so vllm/_C_stable_libtorch.abi3.so] [--record]

Counted is what one thread executes for its 8 elements, of a row that is not steered, and of rows
with one circuit and with four, in the kernel as it is launched by default; of vLLM's vectorized
kernel one pass of its loop, on the fast side of every division. `--vllm-so` is vLLM's compiled
library, from its wheel for CUDA.

What follows for a GPU is a prediction, to be measured by `make bench-gpu`. In 16 bits the op moves
6 bytes an element, of which an H100 copies 500 a nanosecond (3.0 TB/s); its 528 schedulers issue
some 920 instructions of a warp in that time, which is 59 an element, and 7 special ones. So SiLU
and the tanh GELU, at 20 to 45 and 2, are bound by memory, steered or not; the exact GELU, at 60, is
at the edge. What 4% at 8,192 rows of the first H100 run came from, the counts do not say.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import triton
from provenance import provenance, record
from triton.backends import nvidia
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from cna_kernels import EAGER
from cna_kernels.act_and_mul_scaled import BLOCK, NUM_WARPS, act_and_mul_scaled_kernel

THREADS = 128
ELEMENTS = BLOCK // THREADS  # of a thread
SLOTS = 4  # circuits that a request may combine, by default
CAPABILITIES = (80, 89, 90, 100)
DTYPES = {"bf16": ("c108BFloat16E", "__nv_bfloat162"), "fp16": ("c104HalfE", "__half2")}
# What a launch specializes on: I and the row stride are multiples of 16 in every model, and
# torch allocates x and out at multiples of 16 bytes. The tables claim no alignment.
ALIGNED = ("out_ptr", "x_ptr", "x_row_stride", "size")


def compile_for(target: GPUTarget, dtype: str, activation: str, circuits: int) -> Any:
    """The kernel for a device, as it is launched there."""
    kernel: Any = act_and_mul_scaled_kernel
    types = {"out_ptr": f"*{dtype}", "x_ptr": f"*{dtype}", "masks_ptr": "*u8"}
    types |= dict.fromkeys(("row_slot_ptr", "slot_circuits_ptr"), "*i32")
    types |= {"slot_multipliers_ptr": "*fp32", "x_row_stride": "i32", "size": "i32"}
    source = ASTSource(
        kernel,
        {name: types.get(name, "constexpr") for name in kernel.arg_names},
        constexprs={"K": circuits, "ACTIVATION": activation, "BLOCK": BLOCK},
        attrs={(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in ALIGNED},
    )
    warps = NUM_WARPS if target.backend == "cuda" else THREADS // target.warp_size
    options = {"num_warps": warps, "enable_fp_fusion": False}
    return triton.compile(source, target=target, options=options)


def tool(name: str, *arguments: str | Path, folder: Path | None = None) -> str:
    """Output of one of the programs that come with Triton."""
    program = Path(nvidia.__path__[0]) / "bin" / name
    command = [str(program), *map(str, arguments)]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True).stdout


def instructions(assembly: str) -> list[tuple[str, str]]:
    """(address or label of what precedes it, instruction) in order; of nvdisasm or cuobjdump."""
    found: list[tuple[str, str]] = []
    label = ""
    for line in assembly.splitlines():
        if mark := re.match(r"^\s*(\.L_x_\d+):", line):
            label = mark[1]
        elif code := re.match(r"^\s+/\*([0-9a-f]{4,})\*/\s+(.*?);", line):
            found.append((label or f"0x{int(code[1], 16):x}", code[2].strip()))
            label = ""
    return found


def executed(code: list[tuple[str, str]], stays: Sequence[bool] | None = None) -> list[str]:
    """What a thread executes. No exit on a predicate is taken, and the way back of a loop ends its
    only pass.

    stays: of each branch on a predicate that comes, whether it is not taken; None: all are.
    """
    place = {label: at for at, (label, _) in enumerate(code)}
    at, met, done = 0, 0, list[str]()
    while at < len(code):
        text = code[at][1]
        done.append(text)
        if re.match(r"EXIT\b", text):
            break
        if jump := re.search(r"\bBRA\b.*?(\.L_x_\d+|0x[0-9a-f]+)", text):
            target = place[jump[1]]
            always = not re.match(r"@|BRA\.U\b", text)
            if always and target <= at:
                break
            met += not always
            if always or (target > at and (stays is None or not stays[met - 1])):
                at = target
                continue
        at += 1
    if stays is not None and met != len(stays):
        raise ValueError(f"{met} branches, not {len(stays)}: the kernel was compiled otherwise")
    return done


def counts(path: list[str]) -> dict[str, Any]:
    """Figures of what is executed for ELEMENTS elements."""
    wide = [text for text in path if re.search(r"\bLDG\.E\.128\b", text)]
    return {
        "instructions_per_element": round(len(path) / ELEMENTS, 2),
        "special_per_element": round(sum("MUFU" in text for text in path) / ELEMENTS, 2),
        "loads_128": len(wide),
        "stores_128": sum(bool(re.search(r"\bSTG\.E\.128\b", text)) for text in path),
        "float64": sum(bool(re.search(r"\bD(ADD|MUL|FMA|SETP)\b|F64", t)) for t in path),
    }


def usage(cubin: Path, name: str = "") -> dict[str, int]:
    """Registers, and bytes that are spilled, of the kernel with ``name`` in it."""
    text = tool("cuobjdump", "-res-usage", cubin)
    (line,) = re.findall(rf"Function {name or '.*'}[^\n]*:\s*\n\s*(.*)", text)[:1]
    found = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", line)}
    return {"registers": found["REG"], "spilled_bytes": found["STACK"] + found["LOCAL"]}


def ours(folder: Path, capability: int, dtype: str, activation: str) -> dict[str, Any]:
    """Figures of the kernel for rows of no, one and SLOTS circuits."""
    compiled = compile_for(GPUTarget("cuda", capability, 32), dtype, activation, SLOTS)
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    code = instructions(tool("nvdisasm", "-c", cubin))
    paths = {"idle": executed(code, [False, False])}
    for name, circuits in {"one": 1, "all": SLOTS}.items():
        slots = [slot < circuits for slot in range(SLOTS)]
        paths[name] = executed(code, [True, *slots, True])
    return {**usage(cubin), **{name: counts(path) for name, path in paths.items()}}


def vllms(library: Path, folder: Path, capability: int, dtype: str) -> dict[str, Any] | None:
    """Figures of vLLM's `silu_and_mul` with 128-bit accesses; None where it has none."""
    scalar, packed = DTYPES[dtype]
    elves = folder / f"sm{capability}"
    elves.mkdir(exist_ok=True)
    if not any(elves.iterdir()):
        tool("cuobjdump", "-arch", f"sm_{capability}", "-xelf", "all", library, folder=elves)
    # Template arguments: the activation first, vectors, no clamp, not 256 bits.
    name = re.compile(
        rf"_ZN4vllm18act_and_mul_kernelIN3{scalar}\d+{packed}XadL_ZNS_11silu_kernel"
        rf"\w*?Lb1ELb1ELb0ELb0E\w*"
    )
    for elf in sorted(elves.iterdir()):
        if found := name.search(elf.read_bytes().decode("latin-1")):
            code = instructions(tool("cuobjdump", "-sass", "-fun", found[0], elf))
            return {**usage(elf, found[0]), **counts(executed(code))}
    return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vllm-so", type=Path)
    parser.add_argument("--record", action="store_true")
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for capability in CAPABILITIES:
            for dtype in (*DTYPES, "fp32"):
                for activation in sorted(EAGER):
                    row: dict[str, Any] = {"sm": capability, "dtype": dtype, "act": activation}
                    row |= ours(folder, capability, dtype, activation)
                    if options.vllm_so is not None and dtype in DTYPES and activation == "silu":
                        library = options.vllm_so.resolve()
                        row["vllm"] = vllms(library, folder, capability, dtype)
                    rows.append(row)
                    print(shown(row), flush=True)
    if options.record:
        record("sass", {"benchmark": "sass", "rows": rows, **provenance()})


def shown(row: dict[str, Any]) -> str:
    """One line."""
    text = (
        f"sm_{row['sm']:<4} {row['dtype']} {row['act']:10} registers {row['registers']:3}  "
        "instructions an element: "
        + ", ".join(f"{n} {row[n]['instructions_per_element']:6}" for n in ("idle", "one", "all"))
    )
    if row.get("vllm"):
        text += f", vLLM {row['vllm']['instructions_per_element']:6}"
    return text


if __name__ == "__main__":
    main()
