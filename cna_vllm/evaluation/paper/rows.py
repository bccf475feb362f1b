# SPDX-License-Identifier: Apache-2.0
"""Measured figures with the published ones beside them, as a table and as JSON."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from cna_vllm.evaluation.wording import align


@dataclass(frozen=True)
class Row:
    """One figure.

    Attributes:
        part: of the evaluation.
        what: the quantity, and the arm it is of.
        value: measured; None where nothing could be scored.
        low, high: its 95% interval, where it has one.
        n: how many prompts or questions it is of.
        published: the paper's value for this model; `bound` says in which way it is another thing.
        bound: `>`, `within`, `near` or `average`, for claims of the paper that are of all its
            models; `~` where the paper asked other prompts.
    """

    part: str
    what: str
    value: float | None
    low: float | None = None
    high: float | None = None
    n: int | None = None
    published: float | None = None
    bound: str = ""

    @property
    def delta(self) -> float | None:
        """Measured less published; None where either is missing, or the published is a bound."""
        if self.value is None or self.published is None or self.bound:
            return None
        return self.value - self.published

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "delta": self.delta}

    @classmethod
    def from_dict(cls, value: dict[str, Any]) -> Row:
        return cls(**{k: v for k, v in value.items() if k != "delta"})


_NOTES = {
    "~": "the paper's figure is of 99 prompts of its own; for a like one give its prompts with "
    "--contrast and --sweep-prompts",
    "average": "the paper's figure is an average over the models of one family",
}
_HEADS = ("part", "what", "measured", "95% interval", "n", "paper", "delta")


def table(rows: Iterable[Row]) -> str:
    """The rows in columns of text; rates and shares with three decimals."""
    return align([_HEADS, *map(_cells, rows)], left=2)


def notes(rows: Iterable[Row]) -> list[str]:
    """What the bounds among the rows mean, where that is not plain."""
    bounds = {row.bound for row in rows if row.published is not None}
    return [f"{bound}: {text}" for bound, text in _NOTES.items() if bound in bounds]


def _cells(row: Row) -> tuple[str, ...]:
    interval = "" if row.low is None or row.high is None else f"{row.low:.3f} to {row.high:.3f}"
    return (
        row.part,
        row.what,
        "-" if row.value is None else f"{row.value:.3f}",
        interval,
        "" if row.n is None else str(row.n),
        "" if row.published is None else f"{row.bound} {row.published:.3f}".strip(),
        "" if row.delta is None else f"{row.delta:+.3f}",
    )
