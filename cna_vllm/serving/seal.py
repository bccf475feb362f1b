# SPDX-License-Identifier: Apache-2.0
"""The seal of admitted steering: by it an engine core knows what its deployment's admission wrote.

Admission and cores run in several processes, and an engine core takes requests from whoever
reaches its socket. The resolved form of a request's steering therefore carries an HMAC over its
content; the secret is made by the first process of a deployment and inherited by all it starts.
"""

from __future__ import annotations

import hmac
import json
import os
import secrets
from typing import Any

from cna_vllm.serving.config import SECRET_VARIABLE, CnaConfigError
from cna_vllm.steering.request import RESOLVED_FIELD, SEAL_KEY, SteeringError
from cna_vllm.steering.resolved import Steering

LEAST_SECRET = 16  # characters


def make_secret() -> None:
    """Gives this process, and those it will start, a secret where the operator gave none."""
    os.environ.setdefault(SECRET_VARIABLE, secrets.token_hex(32))


def deployment_secret() -> bytes:
    """The secret of this deployment. Raises CnaConfigError for one that can be guessed."""
    make_secret()
    secret = os.environ[SECRET_VARIABLE]
    if len(secret) < LEAST_SECRET:
        raise CnaConfigError(
            f"the environment variable {SECRET_VARIABLE} must have at least {LEAST_SECRET} "
            "characters; unset it where all processes run on one machine"
        )
    return secret.encode()


class Seal:
    """Seals steering, and tells what was sealed; about 5 microseconds each."""

    def __init__(self, secret: bytes) -> None:
        self._secret = secret

    def sealed(self, steering: Steering) -> dict[str, Any]:
        """The value of ``cna_resolved``, with its seal."""
        field = steering.to_field()
        return {**field, SEAL_KEY: self._mac(field)}

    def opened(self, field: Any) -> Steering:
        """The steering that a value of ``cna_resolved`` holds.

        Raises SteeringError where it is malformed or was not sealed with this secret.
        """
        steering = Steering.from_field(field)
        mac = field.get(SEAL_KEY)
        # From the parsed form: JSON and msgpack may have written its lists and numbers anew.
        wanted = self._mac(steering.to_field())
        if not isinstance(mac, str) or not hmac.compare_digest(mac.encode(), wanted.encode()):
            raise SteeringError(
                RESOLVED_FIELD,
                "is set by the server only, and this was not; remove it (where engines run on "
                f"several nodes, all need the same {SECRET_VARIABLE})",
            )
        return steering

    def _mac(self, field: dict[str, Any]) -> str:
        content = json.dumps(field).encode()  # `to_field` has one order of keys
        return hmac.digest(self._secret, content, "sha256").hex()
