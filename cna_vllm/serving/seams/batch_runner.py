# SPDX-License-Identifier: Apache-2.0
"""Seams of vLLM's batch runner, whose requests are lines of a file and come through no HTTP."""

from __future__ import annotations

import sys
from typing import Any

from cna_vllm.serving.front.metrics import count_refused
from cna_vllm.serving.seams.wrapping import Original, adding, wrap
from cna_vllm.steering.misplaced import XARGS, first_sign_in_text

_BODY = ("body", *XARGS)


def install() -> None:
    """The runner is there by then, or this is another process; it may be what Python runs."""
    for name in ("vllm.entrypoints.launchers.run_batch", "__main__"):
        module: Any = sys.modules.get(name)
        if hasattr(module, "BatchRequestInput") and hasattr(module, "run_request"):
            wrap(module.BatchRequestInput, "model_validate_json", _model_validate_json)
            wrap(module, "run_request", _run_request)


@adding
def _model_validate_json(original: Original, json_data: str, *args: Any, **kwargs: Any) -> Any:
    """A line's own text is seen here only: what it is read into drops what it does not know."""
    line = original(json_data, *args, **kwargs)
    line.cna_error = first_sign_in_text(json_data.encode("utf-8", "surrogatepass"), _BODY)
    return line


@adding
async def _run_request(original: Original, serve: Any, request: Any, *args: Any) -> Any:
    """A line that is refused has an error for its answer, and costs no other line."""
    from vllm.entrypoints.serve import create_error_response

    error = getattr(request, "cna_error", None)
    if error is None:
        return await original(serve, request, *args)
    count_refused(error)

    async def refuse(_body: Any) -> Any:
        return create_error_response(str(error), param=error.field)

    return await original(refuse, request, *args)
