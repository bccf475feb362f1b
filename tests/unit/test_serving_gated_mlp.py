# SPDX-License-Identifier: Apache-2.0
"""Finding gated MLPs by structure, and telling a hook that acts from one that does not."""

from __future__ import annotations

import keyword
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from cna_vllm.serving.worker.activation import SteeredActAndMul, StepBuffers
from cna_vllm.serving.worker.gated_mlp import (
    GatedMlp,
    LayerVocabulary,
    UnsupportedModelError,
    ablated_output_matches,
    find_gated_mlps,
)

HIDDEN, WIDTH = 6, 9


class ActAndMul(nn.Module):
    def __init__(self, kind: str = "silu") -> None:
        super().__init__()
        self.kind = kind

    def forward(self, x: Tensor) -> Tensor:
        gate, up = x.chunk(2, -1)
        return F.silu(gate) * up


class OddAndMul(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        gate, up = x.chunk(2, -1)
        return F.mish(gate) * up


class RowParallel(nn.Module):
    """One rank's share of a linear whose input is split over ranks."""

    def __init__(
        self, width: int = WIDTH, rank: int = 0, ranks: int = 1, bias: bool = False
    ) -> None:
        super().__init__()
        self.input_size_per_partition, self.input_size, self.tp_rank = width, width * ranks, rank
        self.linear = nn.Linear(width, HIDDEN, bias=bias)

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        return self.linear(x), None


class Adapted(nn.Module):
    """What LoRA wraps a linear in; like vLLM's, it works only within a batch."""

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        raise RuntimeError("no batch has set the adapters of these rows")


class RoutedExperts(nn.Module):
    pass


VOCABULARY = LayerVocabulary(
    activation=lambda module: module.kind if isinstance(module, ActAndMul) else None,
    unknown_activation=lambda module: isinstance(module, OddAndMul),
    down_projection=lambda module: isinstance(module, RowParallel),
    without_adapter=lambda module: module.base_layer if isinstance(module, Adapted) else module,
    routed_experts=lambda module: isinstance(module, RoutedExperts),
)


class Mlp(nn.Module):
    """gate_up -> activation -> down, under any attribute names."""

    def __init__(
        self,
        names: tuple[str, str, str] = ("gate_up_proj", "act_fn", "down_proj"),
        *,
        activation: nn.Module | None = None,
        down: nn.Module | None = None,
        width: int = WIDTH,
    ) -> None:
        super().__init__()
        self._names = names
        self.add_module(names[0], nn.Linear(HIDDEN, 2 * width, bias=False))
        self.add_module(names[1], ActAndMul() if activation is None else activation)
        self.add_module(names[2], RowParallel(width) if down is None else down)

    def forward(self, hidden: Tensor) -> Tensor:
        gate_up, act, down = (getattr(self, name) for name in self._names)
        result: Tensor = down(act(gate_up(hidden)))[0]
        return result


class Attention(nn.Module):
    """A row-parallel linear with no activation beside it: not an MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv_proj, self.o_proj = nn.Linear(HIDDEN, HIDDEN), RowParallel(HIDDEN)


def make_layer(**children: nn.Module) -> nn.Module:
    layer = nn.Module()
    for name, child in children.items():
        layer.add_module(name, child)
    return layer


def find(*layers: nn.Module, first: int = 0) -> list[GatedMlp]:
    named = {first + i: (f"model.layers.{first + i}", layer) for i, layer in enumerate(layers)}
    return find_gated_mlps(dict(reversed(named.items())), VOCABULARY)


NAMES = st.from_regex(r"[a-z_][a-z0-9_]{0,11}", fullmatch=True).filter(
    lambda name: not (keyword.iskeyword(name) or hasattr(nn.Module(), name) or name == "_names")
)


@given(
    st.lists(NAMES, min_size=6, max_size=6, unique=True),
    st.sampled_from(["silu", "gelu", "gelu_tanh"]),
    st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_found_by_structure_whatever_the_names(names: list[str], kind: str, lora: bool) -> None:
    down = RowParallel(5, rank=2, ranks=4)
    mlp = Mlp(
        (names[0], names[1], names[2]),
        activation=ActAndMul(kind),
        down=Adapted(down) if lora else down,
        width=5,
    )
    wrapped = make_layer(**{names[3]: Attention(), names[4]: make_layer(**{names[5]: mlp})})
    (found,) = find(wrapped, first=7)
    assert found == GatedMlp(
        layer=7,
        path=f"model.layers.7.{names[4]}.{names[5]}",
        module=mlp,
        attribute=names[1],
        activation=kind,
        down_proj=down,
        width=5,
        offset=10,
        total_width=20,
        adapted={names[2]: down} if lora else {},
        decoder=wrapped,
    )


def test_a_layer_that_is_its_own_mlp() -> None:
    (found,) = find(Mlp())
    assert (found.path, found.offset, found.total_width) == ("model.layers.0", 0, WIDTH)


class Runner(RoutedExperts):
    """Holds, as vLLM's does, the shared expert that the layer holds too."""

    def __init__(self, shared: nn.Module) -> None:
        super().__init__()
        self.shared = shared


@pytest.mark.parametrize("runner_first", [False, True])
def test_the_shared_expert_beside_routed_ones(runner_first: bool) -> None:
    """Found once, and what is out of reach is named."""
    shared = Mlp()
    children = [("shared_expert", shared), ("experts", Runner(shared))]
    layer = make_layer(mlp=make_layer(**dict(children[::-1] if runner_first else children)))
    dense, mixed = find(make_layer(mlp=Mlp()), layer)
    assert mixed.module is shared
    assert mixed.routed_experts == ("model.layers.1.mlp.experts",)
    assert dense.routed_experts == ()


def test_in_layer_order_and_of_this_stage_only() -> None:
    found = find(*(make_layer(mlp=Mlp()) for _ in range(12)), first=4)
    assert [mlp.layer for mlp in found] == list(range(4, 16))
    assert find_gated_mlps({}, VOCABULARY) == []


NOT_MLPS: dict[str, Callable[[], nn.Module]] = {
    "no mlp": lambda: make_layer(attention=Attention()),
    "plain mlp": lambda: make_layer(
        mlp=make_layer(up=nn.Linear(2, 2), act=nn.GELU(), down=RowParallel())
    ),
    "activation and linear in different modules": lambda: make_layer(
        a=make_layer(act=ActAndMul()), b=make_layer(down=RowParallel())
    ),
    "two linears beside one activation": lambda: make_layer(
        mlp=make_layer(act=ActAndMul(), a=RowParallel(), b=RowParallel())
    ),
    "two activations beside one linear": lambda: make_layer(
        mlp=make_layer(a=ActAndMul(), b=ActAndMul(), down=RowParallel())
    ),
    "routed experts": lambda: make_layer(mlp=make_layer(experts=RoutedExperts())),
    "routed experts beside a plain mlp": lambda: make_layer(
        experts=RoutedExperts(), shared=make_layer(down=RowParallel())
    ),
}


@pytest.mark.parametrize("case", sorted(NOT_MLPS))
def test_nothing_is_found(case: str) -> None:
    """Whether that is right is for the model's configuration to say."""
    assert [mlp.layer for mlp in find(make_layer(mlp=Mlp()), NOT_MLPS[case]())] == [0]


REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "two mlps": (lambda: make_layer(mlp=Mlp(), shared_mlp=Mlp()), "found 2 MLPs"),
    "routed experts beside a shared and a dense mlp": (
        lambda: make_layer(experts=RoutedExperts(), shared=Mlp(), dense=Mlp()),
        "found 2 MLPs",
    ),
    "unknown activation": (
        lambda: make_layer(mlp=Mlp(activation=OddAndMul())),
        "no kernel covers.*OddAndMul",
    ),
    "unknown activation beside a known mlp": (
        lambda: make_layer(mlp=Mlp(), other=Mlp(activation=OddAndMul())),
        "no kernel covers.*OddAndMul",
    ),
}


@pytest.mark.parametrize("case", sorted(REFUSED))
def test_refused_with_the_layer_named(case: str) -> None:
    make, says = REFUSED[case]
    with pytest.raises(UnsupportedModelError, match=says) as refused:
        find(make_layer(mlp=Mlp()), make_layer(mlp=Mlp()), make())
    assert "layer 2" in str(refused.value)
    assert "model.layers.2" in str(refused.value)
    assert "\n" not in str(refused.value)


def hooked(mlp: nn.Module) -> GatedMlp:
    """Finds and hooks; row 0 of a step is plain, row 1 ablates every channel."""
    (found,) = find(make_layer(mlp=mlp))
    step = StepBuffers(
        torch.tensor([-1, 0], dtype=torch.int32),
        torch.zeros(1, 1, dtype=torch.int32),
        torch.zeros(1, 1),
    )
    masks = torch.full((1, -(-found.width // 8)), 0xFF, dtype=torch.uint8)
    setattr(found.module, found.attribute, SteeredActAndMul(found.activation, step, masks))
    return found


class TupleMlp(Mlp):
    def forward(self, hidden: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return super().forward(hidden), None


class BareLinear(RowParallel):
    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return self.linear(x)


class BareMlp(Mlp):
    def forward(self, hidden: Tensor) -> Tensor:
        result: Tensor = self.down_proj(self.act_fn(self.gate_up_proj(hidden)))
        return result


OBEDIENT: dict[str, Callable[[], nn.Module]] = {
    "plain": Mlp,
    "bias": lambda: Mlp(down=RowParallel(bias=True)),
    "tuple": TupleMlp,
    "lora": lambda: Mlp(down=Adapted(RowParallel())),
    "bare tensors": lambda: BareMlp(down=BareLinear()),
    "bfloat16": lambda: Mlp().to(torch.bfloat16),
}


@pytest.mark.parametrize("case", sorted(OBEDIENT))
def test_a_hook_that_acts(case: str) -> None:
    mlp = OBEDIENT[case]()
    dtype = next(mlp.parameters()).dtype
    before = dict(mlp.named_children())
    found = hooked(mlp)
    assert ablated_output_matches(found, HIDDEN, dtype)
    after = dict(mlp.named_children())
    assert [key for key in after if after[key] is not before[key]] == [found.attribute]


class Functional(Mlp):
    """Calls the operation and not the module."""

    def forward(self, hidden: Tensor) -> Tensor:
        gate, up = self.gate_up_proj(hidden).chunk(2, -1)
        result: Tensor = self.down_proj(F.silu(gate) * up)[0]
        return result


class Captured(Mlp):
    """Took the activation's method at construction, as fused kernels do."""

    def __init__(self) -> None:
        super().__init__()
        self._method = self.act_fn.forward

    def forward(self, hidden: Tensor) -> Tensor:
        result: Tensor = self.down_proj(self._method(self.gate_up_proj(hidden)))[0]
        return result


class Discarded(Mlp):
    """Calls the hook and goes on without its result."""

    def forward(self, hidden: Tensor) -> Tensor:
        gate, up = self.gate_up_proj(hidden).chunk(2, -1)
        self.act_fn(self.gate_up_proj(hidden))
        result: Tensor = self.down_proj(F.silu(gate) * up)[0]
        return result


class Bypassed(Mlp):
    """Adds a path beside the neurons."""

    def forward(self, hidden: Tensor) -> Tensor:
        return super().forward(hidden) + hidden


@pytest.mark.parametrize("kind", [Functional, Captured, Discarded, Bypassed])
def test_a_forward_pass_that_goes_around_its_hook(kind: type[Mlp]) -> None:
    torch.manual_seed(0)
    assert not ablated_output_matches(hooked(kind()), HIDDEN, torch.float32)


def test_a_module_that_was_not_hooked() -> None:
    torch.manual_seed(0)
    (found,) = find(make_layer(mlp=Mlp()))
    assert not ablated_output_matches(found, HIDDEN, torch.float32)


def test_a_hook_that_leaves_a_channel() -> None:
    """The proof is of every channel, the last one included."""
    torch.manual_seed(0)
    mlp = hooked(Mlp())
    mlp.module.act_fn.masks[0, WIDTH // 8] = 0
    assert not ablated_output_matches(mlp, HIDDEN, torch.float32)
