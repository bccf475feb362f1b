# SPDX-License-Identifier: Apache-2.0
"""How a seam is put in place."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

Original = Callable[..., Any]
Make = Callable[[Original], Original]
Wrap = Callable[[Any, str, Make], None]


def wrap(owner: Any, name: str, make: Make) -> None:
    """Replaces ``owner.name`` by ``make(original)``, once per process.

    Raises AttributeError when vLLM no longer has the name: a seam must not vanish silently.
    """
    original = getattr(owner, name)
    if getattr(original, "__cna_seam__", False):
        return
    wrapper: Any = functools.wraps(original)(make(original))
    wrapper.__cna_seam__ = True
    if isinstance(inspect.getattr_static(owner, name), staticmethod | classmethod):
        # A class method's original knows its class already.
        wrapper = staticmethod(wrapper)
    setattr(owner, name, wrapper)


def probe(owner: Any, name: str, make: Make) -> None:
    """Changes nothing. Raises AttributeError where ``wrap`` would."""
    getattr(owner, name)


def adding(add: Original) -> Make:
    """The ``make`` of a wrapper that calls ``add`` with the original before its own arguments."""

    def make(original: Original) -> Original:
        return lambda *args, **kwargs: add(original, *args, **kwargs)

    return make
