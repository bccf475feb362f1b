# SPDX-License-Identifier: Apache-2.0
"""What one engine core accepts, whichever front end or client sends it; knows nothing of vLLM."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cna_vllm.serving.config import WITHOUT_CONFIG, CnaConfig
from cna_vllm.serving.seal import Seal, deployment_secret
from cna_vllm.steering.content import show
from cna_vllm.steering.request import (
    FIELD_CIRCUIT,
    FIELD_MULTIPLIER,
    FIELD_RECORD,
    FIELD_VECTOR,
    MAX_NAME_LENGTH,
    RESOLVED_FIELD,
    SteeringError,
)
from cna_vllm.steering.resolved import Steering, to_float32

SIGN = "cna"


class CoreAdmission:
    """Holds requests to what admission writes: names are resolved and limits were checked there,
    so a request with fields of ours and without its seal was never admitted.

    config: of the engine; None for one without circuits, which accepts no field of ours.
    """

    def __init__(self, config: CnaConfig | None) -> None:
        self._config = config
        self._seal = None if config is None else Seal(deployment_secret())

    def steering(self, extra_args: Mapping[str, Any] | None, *, resumable: bool) -> Steering | None:
        """What the request shall be steered by, or None for a plain one.

        Raises SteeringError for any other sign of steering; the request must not run then.
        """
        ours = [key for key in extra_args or () if isinstance(key, str) and SIGN in key.lower()]
        if not ours or extra_args is None:
            return None
        if self._config is None or self._seal is None:
            raise SteeringError(_field(ours[0]), WITHOUT_CONFIG)
        for key in ours:
            if key not in (RESOLVED_FIELD, FIELD_RECORD):
                raise SteeringError(
                    _field(key),
                    "this request was not admitted: its front end knows no circuits; send it to "
                    "the Python API server of this deployment",
                )
        if resumable:
            raise SteeringError(ours[0], "streaming inputs cannot be steered or recorded")
        if FIELD_RECORD in extra_args:
            self._config.check_recording_group(extra_args[FIELD_RECORD])
        if RESOLVED_FIELD not in extra_args:
            return None
        steering = self._seal.opened(extra_args[RESOLVED_FIELD])
        self._check_limits(self._config, steering)
        return steering

    def _check_limits(self, config: CnaConfig, steering: Steering) -> None:
        """Nodes of one deployment may be configured differently; a worker could only fail."""
        limit = to_float32(config.max_multiplier)
        for field, pairs, most in (
            (FIELD_CIRCUIT, steering.pairs, config.max_circuits_per_request),
            (FIELD_VECTOR, steering.vectors, config.max_vectors_per_request),
        ):
            if len(pairs) > most:
                raise SteeringError(field, f"{len(pairs)} on one request; this engine takes {most}")
            for _, number in pairs:
                if abs(number) > limit:
                    raise SteeringError(
                        FIELD_MULTIPLIER, f"{show(number)} is over this engine's limit of {limit:g}"
                    )


def _field(key: str) -> str:
    """A key that any client may have written, fit for a message and a log."""
    return key if key.isidentifier() and len(key) <= MAX_NAME_LENGTH else show(key)
