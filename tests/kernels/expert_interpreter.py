# SPDX-License-Identifier: Apache-2.0
"""``scale_experts`` under Triton's interpreter, in a process of its own; see test_scale_experts."""

from itertools import product
from typing import Final

import torch

from tests.kernels.cases import same
from tests.kernels.expert_cases import make_experts

# bfloat16 needs the conversions that interpreter_worker puts into the interpreter; its rounding
# is that of the other kernels.
CASES: Final = list(
    product((torch.float32, torch.float16), (torch.int32, torch.int64), (1, 9, 150))
)


def main() -> None:
    from cna_kernels import scale_experts, scale_experts_reference
    from cna_kernels.act_and_mul_scaled import INTERPRETED
    from tests.quick_interpreter import quicken

    assert INTERPRETED
    quicken()
    for dtype, ids, width in CASES:
        case = make_experts(7, 2, 4, width, dtype, ids, seed=width)
        expected = case.activation.clone()
        scale_experts_reference(expected, *case[1:])
        scale_experts(*case)
        assert same(case.activation, expected), f"{dtype}, {ids}, {width}"
    print(f"{len(CASES)} equal")


if __name__ == "__main__":
    main()
