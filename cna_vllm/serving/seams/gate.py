# SPDX-License-Identifier: Apache-2.0
"""Where a front end's admission gate is held: by vLLM's input processor, which all that can reach
it call by one name."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cna_vllm.serving.front.admission import Admission


def gate_of(holder: Any) -> Admission | None:
    """The gate behind an engine, an engine's client or the served models; None for a plain one."""
    processor = getattr(holder, "input_processor", None)
    gate: Admission | None = getattr(processor, "cna_admission", None)
    return gate
