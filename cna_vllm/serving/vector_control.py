# SPDX-License-Identifier: Apache-2.0
"""Run-time control of an offline ``LLM``: load and inspect steering vectors between requests."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from cna_vllm.serving.config import CnaConfigError
from cna_vllm.serving.seams.front_end import admission_of
from cna_vllm.serving.table import CircuitTableError
from cna_vllm.serving.vector_registry import VectorRegistry
from cna_vllm.vectors import VectorSet

if TYPE_CHECKING:
    from vllm import LLM


def load_vectors(llm: LLM, name: str, vectors: VectorSet | str | Path) -> VectorSet:
    """Makes ``name`` stand for a set of vectors (or a file of one) on every worker.

    An existing name is replaced: running requests finish on what they started with, and no
    prefix-cache block of the old content can be hit. The new content needs a row of its own
    (``max_vectors``) before the old one's is given back. Raises VectorError when the vectors are
    malformed or of another model, before any worker sees them; CnaConfigError when the engine was
    started without ``cna.max_vectors``, or the name is a circuit's.
    """
    registry = _registry(llm)
    admission_of(llm).check_free(name, "vector")
    loaded = vectors if isinstance(vectors, VectorSet) else VectorSet.load(vectors)
    registry.check(loaded)
    previous = registry.vectors().get(name)
    for report in llm.collective_rpc("cna_load_vectors", args=(loaded.to_bytes(),)):
        if report["refused"]:
            raise CircuitTableError(report["refused"])
    registry.register(name, loaded)
    if previous is not None and previous.digest not in _digests(registry):
        llm.collective_rpc("cna_unload_vectors", args=(previous.digest,))
    return loaded


def list_vectors(llm: LLM) -> dict[str, VectorSet]:
    """Name -> set of vectors, as requests would resolve them now."""
    return _registry(llm).vectors()


def _registry(llm: LLM) -> VectorRegistry:
    registry = admission_of(llm).vectors
    if registry is None:
        raise CnaConfigError(
            "this LLM was started without vectors; pass additional_config={'cna': "
            "{'max_vectors': 8}}"
        )
    return registry


def _digests(registry: VectorRegistry) -> set[str]:
    return {vectors.digest for vectors in registry.vectors().values()}
