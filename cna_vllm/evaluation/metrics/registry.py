# SPDX-License-Identifier: Apache-2.0
"""From a metric's specification, `name` or `name:key=value,key=value`, to the metric."""

from __future__ import annotations

import inspect
import re
import typing
from collections.abc import Callable
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from cna_vllm.evaluation.metrics.base import EngineMetric, Metric, MetricError

GROUP = "cna_vllm.metrics"

# A comma ends a value only before `key=`, and not after a backslash.
_NEXT_OPTION = re.compile(r"(?<!\\),(?=[A-Za-z_][A-Za-z0-9_]*=)")
_NUMBERS = {int: "a whole number", float: "a number"}


def known_metrics() -> tuple[str, ...]:
    """Names of all installed metrics, sorted."""
    return tuple(sorted({point.name for point in entry_points(group=GROUP)}))


def load_metric(spec: str) -> Metric | EngineMetric:
    """The metric that `spec` describes.

    A comma is part of a value unless `key=` follows it; `\\,` keeps it even there, and the
    backslash stays in the value (in a regular expression it changes nothing).

    Raises:
        MetricError: unknown metric, option or value, or a package is missing: one line that names
            it, what is known, and the fix.
    """
    name, colon, rest = spec.partition(":")
    name = name.strip()
    given = _parse_options(name, rest) if colon else {}
    point = _find(name)
    try:
        factory: Callable[..., Any] = point.load()
    except (ImportError, AttributeError) as error:
        raise MetricError(
            f"metric {name}: its entry point {point.value} cannot be loaded ({error}); "
            "reinstall the package that brings it"
        ) from error
    metric = factory(**_convert(name, factory, given))
    if not isinstance(metric, Metric | EngineMetric):
        raise MetricError(f"metric {name}: {point.value} has neither score nor score_with")
    return metric


def _find(name: str) -> EntryPoint:
    points = [point for point in entry_points(group=GROUP) if point.name == name]
    if not points:
        known = ", ".join(known_metrics()) or "none: reinstall cna-vllm"
        raise MetricError(f"unknown metric {name!r}; use one of: {known}")
    if len({point.value for point in points}) > 1:
        found = ", ".join(sorted({point.value for point in points}))
        raise MetricError(f"metric {name}: brought by several packages ({found}); keep one")
    return points[0]


def _parse_options(name: str, text: str) -> dict[str, str]:
    options: dict[str, str] = {}
    for part in _NEXT_OPTION.split(text):
        key, equals, value = part.partition("=")
        key = key.strip()
        if not equals or not key or not value:
            raise MetricError(f"metric {name}: {part!r} is not an option; write {name}:key=value")
        if key in options:
            raise MetricError(f"metric {name}: option {key} is given twice; keep one")
        options[key] = value
    return options


def _convert(name: str, factory: Callable[..., Any], given: dict[str, str]) -> dict[str, Any]:
    parameters = inspect.signature(factory).parameters
    hints = typing.get_type_hints(factory.__init__ if inspect.isclass(factory) else factory)
    for key in given:
        if key not in parameters:
            known = ", ".join(parameters) or "none"
            raise MetricError(f"metric {name}: unknown option {key!r}; its options are: {known}")
    for key, parameter in parameters.items():
        if parameter.default is inspect.Parameter.empty and key not in given:
            raise MetricError(f"metric {name}: needs option {key}; write {name}:{key}=...")
    converted: dict[str, Any] = {}
    for key, value in given.items():
        kind = hints.get(key, str)
        try:
            converted[key] = kind(value) if kind in _NUMBERS else value
        except ValueError as error:
            raise MetricError(
                f"metric {name}: {key}={value!r} is not {_NUMBERS[kind]}; correct it"
            ) from error
    return converted
