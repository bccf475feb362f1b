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

# Part of the project -> parts of it that it may import.
DATA = {"files", "steering", "text", "checkpoints"}
ALLOWED = {
    "cna_kernels": {"cna_kernels"},
    "files": set(),
    "steering": {"files", "steering"},
    "text": {"files", "steering", "text"},
    "checkpoints": {"files", "steering", "checkpoints", "root"},
    # Of serving, by process: what all share, then one room each, then what joins them to vLLM.
    "serving": {*DATA, "serving"},
    "front": {*DATA, "serving", "front"},
    "core": {*DATA, "serving", "core"},
    "worker": {*DATA, "serving", "worker", "cna_kernels"},
    "seams": {*DATA, "serving", "front", "core", "worker", "seams", "cna_kernels"},
    "http": {*DATA, "serving", "front", "seams", "http"},
    "control": {*DATA, "serving", "front", "seams", "control"},
    "doctor": {*DATA, "serving", "seams", "control", "doctor", "cna_kernels"},
    "plugin": {"serving", "seams"},
    "discovery": {*DATA, "discovery", "root", "seams"},
    "baselines": {*DATA, "baselines", "discovery", "root", "seams"},
    "batch": {*DATA, "batch", "seams"},
    "reading": {*DATA, "reading"},
    "evaluation": {
        *DATA,
        "baselines",
        "batch",
        "control",
        "discovery",
        "evaluation",
        "reading",
        "root",
        "seams",
        "serving",
    },
    "cli": {
        *DATA,
        "baselines",
        "batch",
        "cli",
        "control",
        "discovery",
        "doctor",
        "evaluation",
        "front",
        "reading",
        "root",
        "seams",
        "serving",
    },
    "root": {"steering"},
}
# Part, or module of it, -> distributions it may import besides the standard library.
EXTERNAL = {
    "cna_kernels": {"torch", "triton", "numpy"},
    "files": set(),
    "steering": set(),
    "steering.layout": {"numpy"},
    "steering.vectors": {"numpy", "safetensors"},
    "text": set(),
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
    if names[1] == "serving" and names[2:] and names[2] in ALLOWED:
        return names[2]
    return names[1]


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
    external = EXTERNAL.get(module.removeprefix("cna_vllm."), EXTERNAL.get(part))
    for name in imported(path):
        top = name.split(".")[0]
        if top in ("cna_vllm", "cna_kernels"):
            assert part_of(name) in ALLOWED[part], f"{module} must not import {name}"
        elif external is not None and top != "__future__":
            assert top in STDLIB | external, f"{module} must not import {name}"


def test_the_check_sees_imports_inside_functions() -> None:
    seen = set(imported(ROOT / "cna_vllm" / "steering" / "circuit.py"))
    assert {"cna_vllm.steering.circuit_file", "cna_vllm.files", "hashlib"} <= seen
    assert len(FILES) > 20


def test_no_two_parts_import_each_other() -> None:
    """ALLOWED has no circle: parts can be put in an order in which imports point back."""
    left = {part: others - {part} for part, others in ALLOWED.items()}
    while left:
        free = [part for part, others in left.items() if not others & left.keys()]
        assert free, f"a circle among {sorted(left)}"
        for part in free:
            del left[part]


def main() -> None:
    """Prints every part, its lines, and what it imports."""
    lines: dict[str, int] = {}
    arrows: dict[str, set[str]] = {}
    for path in FILES:
        part = part_of(module_of(path))
        lines[part] = lines.get(part, 0) + len(path.read_text("utf-8").splitlines())
        inside = (n for n in imported(path) if n.split(".")[0] in ("cna_vllm", "cna_kernels"))
        arrows.setdefault(part, set()).update(part_of(name) for name in inside)
    for part in ALLOWED:
        print(f"{part:12} {lines[part]:6} lines  -> {', '.join(sorted(arrows[part] - {part}))}")


if __name__ == "__main__":
    main()
