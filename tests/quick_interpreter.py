# SPDX-License-Identifier: Apache-2.0
"""Triton's interpreter without what takes almost half of its time here and changes no result.

It looks for an overflow after every sum and product of integers, and patches the whole of
triton.language again at every call of a jitted function from another one, where only functions
that name `triton.language.core` need that.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from tests.processes import SPAWN


def quicken() -> None:
    """For the life of this process, unless tests do without tricks. TRITON_INTERPRET must have been
    set before Triton's import."""
    if SPAWN:
        return
    from triton import language
    from triton.runtime import interpreter

    builder = interpreter.interpreter_builder
    builder.options = replace(builder.options, sanitize_overflow=False)
    call_patched = interpreter.InterpretedFunction.__call__

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        if any(value is language.core for value in self.fn.__globals__.values()):
            return call_patched(self, *args, **kwargs)
        return self.rewrite()(*args, **kwargs)

    interpreter.InterpretedFunction.__call__ = call
