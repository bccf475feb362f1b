# SPDX-License-Identifier: Apache-2.0
"""Every name of vLLM's that the product imports, read from the syntax trees, and whether a copy of
vLLM's Python has it: without importing either."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SEAMS = ROOT / "cna_vllm" / "serving" / "seams"


INNER = frozenset(
    {
        "cache_config",
        "compilation_config",
        "engine_core",
        "hf_config",
        "hf_text_config",
        "input_batch",
        "input_processor",
        "kv_cache_config",
        "kv_cache_manager",
        "llm_engine",
        "lora_requests",
        "model_config",
        "model_executor",
        "model_runner",
        "model_state",
        "openai_serving_models",
        "output_processor",
        "parallel_config",
        "renderer",
        "sampling_params",
        "scheduled_new_reqs",
        "scheduler_config",
        "speculative_config",
        "structured_outputs_config",
        "vllm_config",
    }
)
"""Attributes of vLLM's objects that it documents nowhere."""


@dataclass(frozen=True, order=True)
class VllmName:
    """One imported name: `from module import name`, or `import module` where name is ""."""

    module: str
    name: str  # "" for a whole module
    file: Path
    line: int

    @property
    def dotted(self) -> str:
        return self.module if not self.name else f"{self.module}.{self.name}"

    @property
    def where(self) -> str:
        file = self.file.relative_to(ROOT) if ROOT in self.file.parents else self.file
        return f"{file}:{self.line}"

    @property
    def in_seams(self) -> bool:
        return SEAMS in self.file.parents


def product_files() -> list[Path]:
    return sorted((ROOT / "cna_vllm").rglob("*.py"))


def vllm_names(files: Iterable[Path]) -> list[VllmName]:
    """Imports of vLLM in ``files``, those inside functions and under TYPE_CHECKING too."""
    return sorted(name for file in files for name in _names(file))


def _names(file: Path) -> Iterator[VllmName]:
    for node in ast.walk(ast.parse(file.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "vllm":
                    yield VllmName(alias.name, "", file, node.lineno)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "vllm":
            for alias in node.names:
                yield VllmName(str(node.module), alias.name, file, node.lineno)


def documented(folder: Path) -> frozenset[str]:
    """What vLLM's package in ``folder`` exports."""
    tree = ast.parse((folder / "vllm" / "__init__.py").read_text("utf-8"))
    exported = next(
        node.value
        for node in tree.body
        if isinstance(node, ast.Assign)
        and any(isinstance(t, ast.Name) and t.id == "__all__" for t in node.targets)
    )
    return frozenset(ast.literal_eval(exported))


def outside_the_room(file: Path, folder: Path) -> list[str]:
    """What a file that is no seam takes of vLLM beyond what it documents, a line each.

    Imports, also those inside functions; names of its modules in strings, as they are given to
    ``import_module``; and attributes under which its objects hold their inner parts.
    """
    found = [
        f"{name.where}: {name.dotted}"
        for name in vllm_names([file])
        if name.module != "vllm" or (name.name and name.name not in documented(folder))
    ]
    for node in ast.walk(ast.parse(file.read_text("utf-8"))):
        if isinstance(node, ast.Attribute) and node.attr in INNER:
            found.append(f"{file.name}:{node.lineno}: .{node.attr}")
        text = node.value if isinstance(node, ast.Constant) else None
        dotted = isinstance(text, str) and re.fullmatch(r"vllm(\.\w+)+", text)
        if dotted and _module_file(folder, str(text)):
            found.append(f"{file.name}:{node.lineno}: {text!r}")
    return found


def has(folder: Path, found: VllmName) -> bool:
    """Whether vLLM's Python in ``folder`` has the module and the name."""
    file = _module_file(folder, found.module)
    if file is None:
        return False
    if not found.name or _module_file(folder, found.dotted) is not None:
        return True
    bound, lazy = _bound(file)
    return found.name in bound or found.name in lazy


def _module_file(folder: Path, module: str) -> Path | None:
    place = folder.joinpath(*module.split("."))
    candidates = (place / "__init__.py", place.with_suffix(".py"))
    return next((c for c in candidates if c.is_file()), None)


@cache
def _bound(file: Path) -> tuple[frozenset[str], frozenset[str]]:
    """Names bound at the top of a module, in its branches too; and, where it makes names on demand
    by ``__getattr__``, all strings that it holds."""
    tree = ast.parse(file.read_text("utf-8"))
    bound: set[str] = set()
    todo: list[ast.stmt] = list(tree.body)
    for node in todo:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            bound.add(node.name)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            bound.update((a.asname or a.name).split(".")[0] for a in node.names)
        elif isinstance(node, ast.Assign):
            bound.update(n.id for t in node.targets for n in ast.walk(t) if isinstance(n, ast.Name))
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            bound.add(node.target.id)
        elif isinstance(node, ast.If | ast.Try):
            todo += [*node.body, *node.orelse]
            if isinstance(node, ast.Try):
                todo += [*node.finalbody, *(s for h in node.handlers for s in h.body)]
    lazy: set[str] = set()
    if "__getattr__" in bound:
        lazy = {
            n.value
            for n in ast.walk(tree)
            if isinstance(n, ast.Constant) and isinstance(n.value, str)
        }
    return frozenset(bound), frozenset(lazy)
