# SPDX-License-Identifier: Apache-2.0
"""Circuits are loaded on all engines or none: what cannot be kept so is refused at start."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from cna_vllm.serving.config import CnaConfig, CnaConfigError
from cna_vllm.serving.seams.engines import refuse_partial_control

LOADING = CnaConfig(circuit_dir="/circuits")


def parallel(*, local: bool = False, elastic: bool = False) -> SimpleNamespace:
    return SimpleNamespace(local_engines_only=local, enable_elastic_ep=elastic)


def test_a_front_end_that_reaches_all_engines_may_load() -> None:
    refuse_partial_control(LOADING, parallel())
    refuse_partial_control(CnaConfig(), parallel(local=True))  # nothing is loaded while serving


def test_a_front_end_that_reaches_some_engines_may_not() -> None:
    with pytest.raises(CnaConfigError, match=r"circuit_dir.*--data-parallel-hybrid-lb"):
        refuse_partial_control(LOADING, parallel(local=True))
    for config in (LOADING, CnaConfig()):
        with pytest.raises(CnaConfigError, match=r"engines that elastic .*--enable-elastic-ep"):
            refuse_partial_control(config, parallel(elastic=True))
