# SPDX-License-Identifier: Apache-2.0
"""The neurons of the three JSON layouts of a circuit. Whatever the data are, they end in neurons or
in a `CircuitError`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from cna_vllm.steering.circuit import Circuit
from cna_vllm.steering.content import show
from cna_vllm.steering.neurons import CircuitError, Neuron, checked_delta

SHARED = "shared"
_FIELDS = frozenset(("layer", "expert", "index", "delta"))
_MAX_INT_DIGITS = 9  # of a layer or an index in a key: above every limit, and cheap to parse


def foreign(data: dict[str, Any]) -> tuple[list[Neuron], list[str]]:
    """Neurons and notes of a layout that does not name its model."""
    if "neurons" in data:
        return _reference(data["neurons"])
    if data and _all_numbers(data):
        note = "read from a plain {layer: [indices]} file: no activation differences, deltas are 0"
        return list(_plain(data)), [note]
    raise CircuitError(
        f"is not a circuit: expected 'format': {Circuit.FORMAT!r}, a 'neurons' object, or layer "
        f"numbers as keys, found the keys {show(list(data))}"
    )


def own(entries: Any) -> Iterator[Neuron]:
    """Those of our own layout."""
    if not isinstance(entries, list):
        raise CircuitError(f"'neurons' must be a list of objects, not {show(entries)}")
    for position, entry in enumerate(entries):
        if not isinstance(entry, dict) or {*entry, "expert"} != _FIELDS:
            raise CircuitError(
                f"'neurons'[{position}] must be an object with 'layer', 'index', 'delta' and, of a "
                f"routed expert, 'expert', not {show(entry)}"
            )
        # The shared expert is the layer's one MLP beside the routed ones.
        yield Neuron(**({**entry, "expert": None} if entry.get("expert") == SHARED else entry))


def _reference(entries: Any) -> tuple[list[Neuron], list[str]]:
    """`{"L,P,N": value}`, with notes: the recorded position P has no meaning for a circuit.

    Of a neuron with entries at several positions, the value at -1 (the last prompt token, which
    discovery looks at) is its delta; without one, the value of largest magnitude, and of equal ones
    that at the last position.
    """
    if not isinstance(entries, dict):
        raise CircuitError(
            f"'neurons' must be an object of \"layer,position,index\" keys, not {show(entries)}"
        )
    found: dict[tuple[int, int], dict[int, float]] = {}
    for key, value in entries.items():
        parts = key.split(",") if isinstance(key, str) else []
        if len(parts) != 3 or not all(_is_number(part) for part in parts):
            raise CircuitError(f"'neurons': the key {show(key)} is not \"layer,position,index\"")
        layer, position, index = (int(part) for part in parts)
        places = found.setdefault((layer, index), {})
        if position in places:
            raise CircuitError(f"'neurons': {show(key)} is there twice; remove one")
        places[position] = checked_delta(f"'neurons'[{show(key)}]", value)
    notes = ["read from the reference implementation's format"]
    if others := sorted({at for places in found.values() for at in places} - {-1}):
        notes.append(f"positions other than -1 ignored: {show(others)}")
    if several := sum(len(places) > 1 for places in found.values()):
        notes.append(
            f"{several} neurons have entries at several positions: the delta is that at -1, else "
            "the largest in magnitude"
        )
    best = [max(p.items(), key=lambda i: (i[0] == -1, abs(i[1]), i[0])) for p in found.values()]
    return [Neuron(*at, delta) for at, (_, delta) in zip(found, best, strict=True)], notes


def _plain(layers: dict[str, Any]) -> Iterator[Neuron]:
    """`{layer: [indices]}`; the indices of a layer may be `{expert or "shared": [indices]}`."""
    for key, of_layer in layers.items():
        experts = of_layer if isinstance(of_layer, dict) else {SHARED: of_layer}
        if not _all_numbers(experts.keys() - {SHARED}):
            raise CircuitError(
                f"layer {key}: experts must be numbers or {SHARED!r}, not {show(list(experts))}"
            )
        for expert, indices in experts.items():
            if not isinstance(indices, list):
                raise CircuitError(f"layer {key}: expected a list of indices, not {show(indices)}")
            number = None if expert == SHARED else int(expert)
            yield from (Neuron(int(key), index, expert=number) for index in indices)


def _all_numbers(keys: Iterable[Any]) -> bool:
    return all(isinstance(key, str) and _is_number(key) for key in keys)


def _is_number(text: str) -> bool:
    digits = text.strip().removeprefix("-")
    return digits.isascii() and digits.isdigit() and len(digits) <= _MAX_INT_DIGITS
