# SPDX-License-Identifier: Apache-2.0
"""pack_mask packs what the op reads."""

import pytest

from cna_kernels import mask_width, pack_mask


def test_pack_mask() -> None:
    assert [mask_width(size) for size in (1, 8, 9, 4864)] == [1, 1, 2, 608]
    assert pack_mask([0, 3, 8, 10], 11).tolist() == [0b1001, 0b101]
    for channel in (-1, 11):
        with pytest.raises(ValueError, match="is outside"):
            pack_mask([channel], 11)
