# SPDX-License-Identifier: Apache-2.0
"""Which hook an MLP gets whose engine may fuse its activation with what quantizes the result."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cna_vllm.serving.config import CnaConfig
from cna_vllm.serving.worker.activation import SteeredActAndMul, SteeredGateUp
from cna_vllm.serving.worker.gated_mlp import UnsupportedModelError
from cna_vllm.serving.worker.runtime import SteeringRuntime
from tests.unit.test_serving_runtime import (
    FIRST,
    HIDDEN,
    LAYERS,
    SECOND,
    Deaf,
    Mlp,
    found,
    resolved,
    step,
)


class Quantizing(Mlp):
    """Hands the activation's result to a quantizer that never meets a plain tensor of it."""

    fused = 0

    def forward(self, hidden: Tensor) -> Tensor:
        x, act = self.up(hidden), self.act
        down: Any = self.down
        if isinstance(act, SteeredGateUp):  # as vLLM's producers, which are given the linear
            self.fused += 1
            x, act = down.cna_steer(x), act.replaced
        result: Tensor = down((8 * act(x)).round() / 8)
        return result


def build(
    modules: list[Mlp], dtype: torch.dtype = torch.float32, fuses: bool = True, **config: Any
) -> SteeringRuntime:
    mlps = [replace(found(i, m), fuses_quantization=fuses) for i, m in enumerate(modules)]
    runtime = SteeringRuntime(
        mlps,
        CnaConfig(**config),
        hidden_size=HIDDEN,
        dtype=dtype,
        device=torch.device("cpu"),
        max_num_reqs=4,
        max_num_tokens=32,
    )
    for circuit in (FIRST, SECOND):
        runtime.load(circuit.packed())
    runtime.add_request("plain", None, 3)
    both = ((FIRST.digest, 0.37), (SECOND.digest, -1.5))
    runtime.add_request("both", resolved(*both, scope="all"), 2)
    runtime.add_request("off", resolved((SECOND.digest, 0.0), scope="all"), 2)
    step(runtime, ("both", 2, 0), ("plain", 3, 0), ("off", 2, 0))
    return runtime


@contextmanager
def same_weights() -> Iterator[None]:
    with torch.inference_mode():
        torch.manual_seed(0)
        yield


def answers(**options: Any) -> tuple[SteeringRuntime, list[Mlp], list[Tensor]]:
    with same_weights():
        modules: list[Mlp] = [Quantizing() for _ in range(LAYERS)]
        runtime = build(modules, **options)
        hidden = torch.randn(7, HIDDEN)
        return runtime, modules, [module(hidden) for module in modules]


def test_fused_rows_are_those_of_the_unfused_op() -> None:
    fused, modules, ours = answers()
    apart, others, expected = answers(fuses=False)
    assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))
    assert [type(m.act) for m in modules] == [SteeredGateUp] * LAYERS
    assert [type(m.act) for m in others] == [SteeredActAndMul] * LAYERS
    assert [m.fused for m in modules if isinstance(m, Quantizing)] == [2] * LAYERS  # and the proof
    told = fused.status()["quantization"]
    assert told == "fused with the activation as in vLLM alone, in 3 layers"
    assert apart.status()["quantization"] == "none that an activation could be fused with"


@pytest.mark.parametrize(
    ("options", "reason"),
    [({"record": True}, "records"), ({"dtype": torch.float16}, "float16 cannot carry")],
)
def test_what_stays_apart_says_why(options: dict[str, Any], reason: str) -> None:
    with same_weights():
        modules: list[Mlp] = [Quantizing().to(options.get("dtype")) for _ in range(LAYERS)]
        runtime = build(modules, **options)
    assert [type(m.act) for m in modules] == [SteeredActAndMul] * LAYERS
    assert reason in runtime.unfused and runtime.unfused in runtime.status()["quantization"]
    assert runtime.fusible == [f"layers.{i}" for i in range(LAYERS)]


def test_a_producer_that_goes_around_the_hook_is_refused() -> None:
    with same_weights(), pytest.raises(UnsupportedModelError, match="do not obey"):
        build([Quantizing(), Deaf(), Quantizing()])


def test_leading_dimensions() -> None:
    """Steered in place: what cannot be seen as rows is refused, never copied and lost."""
    _, modules, _ = answers()
    with same_weights():
        hook: nn.Module = modules[0].act
        x = modules[0].up(torch.randn(7, HIDDEN))
        assert torch.equal(hook(x[None].clone())[0], hook(x.clone()))
        with pytest.raises(RuntimeError, match="view"):
            hook(x[None].expand(2, -1, -1).transpose(0, 1))
