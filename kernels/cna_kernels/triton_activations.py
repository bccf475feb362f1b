# SPDX-License-Identifier: Apache-2.0
"""Gate activations as Triton device functions: every 16-bit result is the correctly rounded one.

* float32 is computed in float64, so that only GELU's fit to erfc misses one result in 40,000, by a
  neighbour. It is the dtype of exactness checks; GPUs of the data centre have half the rate in
  float64, others a thirty-second or less.
* bfloat16 is computed in float32. No formula cancels, and no finite gate rounds to a neighbour,
  except where exp2 overflows and the result, under 2e-37, becomes 0, as in eager torch.
* float16 is computed in float32 for SiLU, with exp and the quotient carried to about 2**-29 in a
  second float32, and in float64 for the two GELUs, which no common model has in float16.

Only IEEE operations enter, and exp2, for bfloat16 and in float64; fused multiply-adds must be off.
The exp2 of a GPU is not the nearest: in float32 it is one instruction with a relative error under
2**-22 (PTX's ex2.approx), in float64 a polynomial of some 2**-52. The tests go through every
finite 16-bit gate with exp2 off by 2**-21 and 2**-51, both ways.
"""

import triton
import triton.language as tl


@triton.jit
def _polynomial(x, coefficients):  # type: ignore[no-untyped-def]
    """Horner's scheme in the dtype of x; the highest power's coefficient comes first."""
    p = coefficients[0] * x + coefficients[1]
    for i in tl.static_range(2, len(coefficients)):
        p = p * x + coefficients[i]
    return p


@triton.jit
def _erfcx_scaled(s):  # type: ignore[no-untyped-def]
    """(1 + 2 z) exp(z^2) erfc(z) for z in [0, 12] as a polynomial in s = (z - 3.75) / (z + 3.75).

    Chebyshev fits to scipy.special.erfcx; relative error 4e-12 in float64, 1e-8 in float32.
    """
    if s.dtype == tl.float64:
        p = _polynomial(
            s,
            (
                2.0935393052815844e-06,
                3.968053179913814e-05,
                5.084216053113554e-05,
                -0.0003040204486197891,
                0.0002884361701677447,
                0.0017595507944019404,
                -0.009744200498383173,
                0.028361809544467535,
                -0.058693817573277456,
                0.09230434121317468,
                -0.10880389771588839,
                0.0822767384449432,
                0.003585414562508951,
                -0.14024059858970628,
                1.2375126308421271,
            ),
        )
    else:
        p = _polynomial(
            s,
            (
                0.001027803981273972,
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
            ),
        )
    return p


@triton.jit
def _quotient(a, b):  # type: ignore[no-untyped-def]
    """a / b, rounded to nearest: the plain division of float32 is not."""
    return tl.div_rn(a, b) if a.dtype == tl.float32 else a / b


@triton.jit
def _plain(g, ACTIVATION: tl.constexpr):  # type: ignore[no-untyped-def]
    """act(g) in the dtype of g, float32 or float64, without cancellation."""
    if ACTIVATION == "silu":
        result = _quotient(g, 1.0 + tl.exp2(-1.4426950408889634 * g))
        if g.dtype == tl.float32:
            # Two terms of the series, off by g^3 / 24. The results at -2**-8 and 2**-7 lie 2**-28.6
            # and 2**-25.6 from ties of bfloat16, closer than exp2 is exact. These terms give the
            # ties themselves, and rounded to even they are right.
            half = 0.5 * g
            result = tl.where(tl.abs(g) < 0.015625, half * (1.0 + half), result)
    elif ACTIVATION == "gelu_tanh":
        # 0.5 (1 + tanh(u)) = 1 / (1 + 2**-v) with v = 2 u / ln 2
        v = 2.302208198144325 * (g + 0.044715 * (g * g * g))
        # 2**-v overflows float32 from gate = -10.1 on: both sides divided by 2**16, exactly.
        far = v < -64.0
        scale = tl.where(far, 1.52587890625e-05, 1.0)
        power = tl.exp2(tl.where(far, -16.0 - v, -v))
        result = _quotient(g * scale, scale + power)
    else:
        tl.static_assert(ACTIVATION == "gelu", "unknown activation")
        z = tl.abs(g * 0.7071067811865476)
        z = tl.where(z > 12.0, 12.0, z)  # beyond, erfc is 0 in every dtype
        s = _quotient(z - 3.75, z + 3.75)
        tail = _quotient(_erfcx_scaled(s) * tl.exp2(-1.4426950408889634 * (z * z)), 1.0 + 2.0 * z)
        tail = tl.where(z == 12.0, 0.0, tail)
        # erfc(-g / sqrt 2); eager torch has NaN at -inf too
        result = 0.5 * g * tl.where(g < 0.0, tail, 2.0 - tail)
    return result


@triton.jit
def _two_sum(a, b):  # type: ignore[no-untyped-def]
    """(s, e) with s = round(a + b) and s + e = a + b (Knuth)."""
    s = a + b
    bb = s - a
    return s, (a - (s - bb)) + (b - bb)


@triton.jit
def _two_product(a, b):  # type: ignore[no-untyped-def]
    """(p, e) with p = round(a b) and p + e = a b (Dekker), without a fused multiply-add."""
    p = a * b
    t = 4097.0 * a
    a_high = t - (t - a)
    t = 4097.0 * b
    b_high = t - (t - b)
    a_low = a - a_high
    b_low = b - b_high
    e = ((a_high * b_high - p) + a_high * b_low + a_low * b_high) + a_low * b_low
    return p, e


@triton.jit
def _silu_float16(g):  # type: ignore[no-untyped-def]
    """silu of float32 values that are float16 numbers, rounded once to float16."""
    x = tl.where(g < -30.0, 30.0, tl.where(g > 30.0, -30.0, -g))
    # x = n ln 2 + r: n * high and the difference are exact, for x has 11 significant bits.
    n = tl.floor(x * 1.4426950408889634 + 0.5)
    r = x - n * 0.693145751953125
    r_low = n * -1.428606765330187e-06
    # exp(r) = 1 + r + r^2 / 2 + ...: r = a + b splits the square into exact products.
    a = (r + 98304.0) - 98304.0
    b = r - a
    s, e1 = _two_sum(tl.full(g.shape, 1.0, tl.float32), r)
    s, e2 = _two_sum(s, 0.5 * a * a)
    s, e3 = _two_sum(s, a * b)
    series = _polynomial(r, (1 / 5040, 1 / 720, 1 / 120, 1 / 24, 1 / 6))
    low = (e1 + e2 + e3) + (0.5 * b * b + r * r * r * series + r_low * (1.0 + r))
    s, low = _two_sum(s, low)
    power = ((n.to(tl.int32) + 127) << 23).to(tl.float32, bitcast=True)
    d, d_low = _two_sum(tl.full(g.shape, 1.0, tl.float32), s * power)
    d_low += low * power
    q = tl.div_rn(g, d)
    p, p_low = _two_product(q, d)
    q_low = tl.div_rn(((g - p) - p_low) - q * d_low, d)
    # Rounding q + q_low once: only where q lies half way between two float16 numbers does q_low
    # decide, and then the other neighbour is as far from q as the one that q rounds to.
    near = q.to(tl.float16).to(tl.float32)
    half = q - near
    other = near + 2.0 * half
    tie = (other.to(tl.float16).to(tl.float32) == other) & (half != 0.0)
    result = tl.where(tie & (q_low * half > 0.0), other, near)
    return tl.where(g > 30.0, g, tl.where(g < -30.0, g * 0.0, result))


@triton.jit
def activate(gate, ACTIVATION: tl.constexpr):  # type: ignore[no-untyped-def]
    """act(gate), correctly rounded to the dtype of gate."""
    if gate.dtype == tl.bfloat16:
        result = _plain(gate.to(tl.float32), ACTIVATION)
    elif gate.dtype == tl.float16 and ACTIVATION == "silu":
        result = _silu_float16(gate.to(tl.float32))
    else:
        result = _plain(gate.to(tl.float64), ACTIVATION)
    return result.to(gate.dtype)
