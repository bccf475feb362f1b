# SPDX-License-Identifier: Apache-2.0
"""One rank end to end with plain torch layers: hooked, proved, loaded, routed, computed."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cna_vllm.serving.config import CnaConfig
from cna_vllm.serving.worker.gated_mlp import GatedMlp, UnsupportedModelError
from cna_vllm.serving.worker.runtime import SteeringRuntime
from cna_vllm.steering.circuit import Circuit, Neuron
from cna_vllm.steering.resolved import Steering

HIDDEN, WIDTH, LAYERS = 6, 13, 3


class SiluAndMul(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        gate, up = x.chunk(2, -1)
        return F.silu(gate) * up


class Mlp(nn.Module):
    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.up, self.act = nn.Linear(HIDDEN, 2 * width, bias=False), SiluAndMul()
        self.down = nn.Linear(width, HIDDEN, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        result: Tensor = self.down(self.act(self.up(hidden)))
        return result

    def neurons(self, hidden: Tensor) -> Tensor:
        """The input of ``down`` as the module was before it was hooked."""
        gate, up = self.up(hidden).chunk(2, -1)
        return F.silu(gate) * up


class Deaf(Mlp):
    def forward(self, hidden: Tensor) -> Tensor:
        result: Tensor = self.down(self.neurons(hidden))
        return result


def found(layer: int, module: Mlp, offset: int = 0, total: int | None = None) -> GatedMlp:
    width = module.down.in_features
    return GatedMlp(
        layer, f"layers.{layer}", module, "act", "silu", module.down, width, offset, total or width
    )


def make_runtime(mlps: list[GatedMlp], **config: Any) -> SteeringRuntime:
    return SteeringRuntime(
        mlps,
        CnaConfig(**config),
        hidden_size=HIDDEN,
        dtype=torch.float32,
        device=torch.device("cpu"),
        max_num_reqs=4,
        max_num_tokens=32,
    )


def step(runtime: SteeringRuntime, *batch: tuple[str, int, int]) -> None:
    runtime.prepare_step(
        [b[0] for b in batch], np.array([b[1] for b in batch]), np.array([b[2] for b in batch])
    )


def resolved(*pairs: tuple[str, float], scope: str = "last") -> Steering:
    return Steering(pairs, scope)


FIRST = Circuit("m", "A", LAYERS, WIDTH, (Neuron(0, 2), Neuron(2, 12)))
SECOND = Circuit("m", "A", LAYERS, WIDTH, (Neuron(0, 2), Neuron(0, 8)))


@torch.inference_mode()
def test_every_row_of_a_mixed_batch() -> None:
    torch.manual_seed(0)
    modules = [Mlp() for _ in range(LAYERS)]
    runtime = make_runtime([found(i, m) for i, m in enumerate(modules)])
    for circuit in (FIRST, SECOND):
        runtime.load(circuit.packed())
    runtime.add_request("a", resolved((FIRST.digest, 0.0)), 3)
    runtime.add_request("b", resolved((FIRST.digest, 0.5), (SECOND.digest, -2.0), scope="all"), 9)
    runtime.add_request("plain", None, 2)
    runtime.add_request("also plain", None, 2)
    step(runtime, ("b", 2, 0), ("plain", 2, 0), ("a", 4, 0), ("also plain", 1, 5))

    factor = torch.ones(LAYERS, 9, WIDTH)
    for row in (0, 1):  # b, everywhere
        factor[0, row, 2] = 0.5 * -2.0
        factor[0, row, 8] = -2.0
        factor[2, row, 12] = 0.5
    for row in (6, 7):  # a, from its last prompt token on
        factor[0, row, 2] = factor[2, row, 12] = 0.0
    hidden = torch.randn(9, HIDDEN)
    for layer, module in enumerate(modules):
        plain = module.neurons(hidden)
        assert torch.equal(module.act(module.up(hidden)), plain * factor[layer] + 0.0)
        assert torch.equal(module(hidden), module.down(plain * factor[layer] + 0.0))
    status = runtime.status()
    assert status["layers"] == [0, 1, 2]
    assert set(status["circuits"]) == {FIRST.digest, SECOND.digest}
    assert status["steered_tokens"] == {FIRST.digest: 4, SECOND.digest: 2}

    for req_id in ("a", "b", "plain", "also plain"):
        runtime.remove_request(req_id)
    step(runtime, ("a", 9, 0))
    for module in modules:
        assert torch.equal(module(hidden), module.down(module.neurons(hidden)))
    assert runtime.status()["addresses"] == status["addresses"]


def test_the_proof_leaves_no_trace() -> None:
    runtime = make_runtime([found(i, Mlp()) for i in range(LAYERS)])
    assert not any(runtime.table.layer_masks(layer).any() for layer in range(LAYERS))
    assert (runtime.state.row_slot == -1).all()
    assert (runtime.state.slot_circuits == -1).all()
    assert (runtime.state.slot_multipliers == 1).all()
    assert runtime.status()["circuits"] == []


def test_one_deaf_layer_is_refused() -> None:
    torch.manual_seed(0)
    mlps = [found(0, Mlp()), found(1, Deaf()), found(2, Mlp())]
    with pytest.raises(UnsupportedModelError, match=r"1 of 3 layers.*: 1 \(layers\.1\)"):
        make_runtime(mlps)


@torch.inference_mode()
def test_layers_of_widths_of_their_own() -> None:
    """Between them a layer that has no MLP, which costs nothing and is not listed."""
    torch.manual_seed(0)
    widths = (WIDTH, 0, WIDTH + 7)
    modules = {layer: Mlp(width) for layer, width in enumerate(widths) if width}
    runtime = make_runtime([found(layer, module) for layer, module in modules.items()])
    assert runtime.status()["layers"] == [0, 2]
    circuit = Circuit("m", "A", LAYERS, widths, (Neuron(0, 12), Neuron(2, WIDTH + 6)))
    runtime.load(circuit.packed())
    runtime.add_request("a", resolved((circuit.digest, 3.0), scope="all"), 1)
    step(runtime, ("a", 2, 0))
    hidden = torch.randn(2, HIDDEN)
    for layer, module in modules.items():
        expected = module.neurons(hidden)
        expected[:, widths[layer] - 1] *= 3.0
        assert torch.equal(module.act(module.up(hidden)), expected)


@torch.inference_mode()
def test_recording_of_layers_of_different_width() -> None:
    torch.manual_seed(0)
    modules = [Mlp(), Mlp(WIDTH + 1)]
    mlps = [found(0, modules[0]), found(2, modules[1])]
    runtime = make_runtime(mlps, record=True)
    runtime.add_request("recorded", None, 2, "g")
    hidden = torch.randn(2, HIDDEN)
    step(runtime, ("recorded", 2, 0))
    for module in modules:
        module(hidden)
    taken = runtime.take_recording()
    parts = np.frombuffer(taken["parts"], dtype=np.int32).reshape(-1, 4)
    assert parts.tolist() == [[0, -1, 0, WIDTH], [2, -1, 0, WIDTH + 1]]
    expected = [module.neurons(hidden)[1].double() for module in modules]
    assert np.array_equal(np.frombuffer(taken["groups"]["g"]["sum"]), torch.cat(expected))


@torch.inference_mode()
def test_a_rank_and_a_stage_apply_their_share() -> None:
    torch.manual_seed(0)
    module = Mlp()
    circuit = Circuit("m", "A", 4, 2 * WIDTH, (Neuron(1, 1), Neuron(1, WIDTH), Neuron(3, 15)))
    runtime = make_runtime([found(1, module, offset=WIDTH, total=2 * WIDTH)])
    runtime.load(circuit.packed())
    runtime.add_request("a", resolved((circuit.digest, 3.0), scope="all"), 1)
    step(runtime, ("a", 2, 0))
    hidden = torch.randn(2, HIDDEN)
    expected = module.neurons(hidden)
    expected[:, 0] *= 3.0
    assert torch.equal(module.act(module.up(hidden)), expected)


def test_a_stage_without_layers_has_nothing_to_do() -> None:
    runtime = make_runtime([], record=True)
    runtime.load(FIRST.packed())
    runtime.add_request("a", resolved((FIRST.digest, 0.0)), 2)
    step(runtime, ("a", 2, 0))
    runtime.remove_request("a")
    assert runtime.unload(FIRST.digest)
    assert runtime.status()["layers"] == []


@torch.inference_mode()
def test_recording_through_the_hooks() -> None:
    torch.manual_seed(0)
    modules = [Mlp() for _ in range(LAYERS)]
    runtime = make_runtime([found(i, m) for i, m in enumerate(modules)], record=True)
    runtime.load(FIRST.packed())
    runtime.add_request("steered", resolved((FIRST.digest, 0.0), scope="all"), 3)
    runtime.add_request("recorded", None, 4, "g")
    hidden = torch.randn(5, HIDDEN)
    step(runtime, ("steered", 1, 0), ("recorded", 4, 0))
    for module in modules:
        module(hidden)
    assert runtime.recorder is not None
    taken = runtime.recorder.take()
    sums = np.frombuffer(taken["groups"]["g"]["sum"]).reshape(LAYERS, WIDTH)
    expected = [module.neurons(hidden)[4].double().numpy() for module in modules]
    assert np.array_equal(sums, np.stack(expected))
    assert taken["groups"]["g"]["count"] == 1
