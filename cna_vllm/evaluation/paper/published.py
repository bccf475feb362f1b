# SPDX-License-Identifier: Apache-2.0
"""What the paper (arXiv 2605.12290) reports, to stand beside what is measured here.

Rates are of 1, as everywhere in this package; the paper prints percent.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Published:
    """One model's published rows.

    Attributes:
        model: as the paper calls it (instruct models).
        jbb: refusal rate on the 100 harmful prompts of JBB-Behaviors, plain and ablated (Table 3).
        sweep: the same on 99 prompts, circuits from 8 + 8 prompts (Table 1).
        caa_refusal, caa_quality: of CAA at full strength (Table 1).
    """

    model: str
    jbb: tuple[float, float]
    sweep: tuple[float, float]
    caa_refusal: float
    caa_quality: float


ROWS = (
    Published("Llama-3.2-1B", (0.90, 0.34), (0.434, 0.202), 0.0, 0.554),
    Published("Llama-3.2-3B", (0.84, 0.47), (0.576, 0.263), 0.0, 0.431),
    Published("Llama-3.1-8B", (0.90, 0.34), (0.889, 0.051), 0.384, 0.493),
    Published("Llama-3.1-70B", (0.86, 0.18), (0.727, 0.121), 0.0, 0.569),
    Published("Qwen2.5-1.5B", (0.93, 0.12), (0.970, 0.263), 1.0, 0.888),
    Published("Qwen2.5-3B", (0.90, 0.58), (0.929, 0.343), 0.0, 0.844),
    Published("Qwen2.5-7B", (0.87, 0.02), (0.828, 0.131), 0.051, 0.414),
    Published("Qwen2.5-72B", (0.78, 0.08), (0.657, 0.051), 0.98, 0.406),
)

# Claims that hold for all models of the paper.
QUALITY_AT_EVERY_STRENGTH = 0.97  # output quality stays above it
MMLU_WITHIN = 0.01  # of the plain model's accuracy, at every strength
CAA_MMLU = 0.0  # accuracy is near it at full strength
# By how much ablation raises the judge's compliance, on average over a family's models.
COMPLIANCE_GAIN = {"Llama": 0.06, "Qwen": 0.31}
# The share of the 200 strongest refusal neurons in late layers, of the base model's likewise, and
# how many of them both have.
LATE_SHARES = {
    "Llama-3.2-1B": ("last three layers", 0.87),
    "Qwen2.5-3B": ("last quarter", 0.95),
}
BASE_LATE_SHARES = {"Llama-3.2-1B": ("last three layers", 0.82)}
SHARED_WITH_BASE = {"Llama-3.2-1B": 17, "Qwen2.5-3B": 28}


def published(model: str) -> Published | None:
    """The rows of a model by its hub id or folder name, instruct models only; else None."""
    name = _normal(Path(model).name)
    return next((row for row in ROWS if name == _normal(row.model) + "instruct"), None)


def compliance_gain(model: Published | None) -> float | None:
    """Of the family of a published model."""
    return None if model is None else COMPLIANCE_GAIN[re.split(r"[-\d]", model.model)[0]]


def _normal(name: str) -> str:
    return re.sub(r"[^a-z0-9.]", "", name.lower().replace("meta-", ""))
