# SPDX-License-Identifier: Apache-2.0
"""Eager gate activations by name.

To add one: entries in ``EAGER`` and ``ACCURATE``, and a branch of ``_plain`` in
``triton_activations.py``.
"""

import math
from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor

DTYPES: Final = (torch.float32, torch.bfloat16, torch.float16)

EAGER: Final[Mapping[str, Callable[[Tensor], Tensor]]] = MappingProxyType(
    {
        "silu": F.silu,
        "gelu_tanh": partial(F.gelu, approximate="tanh"),
        "gelu": F.gelu,
    }
)
"""Computed in float32 and rounded once to the dtype of the argument."""


def _gelu_tanh(x: Tensor) -> Tensor:
    return x * torch.sigmoid(2 * math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))


def _gelu(x: Tensor) -> Tensor:
    return 0.5 * x * torch.special.erfc(-x / math.sqrt(2))


ACCURATE: Final[Mapping[str, Callable[[Tensor], Tensor]]] = MappingProxyType(
    {"silu": lambda x: x * torch.sigmoid(x), "gelu_tanh": _gelu_tanh, "gelu": _gelu}
)
"""The same functions of float64 arguments, in forms that do not cancel."""


def eager_activation(name: str) -> Callable[[Tensor], Tensor]:
    """``EAGER[name]``; raises ValueError for an unknown name."""
    try:
        return EAGER[name]
    except KeyError:
        raise ValueError(f"activation must be one of {sorted(EAGER)}, got {name!r}") from None
