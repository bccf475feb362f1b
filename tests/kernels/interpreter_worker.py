# SPDX-License-Identifier: Apache-2.0
"""Cases of the Triton kernel under Triton's interpreter, run in a process of their own.

TRITON_INTERPRET must be set before triton is imported and then holds for the process, so
test_interpreter.py starts this script once and reports the cases it prints as JSON one by one.
"""

import json
import sys
from itertools import product
from typing import Any, Final, NamedTuple

import numpy as np
import torch
from torch import Tensor

from cna_kernels import DTYPES, EAGER, act_and_mul_scaled, scale_reference
from cna_kernels.act_and_mul_scaled import INTERPRETED
from tests.kernels.cases import ROUTINGS, WIDTHS, bits, make_tables, make_x, same

ROWS: Final = 5
# Error of act / gate, in float32 epsilons: that of exp, erf and tanh on either side, which
# 1 + erf and 1 + tanh turn into an absolute one.
ACT_ERROR: Final = 4.0


class Case(NamedTuple):
    dtype: torch.dtype
    activation: str
    width: int
    routing: str

    @property
    def name(self) -> str:
        return f"{self.dtype}-{self.activation}-{self.width}-{self.routing}"


CASES: Final = [Case(*values) for values in product(DTYPES, sorted(EAGER), WIDTHS, ROUTINGS)]


def ulp(value: Tensor) -> Tensor:
    """Distance from |value| to the next number of its dtype, in float64."""
    next_up = (bits(value.abs()) + 1).view(value.dtype)
    return next_up.double() - value.abs().double()


def check_unsteered(case: Case) -> None:
    """Each of the two roundings may fall on the neighbour, after float32 error in act."""
    x = make_x(case.width, ROWS, case.dtype)
    out = act_and_mul_scaled(x, *make_tables(case.width, "none", ROWS), case.activation)
    gate, up = x.chunk(2, 1)
    act = EAGER[case.activation](gate)
    expected = act * up
    float32_error = ACT_ERROR * torch.finfo(torch.float32).eps * (gate.double() * up.double()).abs()
    bound = ulp(act) * up.double().abs() + ulp(expected) + float32_error
    error = (out.double() - expected.double()).abs()
    assert bool((error <= bound).all()), f"error / bound = {float((error / bound).max())}"
    uncancelled = gate > -2
    if case.dtype != torch.float32 and uncancelled.any():
        differ = float((bits(out) != bits(expected))[uncancelled].double().mean())
        assert differ <= 2e-3, f"{differ:.2%} of outputs differ from eager"


def check_steered(case: Case) -> None:
    """Steering is exactly scale_reference of the kernel's own unsteered output."""
    x = make_x(case.width, ROWS, case.dtype, hostile=True, pad=3)
    tables = make_tables(case.width, case.routing, ROWS)
    idle = tables._replace(row_arm=torch.full((ROWS,), -1, dtype=torch.int32))
    plain = act_and_mul_scaled(x, *idle, case.activation)
    out = act_and_mul_scaled(x, *tables, case.activation)
    assert same(out, scale_reference(plain, *tables)), "steered output"


def to_bfloat16(data: Any) -> Any:
    """Bits of float32 data rounded to the nearest bfloat16, ties to even, as on a device."""
    return torch.from_numpy(np.ascontiguousarray(data)).bfloat16().view(torch.int16).numpy()


def main() -> None:
    assert INTERPRETED
    from triton.runtime import interpreter

    # Triton 3.9's interpreter truncates float32 to bfloat16.
    convert = interpreter._convert_float

    def convert_float(data: Any, source: Any, target: Any, rounding: Any) -> Any:
        if (source.name, target.name) == ("fp32", "bf16"):
            return to_bfloat16(data)
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
    json.dump({"cases": len(CASES), "failures": failures}, sys.stdout)


if __name__ == "__main__":
    main()
