# SPDX-License-Identifier: Apache-2.0
"""Metrics of answers. `load_metric` finds one by its specification, plugins' ones included."""

from cna_vllm.evaluation.metrics.base import (
    BENIGN,
    HARMFUL,
    Answer,
    Better,
    EngineContext,
    EngineMetric,
    Kind,
    Metric,
    MetricError,
    Score,
    score_answers,
)
from cna_vllm.evaluation.metrics.registry import known_metrics, load_metric

__all__ = [
    "BENIGN",
    "HARMFUL",
    "Answer",
    "Better",
    "EngineContext",
    "EngineMetric",
    "Kind",
    "Metric",
    "MetricError",
    "Score",
    "known_metrics",
    "load_metric",
    "score_answers",
]
