# SPDX-License-Identifier: Apache-2.0
"""Circuit files: bounded reading, and the three JSON layouts.

Whatever the bytes are, reading ends in a `Circuit` or in a `CircuitError`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from typing import Any

from cna_vllm.steering.circuit import Circuit, CircuitError, Neuron, checked_delta, is_int, show

FORMAT = "cna-circuit"
VERSION = 1

_REQUIRED = ("model", "architecture", "num_layers", "intermediate_size", "neurons")
_OPTIONAL = ("dtype", "method", "prompts", "tools", "created", "notes")
_KNOWN = {"format", "version", "digest", *_REQUIRED, *_OPTIONAL}
_MODEL_ARGUMENTS = ("model", "architecture", "num_layers", "intermediate_size")
_MAX_INT_DIGITS = 9  # of a layer or an index: above every limit, and cheap to parse


def read_json(path: str | os.PathLike[str], max_bytes: int) -> Any:
    """`parse_json` of a file of at most `max_bytes`."""
    try:
        with open(path, "rb") as handle:
            raw = handle.read(max_bytes + 1)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else None
        raise CircuitError(f"cannot be read: {reason or error}") from error
    if len(raw) > max_bytes:
        raise CircuitError(f"is larger than {max_bytes} bytes; this is not a circuit file")
    return parse_json(raw)


def parse_json(raw: bytes) -> Any:
    """Decodes UTF-8 JSON, with a byte order mark or without; duplicate keys and NaN are refused."""
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise CircuitError(f"is not UTF-8 text: {error.reason} at byte {error.start}") from error
    try:
        return json.loads(text, object_pairs_hook=_unique_keys, parse_constant=_no_constant)
    except json.JSONDecodeError as error:
        raise CircuitError(
            f"is not JSON: {error.msg} at line {error.lineno}, column {error.colno}"
        ) from error
    except RecursionError as error:
        raise CircuitError("is not a circuit file: its JSON is nested too deeply") from error
    except CircuitError:
        raise
    except ValueError as error:  # an integer over the interpreter's limit of digits
        raise CircuitError("holds an integer that is too long") from error


def encode(circuit: Circuit) -> dict[str, Any]:
    """See `Circuit.to_dict`."""
    return {
        "format": FORMAT,
        "version": VERSION,
        "model": circuit.model,
        "architecture": circuit.architecture,
        "num_layers": circuit.num_layers,
        "intermediate_size": circuit.intermediate_size,
        "dtype": circuit.dtype,
        "method": dict(circuit.method),
        "prompts": dict(circuit.prompts),
        "tools": dict(circuit.tools),
        "created": circuit.created,
        "notes": list(circuit.notes),
        "digest": circuit.digest,
        "neurons": [
            {"layer": n.layer, "index": n.index, "delta": n.delta} for n in circuit.neurons
        ],
    }


def decode(
    data: Any,
    model: str | None,
    architecture: str | None,
    num_layers: int | None,
    intermediate_size: int | None,
) -> Circuit:
    """See `Circuit.from_dict`."""
    given = {
        "model": model,
        "architecture": architecture,
        "num_layers": num_layers,
        "intermediate_size": intermediate_size,
    }
    if not isinstance(data, dict):
        raise CircuitError(f"must be a JSON object, not {show(data)}")
    if "format" in data or "version" in data:
        return _decode_own(data, given)
    if "neurons" in data:
        return _decode_reference(data["neurons"], given)
    if data and all(isinstance(key, str) and _is_number(key) for key in data):
        return _decode_plain(data, given)
    raise CircuitError(
        f"is not a circuit: expected 'format': {FORMAT!r}, a 'neurons' object, or layer numbers "
        f"as keys, found the keys {show(list(data))}"
    )


def _decode_own(data: dict[str, Any], given: dict[str, Any]) -> Circuit:
    if data.get("format") != FORMAT:
        raise CircuitError(f"'format' must be {FORMAT!r}, not {show(data.get('format'))}")
    version = data.get("version")
    if not is_int(version) or version != VERSION:
        raise CircuitError(
            f"'version' must be {VERSION}, not {show(version)}; a newer file needs a newer cna-vllm"
        )
    if unknown := sorted(key for key in data if key not in _KNOWN):
        raise CircuitError(f"unknown field {show(unknown[0])}; remove it")
    for name in _REQUIRED:
        if name not in data:
            raise CircuitError(f"the field {name!r} is missing")
    entries = data["neurons"]
    if not isinstance(entries, list):
        raise CircuitError(f"'neurons' must be a list of objects, not {show(entries)}")
    fields = {name: data[name] for name in (*_REQUIRED, *_OPTIONAL) if name in data}
    circuit = Circuit(**{**fields, "neurons": tuple(_own_neurons(entries))})
    claimed = data.get("digest", circuit.digest)
    if claimed != circuit.digest:
        raise CircuitError(
            f"'digest' is {show(claimed)} but the content has {circuit.digest!r}; the file was "
            "edited or damaged: remove the field to accept its content"
        )
    for name in ("architecture", "num_layers", "intermediate_size"):
        if given[name] is not None and given[name] != getattr(circuit, name):
            raise CircuitError(
                f"{name!r} is {getattr(circuit, name)!r} in the circuit of {circuit.model!r} but "
                f"{given[name]!r} in the model {given['model'] or 'it shall steer'!r}; "
                "discover it in that model"
            )
    return circuit


def _own_neurons(entries: list[Any]) -> Iterator[Neuron]:
    for position, entry in enumerate(entries):
        if not isinstance(entry, dict) or set(entry) != {"layer", "index", "delta"}:
            raise CircuitError(
                f"'neurons'[{position}] must be an object with 'layer', 'index' and 'delta', "
                f"not {show(entry)}"
            )
        yield Neuron(entry["layer"], entry["index"], entry["delta"])


def _decode_reference(entries: Any, given: dict[str, Any]) -> Circuit:
    """`{"L,P,N": value}`: the recorded position P has no meaning for a circuit.

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
    return _foreign([Neuron(*at, _delta(places)) for at, places in found.items()], given, notes)


def _delta(places: dict[int, float]) -> float:
    if -1 in places:
        return places[-1]
    return places[max(places, key=lambda position: (abs(places[position]), position))]


def _decode_plain(layers: dict[str, Any], given: dict[str, Any]) -> Circuit:
    neurons = []
    for key, indices in layers.items():
        if not isinstance(indices, list):
            raise CircuitError(f"layer {key}: expected a list of indices, not {show(indices)}")
        neurons += [Neuron(int(key), index) for index in indices]
    notes = ["read from a plain {layer: [indices]} file: no activation differences, deltas are 0"]
    return _foreign(neurons, given, notes)


def _foreign(neurons: list[Neuron], given: dict[str, Any], notes: list[str]) -> Circuit:
    if missing := [name for name in _MODEL_ARGUMENTS if given[name] is None]:
        raise CircuitError(
            f"does not say which model it is of; pass {', '.join(missing)}, "
            "or convert it once: cna-vllm inspect FILE --model MODEL --save OUT.json"
        )
    return Circuit(**given, neurons=tuple(neurons), notes=tuple(notes))


def _is_number(text: str) -> bool:
    digits = text.strip().removeprefix("-")
    return digits.isascii() and digits.isdigit() and len(digits) <= _MAX_INT_DIGITS


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise CircuitError(f"the key {show(key)} is there twice; remove one")
        result[key] = value
    return result


def _no_constant(name: str) -> Any:
    raise CircuitError(f"holds {name}, which is not JSON; every number must be finite")
