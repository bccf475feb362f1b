# SPDX-License-Identifier: Apache-2.0
"""What the CPU path keeps between calls is never used for operands that have changed."""

import pytest
import torch

from cna_kernels import act_and_mul_scaled, act_and_mul_scaled_reference, pack_mask

ROWS, SIZE = 6, 40


def operands() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "x": torch.randn(ROWS, 2 * SIZE, generator=generator),
        "row_slot": torch.tensor([0, -1, 1, 0, -1, 1, 9, 9], dtype=torch.int32),
        "slot_circuits": torch.tensor([[0, -1], [1, 0]], dtype=torch.int32),
        "slot_multipliers": torch.tensor([[2.0, 1.0], [0.5, -1.0]]),
        "masks": torch.stack([pack_mask(range(0, 20), SIZE), pack_mask(range(10, 30), SIZE)]),
    }


def check(tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    """The op equals the reference; twice, so that the second call meets what the first kept."""
    expected = act_and_mul_scaled_reference(*tensors.values(), "silu")
    for _ in range(2):
        out = act_and_mul_scaled(*tensors.values(), "silu")
        assert torch.equal(out, expected)
    return expected


@pytest.mark.parametrize("inference", [False, True], ids=["normal", "inference-mode"])
@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("x", lambda t: t.neg_()),
        ("row_slot", lambda t: t[:2].copy_(torch.tensor([-1, 1]))),
        ("row_slot", lambda t: t.fill_(-1)),
        ("slot_circuits", lambda t: t[0].copy_(torch.tensor([1, -1]))),
        ("slot_multipliers", lambda t: t[1].fill_(0.0)),
        ("masks", lambda t: t[0].zero_()),
    ],
)
def test_changes_in_place_are_seen(name: str, change: object, inference: bool) -> None:
    tensors = operands()
    with torch.inference_mode(inference):
        before = check(tensors)
        change(tensors[name])  # type: ignore[operator]
        after = check(tensors)
    assert not torch.equal(before, after)


def test_a_change_through_the_base_of_a_view_is_seen() -> None:
    """Layers hold views of one table; a circuit is loaded by writing to the table."""
    tensors = operands()
    table = torch.stack([tensors["masks"], tensors["masks"]])
    tensors["masks"] = table[1]
    before = check(tensors)
    with torch.inference_mode():
        table[:, 0].copy_(torch.zeros(2, table.shape[2], dtype=torch.uint8))
    assert not torch.equal(before, check(tensors))


def test_another_number_of_rows_and_another_width_are_seen() -> None:
    tensors = operands()
    check(tensors)
    check({**tensors, "x": tensors["x"][:3]})
    narrow = {**tensors, "x": tensors["x"][:, : 2 * (SIZE - 1)].contiguous()}
    check(narrow)
    check(tensors)


def test_other_tensors_at_an_old_address_are_seen() -> None:
    """Freed and allocated again, as a restarted engine does; versions start anew too."""
    for multiplier in (2.0, 3.0, 0.0, 5.0):
        tensors = operands()
        tensors["slot_multipliers"] = torch.full((2, 2), multiplier)
        check(tensors)


def test_tensors_without_versions_are_resolved_each_time() -> None:
    with torch.inference_mode():
        tensors = operands()
        assert tensors["row_slot"].is_inference()
        before = check(tensors)
        tensors["slot_multipliers"].numpy()[:] = 4.0
        assert not torch.equal(before, check(tensors))
