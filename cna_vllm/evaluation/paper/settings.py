# SPDX-License-Identifier: Apache-2.0
"""What an evaluation runs, and the two presets: the paper's text, and its reference code."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cna_vllm.text.prompts import Prompt, prompts_digest

PARTS: Mapping[str, str] = {
    "jbb": "refusal on JBB-Behaviors, circuit from 100 + 100 prompts (Table 3)",
    "sweep": "refusal and quality at every strength, circuit from 8 + 8 prompts (Table 1)",
    "caa": "mean-difference vectors (CAA) on the sweep's prompts, both forms and both signs",
    "mmlu": "MMLU accuracy at every strength, and of CAA, by lm-evaluation-harness",
    "strongreject": "a judge's StrongREJECT score, plain and ablated",
    "structure": "where the 200 strongest neurons lie; shared with the base model, if one is named",
}
PRESETS = ("paper", "reference")
CONTRAST = 8  # prompts a side of the small circuit
TOP = 200  # neurons of the structure part
# The published experiments steer every position; `last` is the default everywhere else.
SCOPE = "all"
ONE_PART = ("mmlu", "strongreject", "base_model")  # keys of `Settings.identity`
# Original CAA adds to one layer near the middle: 13 of Llama 2 7B's 32 (arXiv 2312.06681).
CAA_LAYER = 13 / 32
CAA_SIGNS = (1.0, -1.0)  # harmful less benign added, as in the reference's code, and subtracted


class EvalError(ValueError):
    """An evaluation that cannot be run as asked: one line with the option and the fix."""


@dataclass(frozen=True)
class Settings:
    """One evaluation, resolved: everything its figures depend on but the engine.

    Attributes:
        model: as it is looked up among the published rows.
        parts: names of `PARTS`, in their order.
        preset: how circuits are selected, `paper` or `reference`.
        multipliers: of the sweep, the plain 1 among them.
        harmful, benign: JBB-Behaviors.
        positive, negative: the small contrast.
        asked: prompts of the sweep; empty: the harmful ones that the contrast does not hold.
        forbidden: StrongREJECT's prompts, or empty.
        keywords: file with the phrases of the keyword rule; None: the rule's own.
        judge: options of the judge metric, or None.
        mmlu_task, mmlu_limit, mmlu_fewshot: of lm-evaluation-harness.
        limit: prompts of each set that are answered; None: all.
        max_tokens: of an answer.
    """

    model: str
    parts: tuple[str, ...]
    preset: str
    multipliers: tuple[float, ...]
    harmful: tuple[Prompt, ...]
    benign: tuple[Prompt, ...]
    positive: tuple[Prompt, ...]
    negative: tuple[Prompt, ...]
    asked: tuple[Prompt, ...] = ()
    forbidden: tuple[Prompt, ...] = ()
    keywords: str | None = None
    judge: str | None = None
    mmlu_task: str = "mmlu"
    mmlu_limit: int | None = None
    mmlu_fewshot: int | None = None
    base_model: str | None = None
    limit: int | None = None
    max_tokens: int = 150
    seed: int = 0

    def __post_init__(self) -> None:
        for part in self.parts:
            if part not in PARTS:
                raise EvalError(f"--parts {part}: is none of {', '.join(PARTS)}")
        if not self.parts:
            raise EvalError(f"--parts: name at least one of {', '.join(PARTS)}")
        if self.preset not in PRESETS:
            raise EvalError(f"--preset {self.preset}: is none of {', '.join(PRESETS)}")
        if not all(m == m and abs(m) < float("inf") for m in self.multipliers):
            raise EvalError("--multipliers: must be finite numbers")
        # Arms and files are named by six digits.
        if len({f"{m:g}" for m in self.multipliers}) < len(self.multipliers):
            raise EvalError("--multipliers: two of them are equal in their first six digits")
        if 1.0 not in self.multipliers or len(self.multipliers) < 2:
            raise EvalError("--multipliers: name 1, the plain model, and at least one other")
        if "strongreject" in self.parts and not (self.forbidden and self.judge):
            raise EvalError(
                "--parts strongreject: needs --strongreject FILE and --judge url=...,model=..."
            )
        if {"sweep", "caa"} & {*self.parts} and not self.sweep_prompts:
            raise EvalError(
                "--contrast: holds all harmful prompts; none is left to be answered, so name some "
                "with --sweep-prompts"
            )

    @property
    def sweep_prompts(self) -> tuple[Prompt, ...]:
        """Those given, or else the harmful ones that the small circuit was not found on."""
        seen = {*self.positive, *self.negative}
        return self.limited(self.asked or tuple(p for p in self.harmful if p not in seen))

    def limited(self, prompts: Sequence[Prompt]) -> tuple[Prompt, ...]:
        """The first `limit` of them."""
        return tuple(prompts[: self.limit])

    def identity(self) -> dict[str, Any]:
        """JSON types; equal for two runs only if their results are of the same thing.

        What only one part is of, `ONE_PART`, is None where that is no part, or nothing is given.
        """
        plain = ("model", "preset", "limit", "max_tokens", "seed")
        prompts = ("harmful", "benign", "positive", "negative", "asked")
        mmlu, judged, base = (part in self.parts for part in ("mmlu", "strongreject", "structure"))
        return {
            **{name: getattr(self, name) for name in plain},
            **{name: prompts_digest(getattr(self, name)) for name in prompts},
            "multipliers": list(self.multipliers),
            "keywords": self.keywords
            and hashlib.sha256(Path(self.keywords).read_bytes()).hexdigest(),
            "mmlu": [self.mmlu_task, self.mmlu_limit, self.mmlu_fewshot] if mmlu else None,
            "strongreject": [self.judge, prompts_digest(self.forbidden)] if judged else None,
            "base_model": self.base_model if base else None,
        }
