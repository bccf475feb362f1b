# SPDX-License-Identifier: Apache-2.0
"""Admission: a request's steering fields become content digests, or the request is refused."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from cna_vllm.circuit import show
from cna_vllm.misplaced import first_sign, holds_letters
from cna_vllm.request import (
    FIELD_CIRCUIT,
    FIELD_PREFIX,
    FIELD_RECORD,
    RESOLVED_FIELD,
    CircuitRequest,
    SteeringError,
    resolve,
)
from cna_vllm.serving.config import CnaConfig, CnaConfigError
from cna_vllm.serving.registry import CircuitRegistry
from cna_vllm.serving.vector_registry import VectorRegistry


def has_fields(extra_args: Mapping[str, Any] | None) -> bool:
    """Whether a request carries any of our fields, known or not, in any spelling."""
    return any(isinstance(k, str) and holds_letters(k) for k in extra_args or ())


def asks_for_steering(extra_args: Mapping[str, Any] | None) -> bool:
    """Whether a request carries any of our fields, or what looks like one: then it is admitted."""
    return bool(extra_args) and (has_fields(extra_args) or first_sign(extra_args, ()) is not None)


def refuse_without_config(extra_args: Mapping[str, Any] | None) -> None:
    """For engines started without a ``cna`` key: raises SteeringError if steering is asked for.
    What only looks like a field may be another plugin's there."""
    if has_fields(extra_args):
        raise SteeringError(
            FIELD_CIRCUIT,
            "this engine was started without circuits; start it with "
            "additional_config={'cna': {'circuits': {...}}}",
        )


class AdmittedSteering(dict[str, Any]):
    """The resolved form of a request's steering. Only admission makes one: what a client sends is
    never of this type."""


def is_forged(extra_args: Mapping[str, Any]) -> bool:
    """Whether a resolved form is there that admission did not make."""
    resolved = extra_args.get(RESOLVED_FIELD)
    return resolved is not None and not isinstance(resolved, AdmittedSteering)


def admit_or_refuse(
    gate: Admission | None, extra_args: Mapping[str, Any], *, resumable: bool = False
) -> dict[str, Any] | None:
    """``gate.admit``; for engines started without a ``cna`` key, SteeringError for any field."""
    if gate is None:
        refuse_without_config(extra_args)
        return dict(extra_args)
    return gate.admit(extra_args, resumable=resumable)


class Admission:
    """Validates steering fields against one engine's configuration and registry.

    Raises SteeringError when a registered adapter could not be admitted, and CnaConfigError when
    one name stands for two things.
    """

    def __init__(
        self,
        config: CnaConfig,
        registry: CircuitRegistry,
        vectors: VectorRegistry | None = None,
    ) -> None:
        """vectors: None for an engine that adds none; requests for them are refused then."""
        self.config = config
        self.registry = registry
        self.vectors = vectors
        for name in () if vectors is None else vectors.vectors():
            self.check_free(name, "vector")
        for adapter in registry.names().adapters.values():
            self.admit(adapter.fields)

    def check_free(self, name: str, kind: Literal["circuit", "adapter", "vector"]) -> None:
        """Raises CnaConfigError if ``name`` may not stand for a ``kind``; one that stands for
        another of that kind is free."""
        if kind == "vector":
            names = self.registry.names()
            if name in names.circuits or name in names.adapters:
                raise CnaConfigError(
                    f"the name {show(name)} is that of a circuit or adapter; choose another"
                )
            return
        self.registry.check_free(name, adapter=kind == "adapter")
        if self.vectors is not None and name in self.vectors.vectors():
            raise CnaConfigError(f"the name {show(name)} is that of a vector; choose another")

    def names_by_digest(self) -> dict[str, str]:
        """Content digest -> a name that stands for it now, of circuits and vectors."""
        names = {circuit.digest: name for name, circuit in self.registry.circuits().items()}
        if self.vectors is not None:
            names |= {vectors.digest: name for name, vectors in self.vectors.vectors().items()}
        return names

    def admit(
        self, extra_args: Mapping[str, Any] | None, *, resumable: bool = False
    ) -> dict[str, Any] | None:
        """The extra_args that the engine shall see: ours replaced by the resolved form.

        The resolved form names circuits and vectors by content digest, computed here and never
        taken from a client, so that it can key the prefix cache. Raises SteeringError, naming the
        field.
        """
        if extra_args is None or not asks_for_steering(extra_args):
            return None if extra_args is None else dict(extra_args)
        if isinstance(extra_args.get(RESOLVED_FIELD), AdmittedSteering) and not resumable:
            return dict(extra_args)  # admitted before, when the server chose the model
        if (sign := first_sign(extra_args, ())) is not None:
            raise sign
        others = {k: v for k, v in extra_args.items() if not str(k).startswith(FIELD_PREFIX)}
        ours = {k: v for k, v in extra_args.items() if str(k).startswith(FIELD_PREFIX)}
        recorded = FIELD_RECORD in ours
        group = ours.pop(FIELD_RECORD, None)
        if resumable:
            raise SteeringError(
                FIELD_CIRCUIT,
                "streaming inputs cannot be steered or recorded, since their prompt "
                "length changes; send the whole prompt at once",
            )
        if recorded:
            others[FIELD_RECORD] = self._recording_group(group, ours)
            return others
        request = CircuitRequest.from_extra_args(
            ours,
            max_multiplier=self.config.max_multiplier,
            max_circuits=self.config.max_circuits_per_request,
            max_vectors=self.config.max_vectors_per_request,
        )
        if request is not None:
            vector_digest = None if self.vectors is None else self.vectors.digest
            steering = resolve(request, self.registry.digest, vector_digest)
            if steering is not None:
                others[RESOLVED_FIELD] = AdmittedSteering(steering.to_field())
        return others

    def _recording_group(self, group: Any, other_fields: Mapping[str, Any]) -> str:
        if not self.config.record:
            raise SteeringError(
                FIELD_RECORD, "this engine does not record; start it with cna.record = true"
            )
        if not isinstance(group, str) or not 0 < len(group) <= 64:
            raise SteeringError(FIELD_RECORD, "must be a group name of 1 to 64 characters")
        if other_fields:
            raise SteeringError(
                FIELD_RECORD,
                f"a recorded request cannot be steered; drop {', '.join(sorted(other_fields))}",
            )
        return group
