# SPDX-License-Identifier: Apache-2.0
"""Where marks go in the report's charts.

Across a chart positions are percentages of its width, so that a page can make it as wide as there
is room without scaling its text; down a chart they are pixels from the top.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from cna_vllm.evaluation.outcomes import Estimate, Outcome
from cna_vllm.evaluation.result import Result
from cna_vllm.evaluation.wording import Form

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
        """From 0 at the low end to 1 at the high end; in the middle of a point."""
        return (value - self.low) / (self.high - self.low) if self.high > self.low else 0.5

    def across(self, value: float) -> float:
        """Percent of the chart's width."""
        return round(_INSET + (100 - 2 * _INSET) * self.share(value), 2)


@dataclass(frozen=True)
class Tick:
    at: float
    label: str
    zero: bool


@dataclass(frozen=True)
class ForestRow:
    """One arm's difference from the control: percentages across, None where there is none."""

    at: float | None
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Forest:
    """rows: by arm."""

    ticks: tuple[Tick, ...]
    rows: Mapping[str, ForestRow]

    @classmethod
    def of(cls, outcome: Outcome, form: Form) -> Forest:
        """The differences of one outcome on one scale, 0 always on it."""
        compared = {d.arm: d.comparison for d in outcome.differences}
        ends = {arm: c.ci_difference or (None, None) for arm, c in compared.items()}
        marks = {arm: (c.difference, *ends[arm]) for arm, c in compared.items()}
        drawn = [value for mark in marks.values() for value in mark if value is not None]
        scale = Scale.around([0.0, *drawn])
        return cls(
            ticks=tuple(
                Tick(scale.across(t), ("+" if t > 0 else "") + form.tick(t), t == 0)
                for t in scale.ticks
            ),
            rows={
                arm: ForestRow(*(None if v is None else scale.across(v) for v in mark))
                for arm, mark in marks.items()
            },
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


# Of a kind: the other one, the field and the name of its dose, and the dose that changes nothing.
_DOSES = {
    "circuit": ("vector", "multiplier", "multiplier m", 1.0),
    "vector": ("circuit", "coefficient", "coefficient", 0.0),
}


def doses(outcome: Outcome, result: Result, form: Form) -> list[Doses]:
    """A chart for each kind of dose of which a series has two steered ones; plain joins each.

    Arms with several parts are in no series.
    """
    estimates = {estimate.arm: estimate for estimate in outcome.estimates}
    arms = result.test.arms
    plain = next((a["arm"] for a in arms if not a.get("circuit") and not a.get("vector")), None)
    charts = []
    for kind, (other, number, axis, neutral) in _DOSES.items():
        found: dict[str, list[tuple[float, Estimate]]] = {}
        for arm in arms:
            if isinstance(arm.get(kind), str) and not arm.get(other):
                series = found.setdefault(f"{arm[kind]}, scope {arm['scope']}", [])
                series.append((float(arm[number]), estimates[arm["arm"]]))
        kept = {
            label: points + ([(neutral, estimates[plain])] if plain is not None else [])
            for label, points in found.items()
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
    horizontal = Scale(across[0], across[-1], ())
    vertical = Scale(0.0, 1.0, (0.0, 0.25, 0.5, 0.75, 1.0))
    if not form.percent:
        vertical = Scale.around(heights or [0.0, 1.0])

    def y(value: float) -> float:
        return round(PLOT_MARGIN + (PLOT_HEIGHT - 2 * PLOT_MARGIN) * (1 - vertical.share(value)), 1)

    series = []
    for i, (label, points) in enumerate(by_series.items()):
        shift = _DODGE * (i - (len(by_series) - 1) / 2)
        marks = [
            Point(
                x=horizontal.across(dose),
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
    x_ticks = [Tick(horizontal.across(dose), f"{dose:g}", False) for dose in across]
    unit = "%" if form.percent else ""
    return Doses(
        axis=axis,
        x_ticks=tuple(_apart(x_ticks)),
        y_ticks=tuple(Tick(y(t), form.tick(t) + unit, t == 0) for t in vertical.ticks),
        series=tuple(series),
        control=None if control.value is None else y(control.value),
    )


def _apart(ticks: Sequence[Tick]) -> list[Tick]:
    """Without the labels that would overlap those to their left."""
    kept: list[Tick] = []
    for mark in ticks:
        if not kept or mark.at - kept[-1].at >= _LABEL_GAP:
            kept.append(mark)
    return kept
