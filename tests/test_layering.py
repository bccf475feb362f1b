# SPDX-License-Identifier: Apache-2.0
"""Imports point one way, also those inside functions: read from the syntax trees."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
STDLIB = set(sys.stdlib_module_names)
FILES = sorted([*ROOT.glob("cna_vllm/**/*.py"), *ROOT.glob("kernels/cna_kernels/**/*.py")])

# Part of the project -> parts of it that it may import. The base modules are the shared ground.
BASE = {
    "arms",
    "checkpoint",
    "circuit",
    "circuit_file",
    "circuit_summary",
    "files",
    "misplaced",
    "models",
    "packed",
    "prompts",
    "rendering",
    "request",
    "request_fields",
    "vectors",
}
ALLOWED = {
    "cna_kernels": {"cna_kernels"},
    "base": {"base"},
    "serving": {"base", "serving", "seams", "cna_kernels"},
    "seams": {"base", "serving", "seams", "cna_kernels"},
    "discovery": {"base", "discovery", "root", "seams"},
    "baselines": {"base", "baselines", "discovery", "root", "seams"},
    "batch": {"base", "batch", "seams"},
    "evaluation": {
        "base",
        "baselines",
        "batch",
        "discovery",
        "evaluation",
        "reading",
        "root",
        "seams",
        "serving",
    },
    "reading": {"base", "reading"},
    "bake": {"base", "root"},
    "cli": {
        "base",
        "serving",
        "discovery",
        "baselines",
        "batch",
        "evaluation",
        "reading",
        "bake",
        "cli",
        "root",
        "seams",
    },
    "root": {"base"},
}
# Part, or module of the base, -> distributions it may import besides the standard library.
EXTERNAL = {
    "cna_kernels": {"torch", "triton", "numpy"},
    "arms": set(),
    "circuit": set(),
    "circuit_file": set(),
    "circuit_summary": set(),
    "files": set(),
    "misplaced": set(),
    "packed": set(),
    "request": set(),
    "request_fields": set(),
    "prompts": set(),
    "rendering": set(),
    "vectors": {"numpy", "safetensors"},
    "root": set(),
}


def part_of(module: str) -> str:
    """The part of the project that a dotted module belongs to."""
    names = module.split(".")
    if names[0] == "cna_kernels":
        return "cna_kernels"
    if len(names) == 1:
        return "root"
    if names[1] == "__main__":
        return "cli"
    if names[1:3] == ["serving", "seams"]:
        return "seams"
    return "base" if names[1] in BASE else names[1]


def module_of(path: Path) -> str:
    names = list(path.relative_to(ROOT).with_suffix("").parts)
    if names[0] == "kernels":
        names = names[1:]
    return ".".join(names[:-1] if names[-1] == "__init__" else names)


def imported(path: Path) -> Iterator[str]:
    """Every absolute module that a file imports; `from cna_vllm import x` counts x if a module."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            module = str(node.module)
            submodules = [a.name for a in node.names if is_module(f"{module}.{a.name}")]
            yield from (f"{module}.{name}" for name in submodules)
            if len(submodules) < len(node.names):
                yield module


def is_module(name: str) -> bool:
    place = ROOT.joinpath(*name.split("."))
    return place.is_dir() or place.with_suffix(".py").is_file()


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_imports_point_one_way(path: Path) -> None:
    module = module_of(path)
    part = part_of(module)
    assert part in ALLOWED, f"{part} is not a part of the architecture; add it to this test"
    external = EXTERNAL.get(module.split(".")[1] if part == "base" else part)
    for name in imported(path):
        top = name.split(".")[0]
        if top in ("cna_vllm", "cna_kernels"):
            assert part_of(name) in ALLOWED[part], f"{module} must not import {name}"
        elif external is not None and top != "__future__":
            assert top in STDLIB | external, f"{module} must not import {name}"


def test_the_check_sees_imports_inside_functions() -> None:
    seen = set(imported(ROOT / "cna_vllm" / "circuit.py"))
    assert {"cna_vllm.circuit_file", "cna_vllm.files", "hashlib"} <= seen
    assert len(FILES) > 20
