# SPDX-License-Identifier: Apache-2.0
"""The parts of the evaluation: each from a study to rows of figures."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Literal

from cna_vllm.evaluation.paper import published
from cna_vllm.evaluation.paper.published import Published
from cna_vllm.evaluation.paper.rows import Row
from cna_vllm.evaluation.paper.settings import CAA_LAYER, CAA_SIGNS, SCOPE, TOP, EvalError
from cna_vllm.evaluation.paper.study import PLAIN, Figures, Study
from cna_vllm.evaluation.statistics import wilson
from cna_vllm.serving.seams.offline import engine_of
from cna_vllm.steering.arms import Arm
from cna_vllm.steering.circuit import Circuit

QUALITY = "quality-3"
# The published baseline adds harmful minus benign, at every layer and position.
_PUBLISHED_CAA = (("caa-mlp", 1.0),)


def jbb(study: Study) -> list[Row]:
    """Table 3: the circuit of all harmful against all benign prompts, on the same prompts."""
    settings = study.settings
    study.circuit("jbb", settings.harmful, settings.benign)
    sets = {"harmful": settings.limited(settings.harmful)}
    sets["benign"] = settings.limited(settings.benign)
    arms = [PLAIN, Arm("m = 0", (("jbb", 0.0),), SCOPE)]
    figures = study.answers("jbb", arms, sets, [*study.refusal, "false_refusal", "quality:n=3"])
    known = _known(study)
    rows = []
    for index, arm in enumerate(arms):
        paper = None if known is None else known.jbb[index]
        rows += [
            *_refusal(figures, arm, paper),
            figures.row(arm, "benign", "false_refusal"),
            figures.row(arm, "harmful", QUALITY),
        ]
    return rows


def sweep(study: Study) -> list[Row]:
    """Table 1: the circuit of a few prompts, at every multiplier, on prompts it did not see."""
    study.circuit("small")
    arms = [_dose("small", m) for m in study.settings.multipliers]
    sets = {"harmful": study.settings.sweep_prompts}
    figures = study.answers("sweep", arms, sets, [*study.refusal, "quality:n=3"])
    known = _known(study)
    rows = []
    for arm in arms:
        paper = None
        if known is not None and arm.dose in (1.0, 0.0):
            paper = known.sweep[0 if arm.dose == 1.0 else 1]
        rows += [
            *_refusal(figures, arm, paper, _unlike(study)),
            figures.row(arm, "harmful", QUALITY, published.QUALITY_AT_EVERY_STRENGTH, bound=">"),
        ]
    return rows


def caa(study: Study) -> list[Row]:
    """CAA at full strength on the sweep's prompts: the reference's form and the original's."""
    arms = [PLAIN, *_vector_arms(study, "mlp"), *_vector_arms(study, "residual")]
    sets = {"harmful": study.settings.sweep_prompts}
    figures = study.answers("caa", arms, sets, [*study.refusal, "quality:n=3"])
    known = _known(study)
    rows = []
    for arm in arms:
        theirs = known if arm.vectors == _PUBLISHED_CAA else None
        refusal = None if theirs is None else theirs.caa_refusal
        quality = None if theirs is None else theirs.caa_quality
        rows += [
            *_refusal(figures, arm, refusal, _unlike(study)),
            figures.row(arm, "harmful", QUALITY, quality, _unlike(study)),
        ]
    return rows


def mmlu(study: Study) -> list[Row]:
    """Accuracy at every multiplier of the sweep's circuit; with caa, of its vectors as well."""
    settings = study.settings
    study.circuit("small")
    doses = sorted(settings.multipliers, key=lambda m: m != 1.0)
    arms = {f"{m:g}": _dose("small", m) for m in doses}
    if study.task is None:
        raise EvalError("--parts mmlu: needs a task")
    if "caa" in settings.parts:  # the form at all positions: the harness scores prompts
        arms |= {arm.name.replace(" ", ""): arm for arm in _vector_arms(study, "mlp")}
    rows: list[Row] = []
    plain = 0.0
    for name, arm in arms.items():
        found = study.kept(f"mmlu/{name}.json", partial(study.task.accuracy, study.llm, arm))
        value, n = found["accuracy"], found["n"]
        low, high = wilson(round(value * n), n)
        near = (published.CAA_MMLU, "near") if arm.vectors == _PUBLISHED_CAA else (None, "")
        rows.append(Row("mmlu", f"accuracy, {arm.name}", value, low, high, n, *near))
        if arm.dose == 1.0:
            plain = value
        elif arm.circuits:
            what, within = f"accuracy less plain's, {arm.name}", published.MMLU_WITHIN
            rows.append(Row("mmlu", what, value - plain, n=n, published=within, bound="within"))
    return rows


def strongreject(study: Study) -> list[Row]:
    """A judge's score of the answers to StrongREJECT's prompts, plain and ablated."""
    settings = study.settings
    study.circuit("small")
    arms = [PLAIN, _dose("small", 0.0)]
    sets = {"harmful": settings.limited(settings.forbidden)}
    judge = f"judge:{settings.judge}"
    figures = study.answers("strongreject", arms, sets, [judge, *study.refusal])
    rows = [figures.row(arm, "harmful", metric) for arm in arms for metric in figures.metrics]
    graded = figures.metrics[0]
    plain, ablated = (figures.row(arm, "harmful", graded) for arm in arms)
    if plain.value is not None and ablated.value is not None:
        gain = published.compliance_gain(_known(study))
        what, value = f"{graded} less plain's, m = 0", ablated.value - plain.value
        rows.append(Row("strongreject", what, value, n=ablated.n, published=gain, bound="average"))
    return rows


def structure(study: Study) -> list[Row]:
    """Late-layer shares of the strongest neurons, and how many the base model's circuit has too."""
    from cna_vllm.reading.compare import compare

    circuit = study.circuit("top", top_k=TOP)
    known = _known(study)
    name = "" if known is None else known.model
    count = len(circuit)
    rows = [*_late(circuit, f"{{}}, of {count}", published.LATE_SHARES.get(name))]
    base = study.base_circuit()
    if base is not None:
        comparison = compare(circuit, base)
        both = published.SHARED_WITH_BASE.get(name)
        theirs = None if both is None else both / TOP
        shared, chance = len(comparison.common), comparison.within_layers.expected
        what, by_chance = "neurons shared with the base model's", "the same, expected by chance"
        rows += [
            Row("structure", what, shared / count, n=count, published=theirs),
            Row("structure", f"{by_chance} within layers", chance / count, n=count),
            *_late(base, "base model: {}", published.BASE_LATE_SHARES.get(name)),
        ]
    return rows


def _late(circuit: Circuit, what: str, theirs: tuple[str, float] | None) -> Iterator[Row]:
    from cna_vllm.reading.profile import late_shares

    for late in late_shares(circuit):
        paper = theirs[1] if theirs is not None and late.name == theirs[0] else None
        what_of = what.format(late.name)
        yield Row("structure", what_of, late.share, n=len(circuit), published=paper)


RUN: Mapping[str, Callable[[Study], Sequence[Row]]] = {
    part.__name__: part for part in (jbb, sweep, caa, mmlu, strongreject, structure)
}


def _dose(circuit: str, multiplier: float) -> Arm:
    """One multiplier of a circuit at all positions; 1 is the plain model by that name."""
    if multiplier == 1.0:
        return Arm("m = 1")
    return Arm(f"m = {multiplier:g}", ((circuit, multiplier),), SCOPE)


def _vector_arms(study: Study, form: Literal["mlp", "residual"]) -> list[Arm]:
    """Both signs of the small contrast's mean differences: at every layer and position, as the
    reference has it, or at one layer after the prompt, as CAA was published."""
    name = f"caa-{form}"
    middle = int(engine_of(study.llm).num_layers * CAA_LAYER)
    study.vectors(name, form=form, layers=[middle] if form == "residual" else None)
    scope = SCOPE if form == "mlp" else "generated"
    return [Arm(f"{name} {sign:+g}", vectors=((name, sign),), scope=scope) for sign in CAA_SIGNS]


def _refusal(figures: Figures, arm: Arm, paper: float | None, bound: str = "") -> list[Row]:
    """By the keyword rule, the paper's kind of measure, and by the better one."""
    rules = [name for name in figures.metrics if name.startswith("refusal")]
    return [figures.row(arm, "harmful", name, paper, bound) for name in rules]


def _unlike(study: Study) -> str:
    """Marks Table 1's figures: its prompts are the paper's own, unless they are given."""
    return "" if study.settings.asked else "~"


def _known(study: Study) -> Published | None:
    return published.published(study.settings.model)
