# SPDX-License-Identifier: Apache-2.0
"""Gate activations as Triton device functions, computed in float32 for every dtype.

No formula cancels, so that a result of 16 bits is that of float64 or its neighbour, and the latter
for a few gates in 63,488 (``tests/kernels/interpreter_worker.py`` has the numbers and goes through
every finite gate). Fused multiply-adds must be off. A GPU's exp2 is one instruction with a relative
error under 2**-22 (PTX's ex2.approx), its quotient one of 2**-22 (div.full): the tests put both
off by that, in all directions. bfloat16 and float32 results under 2e-37, where exp2 overflows, may
become 0, as in eager torch.
"""

import triton
import triton.language as tl


@triton.jit
def _erfcx_scaled(s):  # type: ignore[no-untyped-def]
    """(1 + 2 z) exp(z^2) erfc(z) for z in [0, 12] as a polynomial in s = (z - 3.75) / (z + 3.75).

    A Chebyshev fit to scipy.special.erfcx; relative error 1e-8.
    """
    coefficients: tl.constexpr = (
        0.002106858045966461,
        -0.010102245220457072,
        0.02805216776798619,
        -0.05865255247953776,
        0.09238012764520431,
        -0.10880217030941416,
        0.08226985831209283,
        0.0035851104733559958,
        -0.14024042352687582,
        1.2375126337733509,
    )
    p = s * 0.001027803981273972
    for i in tl.static_range(len(coefficients) - 1):
        p = (p + coefficients[i]) * s
    return p + coefficients[-1]


@triton.jit
def activate(gate, ACTIVATION: tl.constexpr):  # type: ignore[no-untyped-def]
    """act(gate) in the dtype of gate."""
    g = gate.to(tl.float32)
    if ACTIVATION == "silu":
        result = g / (1.0 + tl.exp2(-1.4426950408889634 * g))
    elif ACTIVATION == "gelu_tanh":
        # 0.5 (1 + tanh(u)) = 1 / (1 + 2**-v) with v = 2 u / ln 2
        v = 2.302208198144325 * (g + 0.044715 * (g * g * g))
        result = g / (1.0 + tl.exp2(-v))
    else:
        tl.static_assert(ACTIVATION == "gelu", "unknown activation")
        z = tl.minimum(tl.abs(g * 0.7071067811865476), 12.0)  # beyond, erfc is 0 in every dtype
        s = (z - 3.75) / (z + 3.75)
        tail = _erfcx_scaled(s) * tl.exp2(-1.4426950408889634 * (z * z)) / (1.0 + 2.0 * z)
        # erfc(-g / sqrt 2)
        result = 0.5 * g * tl.where(g < 0.0, tail, 2.0 - tail)
    return result.to(gate.dtype)
