# SPDX-License-Identifier: Apache-2.0
"""The parts of the evaluation: each from a study to rows of figures."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

from cna_vllm.arms import Arm
from cna_vllm.evaluation.paper import published
from cna_vllm.evaluation.paper.published import Published
from cna_vllm.evaluation.paper.rows import Row
from cna_vllm.evaluation.paper.settings import CAA_LAYER, SCOPE, TOP
from cna_vllm.evaluation.paper.study import PLAIN, Study
from cna_vllm.evaluation.statistics import wilson

REFUSAL = ("refusal_keywords", "refusal")
QUALITY = "quality-3"


def jbb(study: Study) -> list[Row]:
    """Table 3: the circuit of all harmful against all benign prompts, on the same prompts."""
    settings = study.settings
    study.circuit("jbb", settings.harmful, settings.benign)
    sets = {"harmful": settings.limited(settings.harmful)}
    sets["benign"] = settings.limited(settings.benign)
    arms = [PLAIN, Arm("m = 0", (("jbb", 0.0),), SCOPE)]
    metrics = [*REFUSAL, "false_refusal", "quality:n=3"]
    figures = study.answers("jbb", arms, sets, metrics)
    known = _known(study)
    rows = []
    for index, arm in enumerate(arms):
        paper = None if known is None else known.jbb[index]
        rows += [
            figures.row(arm, "harmful", "refusal_keywords", paper),
            figures.row(arm, "harmful", "refusal"),
            figures.row(arm, "benign", "false_refusal"),
            figures.row(arm, "harmful", QUALITY),
        ]
    return rows


def sweep(study: Study) -> list[Row]:
    """Table 1: the circuit of a few prompts, at every multiplier, on prompts it did not see."""
    settings = study.settings
    study.circuit("small", settings.positive, settings.negative)
    arms = [_dose("small", m) for m in settings.multipliers]
    sets = {"harmful": settings.sweep_prompts}
    figures = study.answers("sweep", arms, sets, [*REFUSAL, "quality:n=3"])
    known = _known(study)
    rows = []
    for arm in arms:
        paper = None
        if known is not None and arm.dose in (1.0, 0.0):
            paper = known.sweep[0 if arm.dose == 1.0 else 1]
        rows += [
            figures.row(arm, "harmful", "refusal_keywords", paper),
            figures.row(arm, "harmful", "refusal"),
            figures.row(arm, "harmful", QUALITY, published.QUALITY_AT_EVERY_STRENGTH, bound=">"),
        ]
    return rows


def caa(study: Study) -> list[Row]:
    """CAA at full strength on the sweep's prompts: the reference's form and the original's."""
    settings = study.settings
    layer = int(study.num_layers * CAA_LAYER)
    study.vectors("caa-mlp", settings.positive, settings.negative, form="mlp")
    study.vectors(
        "caa-residual", settings.positive, settings.negative, form="residual", layers=[layer]
    )
    scopes = {"caa-mlp": SCOPE, "caa-residual": "generated"}
    arms = [PLAIN] + [
        Arm(f"{name} {sign:+g}", vectors=((name, sign),), scope=scope)
        for name, scope in scopes.items()
        for sign in (1.0, -1.0)
    ]
    sets = {"harmful": settings.sweep_prompts}
    figures = study.answers("caa", arms, sets, [*REFUSAL, "quality:n=3"])
    known = _known(study)
    rows = []
    for arm in arms:
        # The published baseline adds harmful minus benign, at every layer and position.
        theirs = known if arm.vectors == (("caa-mlp", 1.0),) else None
        refusal = None if theirs is None else theirs.caa_refusal
        quality = None if theirs is None else theirs.caa_quality
        rows += [
            figures.row(arm, "harmful", "refusal_keywords", refusal),
            figures.row(arm, "harmful", "refusal"),
            figures.row(arm, "harmful", QUALITY, quality),
        ]
    return rows


def mmlu(study: Study) -> list[Row]:
    """Accuracy at every multiplier of the sweep's circuit."""
    from cna_vllm.evaluation.paper.harness import accuracy

    settings = study.settings
    study.circuit("small", settings.positive, settings.negative)
    rows: list[Row] = []
    plain: float | None = None
    for multiplier in sorted(settings.multipliers, key=lambda m: m != 1.0):
        arm = _dose("small", multiplier)
        score = partial(
            accuracy,
            study.llm,
            arm,
            settings.mmlu_task,
            num_fewshot=settings.mmlu_fewshot,
            limit=settings.mmlu_limit,
        )
        found = study.kept(f"mmlu/{multiplier:g}.json", score)
        value, n = found["accuracy"], found["n"]
        low, high = wilson(round(value * n), n)
        rows.append(Row("mmlu", f"accuracy, {arm.name}", value, low, high, n))
        if multiplier == 1.0:
            plain = value
        elif plain is not None:
            what, within = f"accuracy less plain's, {arm.name}", published.MMLU_WITHIN
            rows.append(Row("mmlu", what, value - plain, n=n, published=within, bound="within"))
    return rows


def strongreject(study: Study) -> list[Row]:
    """A judge's score of the answers to StrongREJECT's prompts, plain and ablated."""
    settings = study.settings
    assert settings.judge is not None
    study.circuit("small", settings.positive, settings.negative)
    arms = [PLAIN, _dose("small", 0.0)]
    sets = {"harmful": settings.limited(settings.forbidden)}
    figures = study.answers("strongreject", arms, sets, [f"judge:{settings.judge}", *REFUSAL])
    return [figures.row(arm, "harmful", metric) for arm in arms for metric in figures.metrics]


def structure(study: Study) -> list[Row]:
    """Late-layer shares of the strongest neurons, and how many the base model's circuit has too."""
    from cna_vllm.reading.compare import compare
    from cna_vllm.reading.profile import late_shares

    settings = study.settings
    circuit = study.circuit("top", settings.positive, settings.negative, top_k=TOP)
    known = _known(study)
    name = None if known is None else known.model
    where, share = published.LATE_SHARES.get(name or "", ("", None))
    rows = [
        Row(
            "structure",
            f"{late.name}, of {len(circuit)}",
            late.share,
            n=len(circuit),
            published=share if late.name == where else None,
        )
        for late in late_shares(circuit)
    ]
    base = study.base_circuit()
    if base is not None:
        comparison = compare(circuit, base)
        both = published.SHARED_WITH_BASE.get(name or "")
        rows += [
            Row(
                "structure",
                "neurons shared with the base model's",
                len(comparison.common) / len(circuit),
                n=len(circuit),
                published=None if both is None else both / TOP,
            ),
            Row(
                "structure",
                "the same, expected by chance within layers",
                comparison.within_layers.expected / len(circuit),
                n=len(circuit),
            ),
        ]
        rows += [
            Row("structure", f"base model: {late.name}", late.share, n=len(base))
            for late in late_shares(base)
        ]
    return rows


RUN: Mapping[str, Callable[[Study], Sequence[Row]]] = {
    "jbb": jbb,
    "sweep": sweep,
    "caa": caa,
    "mmlu": mmlu,
    "strongreject": strongreject,
    "structure": structure,
}


def _dose(circuit: str, multiplier: float) -> Arm:
    """One multiplier of a circuit at all positions; 1 is the plain model by that name."""
    if multiplier == 1.0:
        return Arm("m = 1")
    return Arm(f"m = {multiplier:g}", ((circuit, multiplier),), SCOPE)


def _known(study: Study) -> Published | None:
    return published.published(study.settings.model)
