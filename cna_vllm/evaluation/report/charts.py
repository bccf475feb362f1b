# SPDX-License-Identifier: Apache-2.0
"""Where marks go in the report's charts.

Across a chart positions are percentages of its width, so that a page can make it as wide as there
is room without scaling its text; down a chart they are pixels from the top.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cna_vllm.evaluation.outcomes import Estimate, Outcome
from cna_vllm.evaluation.result import Result
from cna_vllm.evaluation.wording import Form, tick

MARKERS = ("circle", "square", "triangle", "diamond")
COLOURS = 6
PLOT_HEIGHT, PLOT_MARGIN = 200, 12  # pixels
_INSET = 6.0  # percent of the width left free at either end
_DODGE = 7  # pixels between series at one dose
_LABEL_GAP = 7.0  # percent of the width that a tick's label takes


@dataclass(frozen=True)
class Scale:
    """A linear scale over [low, high], with ticks at round values."""

    low: float
    high: float
    ticks: tuple[float, ...]

    @classmethod
    def around(cls, values: Sequence[float], wanted: int = 4) -> Scale:
        """Round ends that hold all values; wider than a point whatever they are."""
        low, high = min(values), max(values)
        if high - low < 1e-12 * max(1.0, abs(low), abs(high)):
            pad = abs(low) / 2 or 1.0
            low, high = low - pad, high + pad
        rough = (high - low) / wanted
        unit = 10.0 ** math.floor(math.log10(rough))
        step = next(s * unit for s in (1, 2, 2.5, 5, 10) if s * unit >= rough * (1 - 1e-9))
        first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
        ticks = tuple(round(i * step, 12) for i in range(first, last + 1))
        return cls(ticks[0], ticks[-1], ticks)

    def share(self, value: float) -> float:
        """From 0 at the low end to 1 at the high end."""
        return (value - self.low) / (self.high - self.low)


@dataclass(frozen=True)
class Tick:
    at: float
    label: str
    zero: bool


@dataclass(frozen=True)
class ForestRow:
    """One arm's difference from the control: percentages across, None where there is none."""

    arm: str
    at: float | None
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Forest:
    ticks: tuple[Tick, ...]
    rows: tuple[ForestRow, ...]

    @classmethod
    def of(cls, outcome: Outcome, form: Form) -> Forest:
        """The differences of one outcome on one scale, 0 always on it."""
        compared = [(d.arm, d.comparison) for d in outcome.differences]
        values = [0.0]
        for _, c in compared:
            values += [c.difference] if c.difference is not None else []
            values += c.ci_difference or ()
        scale = Scale.around(values)

        def across(value: float | None) -> float | None:
            if value is None:
                return None
            return round(_INSET + (100 - 2 * _INSET) * scale.share(value), 2)

        return cls(
            ticks=tuple(Tick(across(t) or 0.0, _signed(t, form), t == 0) for t in scale.ticks),
            rows=tuple(
                ForestRow(
                    arm,
                    across(c.difference),
                    *(map(across, c.ci_difference) if c.ci_difference else (None, None)),
                )
                for arm, c in compared
            ),
        )


@dataclass(frozen=True)
class Point:
    """x: percent; y, low, high: pixels; text: for a reader."""

    x: float
    y: float
    low: float | None
    high: float | None
    text: str


@dataclass(frozen=True)
class Series:
    """shift: pixels to the right of its points, so that series do not hide each other."""

    label: str
    colour: int
    marker: str
    shift: float
    points: tuple[Point, ...]


@dataclass(frozen=True)
class Doses:
    """One outcome over the doses of every series; `control`: the control arm's height."""

    axis: str
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    series: tuple[Series, ...]
    control: float | None


@dataclass(frozen=True)
class _Dose:
    series: str
    axis: str
    neutral: float
    value: float


def dose_of(arm: Mapping[str, Any]) -> _Dose | None:
    """The place of a steered arm in a series of doses; None where it has several parts or none."""
    for kind, number, axis, neutral in (
        ("circuit", "multiplier", "multiplier m", 1.0),
        ("vector", "coefficient", "coefficient", 0.0),
    ):
        others = {"circuit", "vector"} - {kind}
        if isinstance(arm.get(kind), str) and not any(arm.get(other) for other in others):
            label = f"{arm[kind]}, scope {arm['scope']}"
            return _Dose(label, axis, neutral, float(arm[number]))
    return None


def doses(outcome: Outcome, result: Result, form: Form) -> list[Doses]:
    """A chart for each kind of dose of which a series has two steered ones; plain joins each."""
    estimates = {estimate.arm: estimate for estimate in outcome.estimates}
    plain = next(
        (a["arm"] for a in result.test.arms if not a.get("circuit") and not a.get("vector")), None
    )
    found: dict[str, dict[str, list[tuple[float, Estimate]]]] = {}
    neutral: dict[str, float] = {}
    for arm in result.test.arms:
        if (dose := dose_of(arm)) is not None:
            neutral[dose.axis] = dose.neutral
            series = found.setdefault(dose.axis, {}).setdefault(dose.series, [])
            series.append((dose.value, estimates[arm["arm"]]))
    charts = []
    for axis, by_series in found.items():
        kept = {
            label: points + ([(neutral[axis], estimates[plain])] if plain is not None else [])
            for label, points in by_series.items()
            if len({dose for dose, _ in points}) > 1
        }
        if kept:
            charts.append(_doses(axis, kept, estimates[result.test.control], form))
    return charts


def _doses(
    axis: str,
    by_series: Mapping[str, Sequence[tuple[float, Estimate]]],
    control: Estimate,
    form: Form,
) -> Doses:
    drawn = [(d, e) for points in by_series.values() for d, e in points if e.value is not None]
    across = sorted({dose for dose, _ in drawn})
    heights = [control.value] if control.value is not None else []
    for _, estimate in drawn:
        heights += [estimate.value or 0.0, *(estimate.interval or ())]
    left, right = across[0], across[-1]
    vertical = Scale(0.0, 1.0, (0.0, 0.25, 0.5, 0.75, 1.0))
    if not form.percent:
        vertical = Scale.around(heights or [0.0, 1.0])

    def x(dose: float) -> float:
        share = (dose - left) / (right - left) if right > left else 0.5
        return round(_INSET + (100 - 2 * _INSET) * share, 2)

    def y(value: float) -> float:
        return round(PLOT_MARGIN + (PLOT_HEIGHT - 2 * PLOT_MARGIN) * (1 - vertical.share(value)), 1)

    series = []
    for i, (label, points) in enumerate(by_series.items()):
        shift = _DODGE * (i - (len(by_series) - 1) / 2)
        marks = [
            Point(
                x=x(dose),
                y=y(estimate.value),
                low=y(estimate.interval[0]) if estimate.interval else None,
                high=y(estimate.interval[1]) if estimate.interval else None,
                text=f"{label}, {dose:g}: {form.number(estimate.value)} "
                f"{form.interval(estimate.interval)}",
            )
            for dose, estimate in sorted(points, key=lambda point: point[0])
            if estimate.value is not None
        ]
        colour, shape = i % COLOURS, MARKERS[i % len(MARKERS)]
        series.append(Series(label, colour, shape, shift, tuple(marks)))
    return Doses(
        axis=axis,
        x_ticks=tuple(_apart([Tick(x(dose), f"{dose:g}", False) for dose in across])),
        y_ticks=tuple(Tick(y(t), _label(t, form), t == 0) for t in vertical.ticks),
        series=tuple(series),
        control=None if control.value is None else y(control.value),
    )


def _label(value: float, form: Form) -> str:
    return tick(value, percent=form.percent) + ("%" if form.percent else "")


def _signed(value: float, form: Form) -> str:
    return ("+" if value > 0 else "") + tick(value, percent=form.percent)


def _apart(ticks: Sequence[Tick]) -> list[Tick]:
    """Without the labels that would overlap those to their left."""
    kept: list[Tick] = []
    for mark in ticks:
        if not kept or mark.at - kept[-1].at >= _LABEL_GAP:
            kept.append(mark)
    return kept
