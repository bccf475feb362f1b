# SPDX-License-Identifier: Apache-2.0
"""Admission: a request's steering fields become content digests, or the request is refused."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from functools import partial
from typing import Any

from cna_vllm.serving.config import WITHOUT_CONFIG, CnaConfig
from cna_vllm.serving.front.adapter import Adapter
from cna_vllm.serving.front.registry import Registry
from cna_vllm.serving.seal import Seal, deployment_secret
from cna_vllm.steering.circuit import shared_neurons
from cna_vllm.steering.misplaced import first_sign, holds_letters
from cna_vllm.steering.request import (
    CIRCUITS,
    FIELD_CIRCUIT,
    FIELD_PREFIX,
    FIELD_RECORD,
    RESOLVED_FIELD,
    SEAL_KEY,
    CircuitRequest,
    SteeringError,
)
from cna_vllm.steering.resolved import resolve

logger = logging.getLogger("vllm.cna")


def has_fields(extra_args: Mapping[str, Any] | None) -> bool:
    """Whether a request carries any of our fields, known or not, in any spelling."""
    return any(isinstance(k, str) and holds_letters(k) for k in extra_args or ())


def asks_for_steering(extra_args: Mapping[str, Any] | None) -> bool:
    """Whether a request carries any of our fields, or what looks like one: then it is admitted."""
    return bool(extra_args) and (has_fields(extra_args) or first_sign(extra_args, ()) is not None)


def is_sealed(resolved: Any) -> bool:
    """Whether a resolved form carries a seal; only ``Seal.opened`` tells whether it is ours."""
    return isinstance(resolved, Mapping) and SEAL_KEY in resolved


def admit_or_refuse(
    gate: Admission | None, extra_args: Mapping[str, Any], *, resumable: bool = False
) -> dict[str, Any] | None:
    """``gate.admit``; for engines started without a ``cna`` key, SteeringError for any field. What
    only looks like one may be another plugin's there."""
    if gate is not None:
        return gate.admit(extra_args, resumable=resumable)
    if has_fields(extra_args):
        raise SteeringError(FIELD_CIRCUIT, WITHOUT_CONFIG)
    return dict(extra_args)


class Admission:
    """Validates steering fields against one engine's configuration and registry.

    Raises SteeringError when a registered adapter could not be admitted.
    """

    def __init__(self, config: CnaConfig, registry: Registry) -> None:
        self.config = config
        self.registry = registry
        self._seal = Seal(deployment_secret())
        for name, adapter in registry.names().adapters.items():
            self.admit(adapter.fields)
            self.warn_shared(name, adapter)

    def warn_shared(self, name: str, adapter: Adapter) -> None:
        """Logs a warning where an adapter's circuits share neurons, which get the product of the
        multipliers: seldom what was meant."""
        named = CIRCUITS.pairs(adapter.fields)
        circuits = self.registry.names().circuits
        together = [one for one, multiplier in named if multiplier != 1]
        shared = shared_neurons(circuits[one] for one in together if one in circuits)
        if shared:
            logger.warning(
                "cna adapter=%r: %d neurons are in more than one of its circuits (%s) and get the "
                "product of the multipliers",
                name,
                shared,
                ", ".join(together),
            )

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
        if not resumable and self._admitted_before(extra_args):
            return dict(extra_args)
        if (sign := first_sign(extra_args, ())) is not None:
            raise sign
        others = {k: v for k, v in extra_args.items() if not str(k).startswith(FIELD_PREFIX)}
        ours = {k: v for k, v in extra_args.items() if str(k).startswith(FIELD_PREFIX)}
        if resumable:
            raise SteeringError(
                FIELD_CIRCUIT,
                "streaming inputs cannot be steered or recorded, since their prompt "
                "length changes; send the whole prompt at once",
            )
        if FIELD_RECORD in ours:
            group = ours.pop(FIELD_RECORD)
            self.config.check_recording_group(group)
            if ours:
                raise SteeringError(
                    FIELD_RECORD,
                    f"a recorded request cannot be steered; drop {', '.join(sorted(ours))}",
                )
            return {**others, FIELD_RECORD: group}
        request = CircuitRequest.from_extra_args(
            ours,
            max_multiplier=self.config.max_multiplier,
            max_circuits=self.config.max_circuits_per_request,
            max_vectors=self.config.max_vectors_per_request,
        )
        if request is not None:
            digest = self.registry.digest
            vector = partial(digest, "vector") if self.config.max_vectors else None
            steering = resolve(request, partial(digest, "circuit"), vector)
            if steering is not None:
                others[RESOLVED_FIELD] = self._seal.sealed(steering)
        return others

    def _admitted_before(self, extra_args: Mapping[str, Any]) -> bool:
        """Whether all our fields are what admission writes, as when the server chose the model."""
        ours = {str(k) for k in extra_args if str(k).startswith(FIELD_PREFIX)}
        if not ours <= {RESOLVED_FIELD, FIELD_RECORD}:
            return False
        if not is_sealed(extra_args.get(RESOLVED_FIELD)):
            return False
        self._seal.opened(extra_args[RESOLVED_FIELD])
        if FIELD_RECORD in ours:
            self.config.check_recording_group(extra_args[FIELD_RECORD])
        return True
