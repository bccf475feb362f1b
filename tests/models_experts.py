# SPDX-License-Identifier: Apache-2.0
"""The oracle of any architecture, with hooks in its routed experts too."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import MethodType
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from tests.models_zoo import HIDDEN, AnyHookedModel, width_of
from tests.oracles import Arm

Mlp = int | tuple[int, int]
"""A layer, for its dense or shared MLP; or a layer and a routed expert."""

See = Callable[[int, int, torch.Tensor, torch.Tensor], None]
"""Of a layer and an expert: its down projection's input, to be changed in place, and the position
of the token that each row is of."""


class AnyExpertModel(AnyHookedModel):
    """``AnyHookedModel`` whose circuits have channels by ``Mlp``."""

    def __init__(self, path: str | Path) -> None:
        super().__init__(path)
        if self.experts():
            self.model.set_experts_implementation("eager")

    def experts(self) -> dict[int, Any]:
        """Of each layer that has them, the module that owns all routed experts' weights."""
        found = {}
        for index, layer in enumerate(self.layers()):
            owners = [
                module
                for name, module in layer.named_modules()
                if name.split(".")[-1] == "experts"
                and isinstance(getattr(module, "down_proj", None), nn.Parameter)
            ]
            if len(owners) == 1:
                found[index] = owners[0]
        return found

    def widths(self) -> dict[Mlp, int]:
        """Neurons of each MLP, layer by layer, those of routed experts last."""
        downs, routed = self.down_projections(), self.experts()
        found: dict[Mlp, int] = {}
        for layer in sorted({*downs, *routed}):
            if layer in downs:
                found[layer] = width_of(downs[layer])
            if layer in routed:
                (width,) = {*routed[layer].down_proj.shape[1:]} - {HIDDEN}
                count = len(routed[layer].down_proj)
                found |= dict.fromkeys([(layer, expert) for expert in range(count)], width)
        return found

    @contextmanager
    def steered(self, arm: Arm, prompt_len: int) -> Iterator[None]:
        first = arm.first_position(prompt_len)
        circuits: Any = arm.circuits

        def scale(layer: int, expert: int, rows: torch.Tensor, positions: torch.Tensor) -> None:
            for channels, multiplier in circuits:
                if held := list(channels.get((layer, expert), ())):
                    factor = torch.ones(rows.shape[-1])
                    factor[held] = multiplier
                    rows[positions >= first] *= factor

        with super().steered(arm, prompt_len), self._watched(scale):
            yield

    @torch.inference_mode()
    def neurons(self, prompt: Any) -> np.ndarray:
        """float64: every neuron at the last token, in the order of ``widths``; 0 in experts that
        it was not routed to."""
        seen: dict[Mlp, torch.Tensor] = {}

        def keep(layer: int, expert: int, rows: torch.Tensor, positions: torch.Tensor) -> None:
            at = (positions == len(prompt) - 1).nonzero().flatten()
            if len(at):
                seen[layer, expert] = rows[at[0]].clone()

        with self._watched(keep):
            for layer, values in self.dense_inputs(prompt).items():
                seen[layer] = values
        return np.concatenate(
            [
                seen[mlp].double().numpy() if mlp in seen else np.zeros(width)
                for mlp, width in self.widths().items()
            ]
        )

    @contextmanager
    def _watched(self, see: See) -> Iterator[None]:
        experts = self.experts()
        for layer, module in experts.items():
            module.forward = MethodType(_forward(layer, see), module)
        try:
            yield
        finally:
            for module in experts.values():
                del module.forward


def _forward(layer: int, see: See) -> Any:
    """What all experts of a layer compute, one after the other, with ``see`` before each down
    projection."""

    def forward(self: Any, hidden: torch.Tensor, index: Any = None, weights: Any = None) -> Any:
        if index is None:  # Llama 4: all rows for every expert, 0 where it was not chosen
            rows = hidden.view(len(self.down_proj), -1, hidden.shape[-1])
            gate, up = torch.bmm(rows, self.gate_up_proj).chunk(2, dim=-1)
            neurons = up * self.act_fn(gate)
            for expert, of_expert in enumerate(neurons):
                see(layer, expert, of_expert, torch.arange(len(of_expert)))
            return torch.bmm(neurons, self.down_proj).view(-1, hidden.shape[-1])
        out = torch.zeros_like(hidden)
        names = ("gate_up_proj" if self.has_gate else "up_proj", "down_proj")
        for expert in range(len(self.down_proj)):
            position, choice = (index == expert).nonzero(as_tuple=True)
            up, down = (getattr(self, name)[expert] for name in names)
            if self.is_transposed:
                up, down = up.T, down.T
            before, after = (
                getattr(self, f"{name}_bias")[expert] if self.has_bias else None for name in names
            )
            neurons = F.linear(hidden[position], up, before)
            neurons = self._apply_gate(neurons) if self.has_gate else self.act_fn(neurons)
            see(layer, expert, neurons, position)
            result = F.linear(neurons, down, after)
            out.index_add_(0, position, result * weights[position, choice, None])
        return out

    return forward
