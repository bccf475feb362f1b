# SPDX-License-Identifier: Apache-2.0
"""What front ends and engine cores say of a request's fields alike."""

from __future__ import annotations

from typing import Any

from cna_vllm.serving.config import CnaConfig
from cna_vllm.steering.request import FIELD_RECORD, SteeringError

WITHOUT_CONFIG = (
    "this engine was started without circuits; start it with "
    "additional_config={'cna': {'circuits': {...}}}"
)


def check_recording_group(config: CnaConfig, group: Any) -> None:
    """Raises SteeringError unless the engine records, and ``group`` can name what it keeps."""
    if not config.record:
        raise SteeringError(
            FIELD_RECORD, "this engine does not record; start it with cna.record = true"
        )
    if not isinstance(group, str) or not 0 < len(group) <= 64:
        raise SteeringError(FIELD_RECORD, "must be a group name of 1 to 64 characters")
