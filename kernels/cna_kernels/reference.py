# SPDX-License-Identifier: Apache-2.0
"""The definition of ``act_and_mul_scaled`` in plain torch: the oracle of tests and benchmarks."""

from collections.abc import Iterable

import torch
from torch import Tensor

from cna_kernels.activations import eager_activation


def mask_width(intermediate_size: int) -> int:
    """Bytes of one packed mask: ceil(intermediate_size / 8)."""
    return -(-intermediate_size // 8)


def pack_mask(channels: Iterable[int], intermediate_size: int) -> Tensor:
    """mask[j >> 3] has bit value 1 << (j & 7) set  <=>  j in channels.

    Returns a uint8 tensor [mask_width(intermediate_size)] on the CPU.
    Raises ValueError for a channel outside [0, intermediate_size).
    """
    mask = torch.zeros(mask_width(intermediate_size), dtype=torch.uint8)
    for channel in channels:
        if not 0 <= channel < intermediate_size:
            raise ValueError(f"channel {channel} is outside [0, {intermediate_size})")
        mask[channel >> 3] |= 1 << (channel & 7)
    return mask


def unpack_mask(mask: Tensor, intermediate_size: int) -> Tensor:
    """members[j] = bit (j & 7) of mask[j >> 3].

    mask uint8 [mask_width(intermediate_size)] -> bool [intermediate_size], same device.
    """
    bits = torch.arange(8, dtype=torch.uint8, device=mask.device)
    return ((mask[:, None] >> bits) & 1).bool().flatten()[:intermediate_size]


def scale_reference(
    a: Tensor, row_slot: Tensor, slot_circuits: Tensor, slot_multipliers: Tensor, masks: Tensor
) -> Tensor:
    """out[t, j] = f(t, j) * a[t, j] where a circuit of slot row_slot[t] holds j, else a[t, j].

    a [T, I] float32, bfloat16 or float16 is left as it is; the other operands are those of
    :func:`cna_kernels.act_and_mul_scaled`. f is the float32 product, in entry order, of the
    multipliers of the entries whose circuit holds j; f * a is a float32 product rounded once to
    the dtype of a, and exactly +0 where f == 0.
    """
    out = a.clone()
    for row in range(a.shape[0]):
        slot = int(row_slot[row])
        if slot < 0:
            continue
        factor = torch.ones(a.shape[1], dtype=torch.float32, device=a.device)
        inside = torch.zeros(a.shape[1], dtype=torch.bool, device=a.device)
        for entry in range(slot_circuits.shape[1]):
            circuit = int(slot_circuits[slot, entry])
            if circuit < 0:
                continue
            members = unpack_mask(masks[circuit], a.shape[1])
            factor = torch.where(members, factor * slot_multipliers[slot, entry], factor)
            inside |= members
        scaled = (factor * a[row].float()).to(a.dtype)
        scaled = torch.where(factor == 0, torch.zeros_like(scaled), scaled)
        out[row] = torch.where(inside, scaled, a[row])
    return out


def act_and_mul_scaled_reference(
    x: Tensor,
    row_slot: Tensor,
    slot_circuits: Tensor,
    slot_multipliers: Tensor,
    masks: Tensor,
    activation: str,
) -> Tensor:
    """out = scale_reference(act(gate) * up, ...) with gate = x[:, :I], up = x[:, I:].

    Operands and result are those of :func:`cna_kernels.act_and_mul_scaled`.
    Raises ValueError for an unknown activation.
    """
    size = x.shape[1] // 2
    a = eager_activation(activation)(x[:, :size]) * x[:, size:]
    return scale_reference(a, row_slot, slot_circuits, slot_multipliers, masks)
