# SPDX-License-Identifier: Apache-2.0
"""MLPs without a fused gate: what a circuit scales is the input of the down projection.

An activation that no kernel here computes (GELU, squared ReLU, xIELU, or a gate that the engine has
left unfused) runs as it stands. A hook before the down projection then scales the listed neurons
in place, so that all other bits are the engine's own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from cna_kernels import record_rows, scale_rows
from cna_vllm.serving.worker.activation import SteeredActAndMul, StepBuffers

if TYPE_CHECKING:
    from cna_vllm.serving.worker.gated_mlp import GatedMlp

HOOK = "cna_input"
"""Name of the hook among the children of the module that owns the neurons."""


class SteeredInput(SteeredActAndMul):
    """Forward pre-hook of a down projection: scales each token row's circuits, in place.

    No Python branch depends on request data. An input that is no tensor (quantized already) is
    left as it is, which the proof at start refuses.
    """

    def forward(self, _module: nn.Module, args: Any) -> None:  # type: ignore[override]
        x = args[0]
        if not isinstance(x, torch.Tensor):
            return
        rows = x if x.dim() == 2 else x.view(-1, x.shape[-1])  # never a copy: it is written
        scale_rows(rows, self.row_slot, self.slot_circuits, self.slot_multipliers, self.masks)
        if self.recorded is not None and self.row_record is not None:
            record_rows(rows, self.row_record, self.recorded)


class Apart(nn.Module):
    """An activation as it stands, under a class that no table of fused activations has."""

    def __init__(self, activation: nn.Module) -> None:
        super().__init__()
        self.activation = activation

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.activation(x)
        return out


def hook_input(
    mlp: GatedMlp, step: StepBuffers, masks: torch.Tensor, stage: torch.Tensor | None
) -> SteeredInput:
    """Hooks the down projection, or the LoRA wrapper that it is in and that never calls it."""
    hook = SteeredInput(mlp.activation, step, masks, stage)
    mlp.module.add_module(HOOK, hook)
    getattr(mlp.module, mlp.steered_input).register_forward_pre_hook(hook)
    if mlp.fuses_quantization:
        setattr(mlp.module, mlp.attribute, Apart(getattr(mlp.module, mlp.attribute)))
    return hook


@contextmanager
def hooked_without_adapter(mlp: GatedMlp) -> Iterator[None]:
    """While the down projection stands without its LoRA wrapper, it has the wrapper's hook."""
    hook = getattr(mlp.module, HOOK, None)
    if hook is None or mlp.steered_input not in mlp.adapted:
        yield
        return
    with _pre_hook(mlp.adapted[mlp.steered_input], hook):
        yield


def ablated_layer_matches(mlp: GatedMlp, hidden: torch.Tensor) -> bool:
    """``ablated_output_matches`` where a decoder layer owns the neurons itself.

    Its other parts with a row-parallel linear (attention) run only within a batch; here they add
    nothing. Row 1, ablated, must leave the layer as it does when the down projection gets zeros.
    """
    module: Any = mlp.module
    parts = {
        name: child
        for name, child in module.named_children()
        if name != mlp.steered_input and _has_linear_of(child, mlp.down_proj)
    }
    with ExitStack() as stack:
        for name, child in parts.items():
            setattr(module, name, _Silent())
            stack.callback(setattr, module, name, child)
        steered = module(hidden.clone())
        with _pre_hook(getattr(module, mlp.steered_input), _zeros):
            expected = module(hidden.clone())
    steered, expected = _tensor(steered), _tensor(expected)
    # Row 0 is not steered: were it the same too, nobody would have asked for what was given.
    return torch.equal(steered[1], expected[1]) and not torch.equal(steered[0], expected[0])


def _has_linear_of(part: nn.Module, linear: nn.Module) -> bool:
    return any(isinstance(module, type(linear)) for module in part.modules())


class _Silent(nn.Module):
    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        hidden = next(x for x in (*kwargs.values(), *args) if isinstance(x, torch.Tensor))
        return torch.zeros_like(hidden)


def _zeros(_module: nn.Module, args: Any) -> Any:
    return (torch.zeros_like(args[0]), *args[1:])


def _tensor(output: Any) -> torch.Tensor:
    first: torch.Tensor = output[0] if isinstance(output, tuple) else output
    return first


@contextmanager
def _pre_hook(module: nn.Module, hook: Callable[..., Any]) -> Iterator[None]:
    handle = module.register_forward_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()
