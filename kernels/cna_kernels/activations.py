# SPDX-License-Identifier: Apache-2.0
"""Eager gate activations by name.

To add one: an entry in ``EAGER``, and a branch of ``_activate`` in
``act_and_mul_scaled.py``.
"""

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


def eager_activation(name: str) -> Callable[[Tensor], Tensor]:
    """``EAGER[name]``; raises ValueError for an unknown name."""
    try:
        return EAGER[name]
    except KeyError:
        raise ValueError(f"activation must be one of {sorted(EAGER)}, got {name!r}") from None
