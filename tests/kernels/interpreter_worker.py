# SPDX-License-Identifier: Apache-2.0
"""Cases of the Triton kernel under Triton's interpreter, run in a process of their own.

TRITON_INTERPRET must be set before triton is imported and then holds for the process, so
test_interpreter.py starts this script once and reports the cases it prints as JSON one by one.
"""

import json
import sys
from functools import partial, partialmethod
from itertools import product
from typing import Any, Final, NamedTuple

import numpy as np
import torch
from torch import Tensor

from cna_kernels import (
    CARRYING_DTYPES,
    DTYPES,
    EAGER,
    act_and_mul_scaled,
    add_vectors,
    add_vectors_reference,
    mark_overflow,
    mark_overflow_reference,
    scale_reference,
    scale_rows,
    scale_rows_reference,
    steer_gate_up,
    steer_gate_up_reference,
)
from cna_kernels.act_and_mul_scaled import INTERPRETED
from cna_kernels.activations import ACCURATE
from tests.kernels.cases import (
    ROUTINGS,
    WIDTHS,
    bits,
    inside_circuits,
    make_ahead,
    make_hidden,
    make_tables,
    make_vectors,
    make_x,
    overflow_case,
    same,
)
from tests.quick_interpreter import quicken

ROWS: Final = 5


class Case(NamedTuple):
    dtype: torch.dtype
    activation: str
    width: int
    routing: str

    @property
    def name(self) -> str:
        return f"{self.dtype}-{self.activation}-{self.width}-{self.routing}"


CASES: Final = [
    case
    for case in (Case(*values) for values in product(DTYPES, sorted(EAGER), WIDTHS, ROUTINGS))
    # How rows are steered does not depend on the activation: where wide, one has all routings.
    if case.width < 4864 or case.activation == "silu" or case.routing in ("none", "skewed")
]

VECTOR_CASES: Final = list(product(DTYPES, (1536, 7, 1000), ROUTINGS))

AHEAD_CASES: Final = [
    (dtype, activation, width, routing)
    for dtype, activation, width, routing in product(
        CARRYING_DTYPES, sorted(EAGER), (1536, 7, 1000), ROUTINGS
    )
    if activation == "silu" or (width, routing) == (1000, "skewed")
]

OVERFLOW_CASES: Final = list(product(DTYPES, (64, 7, 2050), range(3)))

ERROR: Final = 2.0**-22
"""Relative, of what a GPU computes in one instruction or nearly: exp2 (ex2.approx) and the quotient
(div.full)."""

EVERY_GATE: Final = list(
    product((torch.float16, torch.bfloat16), sorted(EAGER), product((0, 1, -1), (0, 1, -1)))
)
"""dtype, activation, and the signs of the errors of exp2 and of quotients. Results are monotone in
both, so that what holds at the ends holds for any error between."""

TINY: Final = 2e-37
"""Results under this may vanish: there exp2 overflows."""

OFF: Final = {
    (torch.float16, "silu"): (3, 19),
    (torch.float16, "gelu_tanh"): (3, 24),
    (torch.float16, "gelu"): (7, 18),
    (torch.bfloat16, "silu"): (0, 2),
    (torch.bfloat16, "gelu_tanh"): (0, 0),
    (torch.bfloat16, "gelu"): (0, 0),
}
"""How many finite gates (63,488 of float16, 65,280 of bfloat16) give a neighbour of the nearest
result, at most: with exact exp2 and quotients, and with errors in any direction."""


def ulp(value: Tensor) -> Tensor:
    """Distance from |value| to the next number of its dtype, in float64."""
    next_up = (bits(value.abs()) + 1).view(value.dtype)
    return next_up.double() - value.abs().double()


def accurate(gate: Tensor, activation: str) -> Tensor:
    """act(gate) in float64, rounded once to the dtype of gate: torch itself goes over float32."""
    act = ACCURATE[activation](gate.double())
    if gate.dtype == torch.float16:
        return torch.from_numpy(act.numpy().astype(np.float16))
    return act.to(gate.dtype)


def check_unsteered(case: Case) -> None:
    """Near the reference: activation rounded, product rounded. In 16 bits the activation is off by
    one unit in the last place at most, the product then by two; in float32 by what the argument of
    exp is rounded by, up to four units for each power of e by which it is under the gate.
    """
    x = make_x(case.width, ROWS, case.dtype)
    out = act_and_mul_scaled(x, *make_tables(case.width, "none", ROWS), case.activation)
    gate, up = x.chunk(2, 1)
    expected = accurate(gate, case.activation) * up
    act = ACCURATE[case.activation](gate.double())
    error = (out.double() - expected.double()).abs() / ulp(expected)
    error = error.where(act.abs() >= TINY, 0)
    most = torch.full_like(error, 2)
    if case.dtype == torch.float32:
        most = 4 + 4 * (gate.double() / act).abs().clamp(1).log()
    assert bool((error <= most).all()), f"{float((error - most).max())} units over what is allowed"
    assert bool((out.abs() <= 2 * TINY * up.abs()).where(act.abs() < TINY, True).all())


def exp2(x: Any, sign: int) -> Any:
    """2**x as a GPU has it: off by ERROR, and without subnormal results."""
    power = np.exp2(x.astype(np.float64)) * (1 + sign * ERROR)
    return np.where(power < np.finfo(np.float32).tiny, 0, power).astype(x.dtype)


def quotient(a: Any, b: Any, sign: int) -> Any:
    """a / b as a GPU has it: off by ERROR, but exact by powers of two."""
    exact = np.frexp(b)[0] == 0.5
    return (a.astype(np.float64) / b * np.where(exact, 1, 1 + sign * ERROR)).astype(a.dtype)


def check_every_gate(dtype: torch.dtype, activation: str, most: int) -> None:
    """Each finite 16-bit gate, with up = 1: the nearest result; for ``most`` gates a neighbour."""
    gate = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    gate = gate.where(gate.isfinite(), 0).view(-1, 1024)
    x = torch.cat([gate, torch.ones_like(gate)], 1)
    out = act_and_mul_scaled(x, *make_tables(1024, "none", len(gate)), activation)
    expected = accurate(gate, activation)
    normal = (expected.float().abs() >= TINY) | (gate == 0) | (dtype == torch.float16)
    distance = (bits(out).int() - bits(expected).int()).abs() * normal
    assert int(distance.max()) <= 1, f"gate {float(gate.flatten()[distance.argmax()])}"
    assert int(distance.sum()) <= most, f"{int(distance.sum())} gates, over {most}"
    assert bool((out[~normal].abs() <= TINY).all())


def check_steered(case: Case) -> None:
    """Steering is exactly scale_reference of the kernel's own unsteered output."""
    x = make_x(case.width, ROWS, case.dtype, hostile=True, pad=3)
    tables = make_tables(case.width, case.routing, ROWS)
    idle = tables._replace(row_slot=torch.full((ROWS,), -1, dtype=torch.int32))
    plain = act_and_mul_scaled(x, *idle, case.activation)
    out = act_and_mul_scaled(x, *tables, case.activation)
    assert same(out, scale_reference(plain, *tables)), "steered output"


def check_vectors(dtype: torch.dtype, width: int, routing: str) -> None:
    """Equal to the reference to the bit, in place, with a row stride over the width."""
    tables = make_vectors(width, routing, ROWS)
    hidden, expected = (make_hidden(width, ROWS, dtype, pad=3) for _ in range(2))
    add_vectors(hidden, *tables)
    add_vectors_reference(expected, *tables)
    assert same(hidden, expected), "rows with vectors"


def check_in_place(dtype: torch.dtype, width: int, routing: str) -> None:
    """Equal to the reference to the bit, with a row stride over the width; and what no circuit
    holds is not written, whatever bits it has."""
    tables = make_tables(width, routing, ROWS)
    rows, expected, before = (make_hidden(width, ROWS, dtype, pad=3) for _ in range(3))
    scale_rows(rows, *tables)
    scale_rows_reference(expected, *tables)
    assert same(rows, expected), "steered rows"
    outside = ~inside_circuits(tables, ROWS, width)
    assert torch.equal(bits(rows)[outside], bits(before)[outside]), "channels outside circuits"


def check_overflow(dtype: torch.dtype, width: int, seed: int) -> None:
    """The same slots are marked as by the reference, and nothing else is written."""
    hidden, row_slot = overflow_case(dtype, 9, width, ROWS, seed)
    marks, expected = (torch.arange(ROWS, dtype=torch.int32) for _ in range(2))
    mark_overflow(hidden, row_slot, marks, 77)
    mark_overflow_reference(hidden, row_slot, expected, 77)
    assert torch.equal(marks, expected), f"{marks.tolist()}, not {expected.tolist()}"


def check_ahead(dtype: torch.dtype, activation: str, width: int, routing: str) -> None:
    """What is left for the activation makes the steered rows, whether or not it rounds between;
    where no factor changes anything, gate and up keep their bits."""
    ahead = make_ahead(width, routing, ROWS, dtype)
    x = ahead.x.clone()
    steer_gate_up(ahead.x, *ahead.tables, activation)
    idle = ahead.tables._replace(row_slot=torch.full((ROWS,), -1, dtype=torch.int32))
    expected = act_and_mul_scaled(x, *ahead.tables, activation)
    assert same(act_and_mul_scaled(ahead.x, *idle, activation), expected), "steered rows"
    gate, up = ahead.x.chunk(2, 1)
    unrounded = EAGER[activation](gate.float()) * up.float()
    changed = ahead.changed
    assert same(unrounded[changed], expected.float()[changed]), "steered rows, unrounded"
    kept = ~changed.repeat(1, 2)
    assert torch.equal(bits(ahead.x)[kept], bits(x)[kept]), "elements that nothing changes"
    # Nothing but the steered value depends on the activation's own last place.
    written = x.clone()
    steer_gate_up_reference(written, *ahead.tables, activation)
    assert torch.equal(bits(written[:, :width]), bits(ahead.x[:, :width])), "gates"


def to_bfloat16(data: Any) -> Any:
    """Bits of float32 data rounded to the nearest bfloat16, ties to even, as on a device."""
    return torch.from_numpy(np.ascontiguousarray(data)).bfloat16().view(torch.int16).numpy()


def main() -> None:
    assert INTERPRETED
    from triton.runtime import interpreter

    quicken()

    # Triton 3.9's interpreter truncates float32 to bfloat16, and loses bfloat16's subnormals.
    convert = interpreter._convert_float

    def convert_float(data: Any, source: Any, target: Any, rounding: Any) -> Any:
        if (source.name, target.name) == ("fp32", "bf16"):
            return to_bfloat16(data)
        if (source.name, target.name) == ("bf16", "fp32"):
            return np.ascontiguousarray(data).view(np.uint16).astype(np.uint32) << 16
        return convert(data, source, target, rounding)

    interpreter._convert_float = convert_float
    failures: dict[str, str] = {}
    for case in CASES:
        try:
            if case.routing == "none":
                check_unsteered(case)
            else:
                check_steered(case)
        except AssertionError as error:
            failures[case.name] = str(error)
    builder = interpreter.InterpreterBuilder
    for dtype, activation, signs in EVERY_GATE:
        builder.create_exp2 = partialmethod(builder.unary_op, op=partial(exp2, sign=signs[0]))
        builder.create_fdiv = partialmethod(builder.binary_op, op=partial(quotient, sign=signs[1]))
        try:
            check_every_gate(dtype, activation, OFF[dtype, activation][signs != (0, 0)])
        except AssertionError as error:
            failures[f"every-gate-{dtype}-{activation}-{signs}"] = str(error)
    for dtype, width, routing in VECTOR_CASES:
        try:
            check_vectors(dtype, width, routing)
        except AssertionError as error:
            failures[f"vectors-{dtype}-{width}-{routing}"] = str(error)
    for dtype, width, routing in VECTOR_CASES:
        try:
            check_in_place(dtype, width, routing)
        except AssertionError as error:
            failures[f"in-place-{dtype}-{width}-{routing}"] = str(error)
    for dtype, activation, width, routing in AHEAD_CASES:
        try:
            check_ahead(dtype, activation, width, routing)
        except AssertionError as error:
            failures[f"ahead-{dtype}-{activation}-{width}-{routing}"] = str(error)
    for dtype, width, seed in OVERFLOW_CASES:
        try:
            check_overflow(dtype, width, seed)
        except AssertionError as error:
            failures[f"overflow-{dtype}-{width}-{seed}"] = str(error)
    json.dump({"cases": len(CASES), "failures": failures}, sys.stdout)


if __name__ == "__main__":
    main()
