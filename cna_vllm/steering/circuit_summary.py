# SPDX-License-Identifier: Apache-2.0
"""A circuit in a few lines, for people."""

from __future__ import annotations

import json

from cna_vllm.steering.circuit import Circuit


def summarize(circuit: Circuit) -> str:
    """See `Circuit.summary`."""
    total = circuit.num_layers * circuit.intermediate_size
    layers = circuit.by_layer()
    late = sum(n.layer >= circuit.num_layers - -(-circuit.num_layers // 4) for n in circuit.neurons)
    lines = [
        f"model   {circuit.model} ({circuit.architecture}, {circuit.num_layers} layers, "
        f"intermediate size {circuit.intermediate_size})",
        f"neurons {len(circuit)} of {total} ({len(circuit) / total:.3%}) in {len(layers)} layers, "
        f"{late / len(circuit):.0%} in the last quarter",
        f"sign    {sum(n.delta > 0 for n in circuit.neurons)} positive, "
        f"{sum(n.delta < 0 for n in circuit.neurons)} negative",
        f"digest  {circuit.digest}",
    ]
    if circuit.created or circuit.dtype:
        lines.append(f"found   {circuit.created or 'at an unknown time'} in {circuit.dtype or '?'}")
    for name, mapping in (("method", circuit.method), ("prompts", circuit.prompts)):
        if mapping:
            lines.append(
                f"{name:7} " + ", ".join(f"{k}={_brief(json.dumps(v))}" for k, v in mapping.items())
            )
    lines += [f"note    {note}" for note in circuit.notes]
    return "\n".join(lines)


def _brief(text: str, limit: int = 100) -> str:
    return text if len(text) <= limit else f"{text[: limit - 3]}..."
