# SPDX-License-Identifier: Apache-2.0
"""Circuits and comparisons as text and as JSON; `plot` draws them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from cna_vllm.reading.compare import Chance, Comparison
from cna_vllm.reading.profile import bar_chart, expert_counts, late_shares, layer_counts
from cna_vllm.reading.tokens import visible
from cna_vllm.reading.vocabulary import Item, Reading
from cna_vllm.steering.circuit import Circuit, Neuron

_TOKEN_WIDTH, _TOP_EXPERTS = 24, 12
LENS = (
    "promotes and suppresses: logit lens of sign(delta) * down_proj[:, index], so the change "
    "from the negative to the positive prompts, through the final norm's gain and the unembedding"
)


def shares_text(circuit: Circuit) -> str:
    """One line: the late layers' shares, and what neurons spread evenly would have."""
    return ", ".join(
        f"{share.name} {share.share:.0%} (evenly: {share.uniform:.0%})"
        for share in late_shares(circuit)
    )


def profile_text(circuit: Circuit, max_rows: int | None = None) -> str:
    """The bar chart of neurons by layer, under its heading, the late layers' shares, and the routed
    experts with most neurons."""
    chart = bar_chart(layer_counts(circuit), max_rows)
    return "\n".join(["neurons by layer", chart, shares_text(circuit), *_experts_text(circuit)])


def _experts_text(circuit: Circuit) -> list[str]:
    counts = expert_counts(circuit)
    if not counts:
        return []
    shown = [f"{layer}/{expert}: {count}" for layer, expert, count in counts[:_TOP_EXPERTS]]
    more = ["..."] if len(counts) > _TOP_EXPERTS else []
    return [f"neurons by layer/expert, most first: {', '.join([*shown, *more])}"]


def neurons_text(neurons: Sequence[Neuron]) -> str:
    """A line for every neuron: layer, its routed expert where any has one, index and delta."""
    heading, *lines = _neuron_lines(neurons)
    return "\n".join([f"strongest {len(neurons)}", heading, *lines])


def readings_text(readings: Sequence[Reading], *, suppresses: bool = True) -> str:
    """`neurons_text` with the vocabulary items, a line of promoted and one of suppressed ones."""
    heading, plus = ("promotes (+), suppresses (-)", "+ ") if suppresses else ("promotes", "")
    first, *starts = _neuron_lines([reading.neuron for reading in readings])
    lines = [f"strongest {len(readings)}", f"{first}  {heading}"]
    for start, reading in zip(starts, readings, strict=True):
        lines.append(f"{start}  {plus}{_items_text(reading.promotes)}".rstrip())
        if suppresses:
            lines.append(f"{'':{len(start)}}  - {_items_text(reading.suppresses)}".rstrip())
    return "\n".join(lines)


def _items_text(items: Sequence[Item]) -> str:
    return "  ".join(visible(item.text, _TOKEN_WIDTH) for item in items)


def circuit_json(
    circuit: Circuit, neurons: Sequence[Neuron], readings: Sequence[Reading]
) -> dict[str, Any]:
    """Everything the text shows; `promotes` and `suppresses` only where `readings` are given."""
    rows = [neuron.to_dict() for neuron in neurons]
    for row, reading in zip(rows, readings, strict=False):
        row["promotes"] = [vars(item) for item in reading.promotes]
        row["suppresses"] = [vars(item) for item in reading.suppresses]
    return {
        **_head_json(circuit),
        "dtype": circuit.dtype,
        "method": dict(circuit.method),
        "prompts": dict(circuit.prompts),
        "created": circuit.created,
        "notes": list(circuit.notes),
        "positive": sum(neuron.delta > 0 for neuron in circuit.neurons),
        "negative": sum(neuron.delta < 0 for neuron in circuit.neurons),
        "neurons_by_layer": layer_counts(circuit),
        **_experts_json(circuit),
        "late_layers": [vars(share) for share in late_shares(circuit)],
        "strongest": rows,
        "lens": LENS if readings else None,
    }


def _experts_json(circuit: Circuit) -> dict[str, Any]:
    """Of a circuit with neurons of routed experts: how many neurons, and of all of the circuit."""
    rows = [
        {"layer": layer, "expert": expert, "neurons": count, "share": count / len(circuit)}
        for layer, expert, count in expert_counts(circuit)
    ]
    return {"neurons_by_expert": rows} if rows else {}


def shared_text(count: int, where: str) -> str:
    """One line on what neurons of several circuits get where these steer one request."""
    return (
        f"together {count} neurons are in {where}: on one request with both circuits they get the "
        "product of the multipliers"
    )


def expected_text(chance: Chance) -> str:
    """The expected number of common neurons, to two digits or one place."""
    return f"{chance.expected:.1f}" if chance.expected >= 10 else f"{chance.expected:.2g}"


def comparison_text(comparison: Comparison) -> str:
    """A few lines for people, then a line for every layer with neurons of either circuit."""
    first, second, common = comparison.first, comparison.second, len(comparison.common)
    lines = []
    for letter, circuit in (("A", first), ("B", second)):
        lines.append(f"{letter}        {circuit.model}, {len(circuit)} neurons")
        lines.append(f"         {shares_text(circuit)}")
    lines += [
        f"overlap  {common} neurons: {common / len(first):.1%} of A, {common / len(second):.1%} "
        f"of B, Jaccard {comparison.jaccard:.3f}",
        *([shared_text(common, "both")] if common else []),
        f"chance   {_chance_text(comparison.uniform)} drawn from all neurons; "
        f"{_chance_text(comparison.within_layers)} drawn within each layer",
        f"deltas   sign agreement {_optional(comparison.same_sign, '.0%')}, correlation "
        f"{_optional(comparison.correlation, '+.3f')} over the common neurons",
        "",
        "layer      A      B   both",
    ]
    lines += [
        f"{layer:5} {a:6} {b:6} {both:6}"
        for layer, (a, b, both) in enumerate(comparison.by_layer)
        if a or b
    ]
    return "\n".join(lines)


def comparison_json(comparison: Comparison) -> dict[str, Any]:
    """Everything the text shows, and the common neurons with both deltas."""
    return {
        **{
            name: {
                **_head_json(circuit),
                **_experts_json(circuit),
                "late_layers": [vars(share) for share in late_shares(circuit)],
            }
            for name, circuit in (("a", comparison.first), ("b", comparison.second))
        },
        "overlap": len(comparison.common),
        "share_of_a": len(comparison.common) / len(comparison.first),
        "share_of_b": len(comparison.common) / len(comparison.second),
        "jaccard": comparison.jaccard,
        "chance_uniform": vars(comparison.uniform),
        "chance_within_layers": vars(comparison.within_layers),
        "sign_agreement": comparison.same_sign,
        "delta_correlation": comparison.correlation,
        "by_layer": [{"a": a, "b": b, "both": both} for a, b, both in comparison.by_layer],
        "common": [
            {**_place_json(a), "delta_a": a.delta, "delta_b": b.delta} for a, b in comparison.common
        ],
    }


def _place_json(neuron: Neuron) -> dict[str, Any]:
    return {name: value for name, value in neuron.to_dict().items() if name != "delta"}


def _neuron_lines(neurons: Sequence[Neuron]) -> list[str]:
    """A heading, and a line for every neuron."""
    routed = any(neuron.expert is not None for neuron in neurons)
    rows = [("layer", "expert", "index", "delta")]
    for n in neurons:
        expert = "-" if n.expert is None else str(n.expert)
        rows.append((str(n.layer), expert, str(n.index), f"{n.delta:+.4g}"))
    return [
        f"{layer:>5} {f'{expert:>6} ' if routed else ''}{index:>6} {delta:>11}"
        for layer, expert, index, delta in rows
    ]


def _chance_text(chance: Chance) -> str:
    return f"{expected_text(chance)} expected (p = {chance.p_value:.2g})"


def _optional(value: float | None, form: str) -> str:
    return "unknown" if value is None else format(value, form)


def _head_json(circuit: Circuit) -> dict[str, Any]:
    return {
        "model": circuit.model,
        "architecture": circuit.architecture,
        **circuit.shape.fields(),
        "neurons": len(circuit),
        "digest": circuit.digest,
    }
