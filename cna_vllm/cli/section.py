# SPDX-License-Identifier: Apache-2.0
"""Our section of `additional_config`, from all places where it may be written.

Nothing is dropped: what two places say is merged, and what contradicts is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cna_vllm.cli.usage import UsageError
from cna_vllm.serving.config import CONFIG_KEY, CnaConfig
from cna_vllm.serving.front.adapter import Adapter
from cna_vllm.steering.circuit import Circuit, CircuitError
from cna_vllm.steering.content import show
from cna_vllm.steering.request import DEFAULT_SCOPE

Section = Mapping[str, Any]
_NAMED = ("circuits", "vectors", "adapters")


def section_of(additional_config: Any) -> dict[str, Any]:
    """What `additional_config` says of ours; empty where it says nothing. Raises UsageError for
    another shape, and for nothing else: limits may be set elsewhere."""
    if not isinstance(additional_config, Mapping) or CONFIG_KEY not in additional_config:
        return {}
    section = additional_config[CONFIG_KEY]
    if not isinstance(section, Mapping):
        raise UsageError(f"additional_config: {CONFIG_KEY} must be an object, not {show(section)}")
    for key in _NAMED:
        if not isinstance(section.get(key, {}), Mapping):
            raise UsageError(f"additional_config: cna.{key} must be an object")
    return dict(section)


def with_section(additional_config: Any, section: Section) -> dict[str, Any]:
    """`additional_config` with this section in it; raises CnaConfigError if no engine takes it."""
    config = {**(additional_config or {}), CONFIG_KEY: dict(section)}
    CnaConfig.from_additional_config(config)
    return config


def merge(first: Section, second: Section, where: str = "additional_config") -> dict[str, Any]:
    """Everything that both say; messages call the first one `where`.

    Raises:
        UsageError: one name has two contents, or one setting two values.
        CircuitError, VectorError: a file that has to be looked at for that cannot be read.
    """
    merged = {**first, **second}
    for key in first.keys() & second.keys():
        if key in _NAMED:
            merged[key] = {**first[key], **second[key]}
            for name in first[key].keys() & second[key].keys():
                if not _same(key, first[key][name], second[key][name]):
                    raise UsageError(
                        f"{key.removesuffix('s')} {show(name)}: {where} says "
                        f"{show(first[key][name])}, and {show(second[key][name])} is given too; "
                        "drop one, or give it another name"
                    )
        elif first[key] != second[key]:
            raise UsageError(
                f"{key}: {where} says {show(first[key])}, and {show(second[key])} is given too; "
                "drop one of the two"
            )
    return merged


def loaded(section: Section) -> str:
    """One line: which circuits, adapters and vectors an engine starts with, and where from."""
    parts = [
        f"{key} {', '.join(f'{name} ({path})' for name, path in section[key].items())}"
        for key in ("circuits", "vectors")
        if section.get(key)
    ]
    if adapters := section.get("adapters"):
        shown = [f"{name} = {describe(adapter)}" for name, adapter in adapters.items()]
        parts.append(f"adapters {', '.join(shown)}")
    for key, what in (("circuit_dir", "loads from"), ("registry_dir", "registry")):
        if section.get(key):
            parts.append(f"{what} {section[key]}")
    return "; ".join(parts) or "no circuits"


def describe(adapter: Mapping[str, Any]) -> str:
    """An adapter's object in its short form."""
    pairs = []
    for names, numbers in (("circuit", "multiplier"), ("vector", "coefficient")):
        both = zip(_list(adapter.get(names)), _list(adapter.get(numbers)), strict=False)
        pairs += [f"{name}@{number}" for name, number in both]
    text = "+".join(pairs)
    text += f":{adapter['scope']}" if adapter.get("scope", DEFAULT_SCOPE) != DEFAULT_SCOPE else ""
    return f"{text} with LoRA {adapter['lora']}" if adapter.get("lora") else text


def _list(value: Any) -> list[Any]:
    values = value if isinstance(value, list | tuple) else [value]
    return [one for one in values if one is not None]


def _same(key: str, first: Any, second: Any) -> bool:
    if first == second:
        return True
    if key == "adapters":
        return _canonical(first) == _canonical(second)
    return _digest(key, first) == _digest(key, second)


def _digest(key: str, path: str) -> str:
    if key == "vectors":
        from cna_vllm.steering.vectors import VectorSet

        return VectorSet.load(path).digest
    try:
        return Circuit.load(path).digest
    except CircuitError:
        with open(path, "rb") as file:  # of a form that names no model: then byte by byte
            return file.read().hex()


def _canonical(adapter: Any) -> Any:
    """With lists for single values, and the default scope filled in."""
    value = {"scope": DEFAULT_SCOPE, **Adapter.from_dict(adapter).to_dict()}
    return {key: _list(entry) for key, entry in value.items()}
