# SPDX-License-Identifier: Apache-2.0
"""Adapters: steering under a model's name, for clients that can set nothing else."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from cna_vllm.steering.arms import parse_steering
from cna_vllm.steering.content import show
from cna_vllm.steering.request import FIELD_CIRCUIT, FIELD_PREFIX, CircuitRequest, SteeringError

LORA_KEY = "lora"


@dataclass(frozen=True)
class Adapter:
    """What a request gets that names this adapter as its model.

    fields: steering fields of a request, as a client would write them (``cna_circuit``, ...).
    lora: name of a LoRA adapter that the request gets too.
    """

    fields: Mapping[str, Any]
    lora: str | None = None

    @classmethod
    def from_dict(cls, value: Any) -> Adapter:
        """Reads ``{"circuit": ..., "multiplier": ..., "scope": ..., "lora": ...}``: request fields
        without their prefix. Raises SteeringError; the fields' values are checked at registration.
        """
        if not isinstance(value, Mapping):
            raise SteeringError("adapter", f"must be an object, not {show(value)}")
        fields = {k: v for k, v in value.items() if k != LORA_KEY and v is not None}
        for key in fields:
            if not isinstance(key, str) or key.startswith(FIELD_PREFIX):
                raise SteeringError("adapter", f"unknown key {show(key)}; write circuit, not cna_")
        lora = value.get(LORA_KEY)
        if lora is not None and not isinstance(lora, str):
            raise SteeringError(LORA_KEY, f"must be the name of a LoRA adapter, not {show(lora)}")
        prefixed = {FIELD_PREFIX + key: field for key, field in fields.items()}
        return cls(MappingProxyType(prefixed), lora)

    @classmethod
    def parse(cls, text: str, known: Collection[str] = ()) -> Adapter:
        """Reads ``CIRCUIT@M[+CIRCUIT@M...][:SCOPE]``. known: see ``parse_steering``.

        Raises SteeringError with the form.
        """
        try:
            pairs, scope = parse_steering(text, known)
        except SteeringError as error:
            raise SteeringError("adapter", error.problem) from error
        return cls(MappingProxyType(CircuitRequest(pairs, scope).to_extra_args()))

    def to_dict(self) -> dict[str, Any]:
        """What ``from_dict`` reads; JSON types only."""
        plain: dict[str, Any] = {
            k.removeprefix(FIELD_PREFIX): list(v) if isinstance(v, tuple) else v
            for k, v in self.fields.items()
        }
        return plain if self.lora is None else {**plain, LORA_KEY: self.lora}

    def circuits(self) -> tuple[str, ...]:
        """Names of the circuits it uses."""
        value = self.fields.get(FIELD_CIRCUIT, ())
        return (value,) if isinstance(value, str) else tuple(value)
