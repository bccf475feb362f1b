# SPDX-License-Identifier: Apache-2.0
"""MLPs without a fused gate: found by structure, hooked before the down projection, proved."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cna_vllm.serving.worker.activation import StepBuffers
from cna_vllm.serving.worker.gated_mlp import (
    GatedMlp,
    UnsupportedModelError,
    ablated_output_matches,
    find_gated_mlps,
)
from cna_vllm.serving.worker.outputs import refuse_unfit
from cna_vllm.serving.worker.plain_mlp import HOOK, Apart, SteeredInput, hook_input
from tests.unit.test_serving_gated_mlp import (
    HIDDEN,
    VOCABULARY,
    WIDTH,
    Adapted,
    Attention,
    Mlp,
    RoutedExperts,
    RowParallel,
    make_layer,
)

PLAIN = replace(
    VOCABULARY,
    plain_activation=lambda module: "GELU" if isinstance(module, nn.GELU) else None,
)


class PlainMlp(nn.Module):
    def __init__(self, down: nn.Module | None = None) -> None:
        super().__init__()
        self.fc1, self.act = nn.Linear(HIDDEN, WIDTH), nn.GELU()
        self.fc2 = RowParallel(bias=True) if down is None else down

    def forward(self, hidden: Tensor) -> Tensor:
        result: Tensor = self.fc2(self.act(self.fc1(hidden)))[0]
        return result


class OwnLayer(PlainMlp):
    """A decoder layer that computes its MLP itself, as OPT's does."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.norm = Attention(), nn.LayerNorm(HIDDEN)

    def forward(self, hidden: Tensor) -> Tensor:
        hidden = hidden + self.attention(hidden_states=hidden)
        return hidden + super().forward(self.norm(hidden))


class Unfused(nn.Module):
    """A gate that the engine computes with a plain activation."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.act, self.down = nn.Linear(HIDDEN, 2 * WIDTH), nn.GELU(), RowParallel()

    def forward(self, hidden: Tensor) -> Tensor:
        gate, up = self.up(hidden).chunk(2, -1)
        result: Tensor = self.down(self.act(gate) * up)[0]
        return result


def find(layer: nn.Module) -> GatedMlp:
    (found,) = find_gated_mlps({3: ("model.layers.3", layer)}, PLAIN)
    return found


def hooked(layer: nn.Module, stage: Tensor | None = None) -> GatedMlp:
    """Row 0 of a step is plain, row 1 ablates every channel; row 1 is recorded."""
    mlp = find(layer)
    step = StepBuffers(
        torch.tensor([-1, 0], dtype=torch.int32),
        torch.zeros(1, 1, dtype=torch.int32),
        torch.zeros(1, 1),
        torch.tensor([-1, 0], dtype=torch.int32),
    )
    masks = torch.full((1, -(-mlp.width // 8)), 0xFF, dtype=torch.uint8)
    hook_input(mlp, step, masks, stage)
    return mlp


def test_found_where_there_is_no_gated_one() -> None:
    mlp = PlainMlp(RowParallel(5, rank=2, ranks=4))
    found = find(make_layer(attention=Attention(), mlp=mlp))
    assert (found.module, found.attribute, found.activation) == (mlp, "act", "GELU")
    assert (found.steered_input, found.width, found.offset, found.total_width) == ("fc2", 5, 10, 20)
    gated = Mlp()
    beside = find(make_layer(mlp=gated, other=PlainMlp()))
    assert (beside.module, beside.steered_input) == (gated, "")
    shared = PlainMlp()
    mixed = find(make_layer(experts=RoutedExperts(), shared=shared))
    assert (mixed.module, mixed.routed_experts) == (shared, ("model.layers.3.experts",))


def test_a_layer_has_no_mlp_output_to_add_vectors_to() -> None:
    refuse_unfit([find(make_layer(mlp=PlainMlp()))])
    with pytest.raises(UnsupportedModelError, match=r"layer 3: model\.layers\.3 computes its MLP"):
        refuse_unfit([find(OwnLayer())])


def test_two_are_refused() -> None:
    with pytest.raises(UnsupportedModelError, match=r"layer 3.*found 2 MLPs"):
        find(make_layer(mlp=PlainMlp(), other=PlainMlp()))


OBEDIENT: dict[str, Callable[[], nn.Module]] = {
    "module of its own": lambda: make_layer(mlp=PlainMlp()),
    "decoder layer": OwnLayer,
    "unfused gate": lambda: make_layer(mlp=Unfused()),
    "lora": lambda: make_layer(mlp=PlainMlp(Adapted(RowParallel(bias=True)))),
    "bfloat16": lambda: make_layer(mlp=PlainMlp()).to(torch.bfloat16),
}


@pytest.mark.parametrize("case", sorted(OBEDIENT))
def test_a_hook_that_acts(case: str) -> None:
    torch.manual_seed(0)
    layer = OBEDIENT[case]()
    before = {name: id(module) for name, module in layer.named_modules()}
    mlp = hooked(layer)
    assert ablated_output_matches(mlp, HIDDEN, next(layer.parameters()).dtype)
    after = {name: id(module) for name, module in layer.named_modules()}
    (added,) = set(after) - set(before)
    assert added.endswith(HOOK)
    assert {name: after[name] for name in before} == before


@torch.inference_mode()
def test_rows_that_are_not_steered_keep_their_bits() -> None:
    torch.manual_seed(0)
    layer, hidden = make_layer(mlp=PlainMlp()), torch.randn(1, 2, HIDDEN)
    mlp: Any = find(layer).module
    plain, neurons = mlp(hidden), mlp.act(mlp.fc1(hidden))
    stage = torch.full((1, WIDTH), 7.0)
    hooked(layer, stage)
    steered = mlp(hidden)
    assert torch.equal(steered[0, 0], plain[0, 0])
    assert torch.equal(steered[0, 1], mlp.fc2.linear.bias)
    assert not torch.equal(steered[0, 1], plain[0, 1])
    assert neurons[0, 1].any()
    assert torch.equal(stage[0], torch.zeros(WIDTH)), "as steered"


class Around(PlainMlp):
    """Takes the weights of the down projection and not the module."""

    def forward(self, hidden: Tensor) -> Tensor:
        linear: Any = self.fc2
        return F.linear(self.act(self.fc1(hidden)), linear.linear.weight, linear.linear.bias)


class Quantized(PlainMlp):
    """Gives the down projection what is no tensor."""

    def forward(self, hidden: Tensor) -> Tensor:
        linear: Any = self.fc2

        def dequantize(module: nn.Module, args: Any) -> Any:
            return args[0] if isinstance(args[0], tuple) else args

        handle = linear.register_forward_pre_hook(dequantize)
        try:
            result: Tensor = linear((self.act(self.fc1(hidden)),))[0]
            return result
        finally:
            handle.remove()


class LayerAround(OwnLayer):
    def forward(self, hidden: Tensor) -> Tensor:
        linear: Any = self.fc2
        return hidden + linear.linear(self.act(self.fc1(hidden)))


DEAF: dict[str, Callable[[], nn.Module]] = {
    "around": lambda: make_layer(mlp=Around()),
    "quantized": lambda: make_layer(mlp=Quantized()),
    "decoder layer": LayerAround,
}


@pytest.mark.parametrize("case", sorted(DEAF))
def test_a_forward_pass_that_goes_around_its_hook(case: str) -> None:
    torch.manual_seed(0)
    assert not ablated_output_matches(hooked(DEAF[case]()), HIDDEN, torch.float32)


def test_an_activation_that_could_be_fused_is_set_apart() -> None:
    """vLLM fuses by the class of the activation, which it then does not find."""
    torch.manual_seed(0)
    layer = make_layer(mlp=PlainMlp())
    mlp = replace(find(layer), fuses_quantization=True)
    step = StepBuffers(torch.tensor([-1, 0]).int(), torch.zeros(1, 1).int(), torch.zeros(1, 1))
    hook = hook_input(mlp, step, torch.full((1, 2), 0xFF, dtype=torch.uint8), None)
    module: Any = mlp.module
    assert isinstance(hook, SteeredInput)
    assert type(module.act) is Apart
    assert ablated_output_matches(mlp, HIDDEN, torch.float32)
