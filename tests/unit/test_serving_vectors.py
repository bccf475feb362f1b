# SPDX-License-Identifier: Apache-2.0
"""Vectors on one rank with plain torch layers: resident, routed, added, proved, recorded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cna_vllm import steer, steer_vector
from cna_vllm.serving.config import CircuitTableError, CnaConfig, CnaConfigError
from cna_vllm.serving.front.adapter import Adapter
from cna_vllm.serving.front.admission import Admission
from cna_vllm.serving.front.registry import Registry, ServedModel
from cna_vllm.serving.worker.gated_mlp import GatedMlp, UnsupportedModelError
from cna_vllm.serving.worker.runtime import SteeringRuntime
from cna_vllm.serving.worker.table import VectorTable
from cna_vllm.steering.circuit import Circuit, Neuron
from cna_vllm.steering.request import SteeringError
from cna_vllm.steering.resolved import Steering
from cna_vllm.steering.shape import Shape
from cna_vllm.steering.vectors import VectorError, VectorSet
from tests.keys import block_key

HIDDEN, WIDTH, LAYERS = 6, 13, 3


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.act = nn.Linear(HIDDEN, 2 * WIDTH, bias=False), nn.Identity()
        self.down = nn.Linear(WIDTH, HIDDEN, bias=False)

    def forward(self, hidden: Tensor) -> Any:
        return self.down(self.act(self.up(hidden)))

    def plain(self, hidden: Tensor) -> Tensor:
        """The output before the module was hooked."""
        gate, up = self.up(hidden).chunk(2, -1)
        result: Tensor = self.down(F.silu(gate) * up)
        return result


class Tuple(Mlp):
    def forward(self, hidden: Tensor) -> Any:
        return super().forward(hidden), None


class Layer(nn.Module):
    """Returns the MLP's output and the stream before it, as vLLM's layers do, or their sum."""

    def __init__(self, deferred: bool = True) -> None:
        super().__init__()
        self.mlp, self.deferred = Mlp(), deferred

    def forward(self, hidden: Tensor) -> Any:
        out = self.mlp(hidden)
        return (out, hidden) if self.deferred else hidden + out


def found(layer: int, module: nn.Module, **more: Any) -> GatedMlp:
    fields = {"width": WIDTH, "offset": 0, "total_width": WIDTH, **more}
    down: Any = module.down
    return GatedMlp(layer, f"layers.{layer}", module, "act", "silu", down, **fields)


def make_runtime(mlps: list[GatedMlp], *, stream: bool = False, **config: Any) -> SteeringRuntime:
    return SteeringRuntime(
        mlps,
        CnaConfig(**{"max_vectors": 2, **config}),
        hidden_size=HIDDEN,
        dtype=torch.float32,
        device=torch.device("cpu"),
        max_num_reqs=4,
        max_num_tokens=32,
        record_stream=stream,
    )


def vector_set(seed: int, layers: tuple[int, ...] = (0, 1, 2)) -> VectorSet:
    rng = np.random.default_rng(seed)
    values = {layer: rng.standard_normal(HIDDEN).astype(np.float32) for layer in layers}
    return VectorSet("mlp", "m", "A", LAYERS, HIDDEN, values)


FIRST, SECOND, THIRD = vector_set(1), vector_set(2, (1,)), vector_set(3)
CIRCUIT = Circuit("m", "A", LAYERS, WIDTH, (Neuron(0, 2), Neuron(2, 12)))


def resolved(circuits: Any, vectors: Any, scope: str) -> Steering:
    return Steering(tuple(circuits), scope, tuple(vectors))


def step(runtime: SteeringRuntime, *batch: tuple[str, int, int]) -> None:
    runtime.prepare_step(
        [b[0] for b in batch], np.array([b[1] for b in batch]), np.array([b[2] for b in batch])
    )


@torch.inference_mode()
def test_every_row_of_a_mixed_batch() -> None:
    torch.manual_seed(0)
    modules = [Mlp() for _ in range(LAYERS)]
    runtime = make_runtime([found(i, m) for i, m in enumerate(modules)])
    runtime.load(CIRCUIT.packed())
    for vectors in (FIRST, SECOND):
        runtime.load(vectors.packed())
    runtime.add_request("v", resolved([], [(FIRST.digest, -2.0)], "last"), 3)
    runtime.add_request(
        "both",
        resolved([(CIRCUIT.digest, 0.0)], [(SECOND.digest, 3.0), (FIRST.digest, 0.5)], "all"),
        9,
    )
    runtime.add_request("c", resolved([(CIRCUIT.digest, 0.0)], [], "all"), 9)
    step(runtime, ("both", 2, 0), ("plain", 2, 0), ("v", 4, 0), ("c", 1, 0))

    hidden = torch.randn(9, HIDDEN)
    for layer, module in enumerate(modules):
        gate, up = module.up(hidden).chunk(2, -1)
        neurons = F.silu(gate) * up
        for index in dict(CIRCUIT.by_layer()).get(layer, ()):
            neurons[[0, 1, 8], index] = 0.0
        expected = module.down(neurons)
        one = torch.from_numpy(FIRST.vectors[layer].copy())
        if layer in SECOND.vectors:
            expected[:2] += 3.0 * torch.from_numpy(SECOND.vectors[layer].copy())
        expected[:2] += 0.5 * one
        expected[6:8] += -2.0 * one
        assert torch.equal(module(hidden), expected)
    status = runtime.status()
    assert set(status["vectors"]) == {FIRST.digest, SECOND.digest}
    counted = {FIRST.digest: 4, SECOND.digest: 2, CIRCUIT.digest: 3}
    assert status["steered_tokens"] == counted

    for req_id in ("v", "both", "c"):
        runtime.remove_request(req_id)
    step(runtime, ("v", 9, 0))
    for module in modules:
        assert torch.equal(module(hidden), module.plain(hidden))
    assert runtime.status()["addresses"] == status["addresses"]


def test_without_max_vectors_nothing_is_added_to_the_model() -> None:
    modules = [Mlp() for _ in range(LAYERS)]
    runtime = make_runtime([found(i, m) for i, m in enumerate(modules)], max_vectors=0)
    for module in modules:
        assert not module._forward_hooks
        assert set(dict(module.named_modules())) == {"", "up", "act", "down"}
    assert set(runtime.recorders) == set()
    with pytest.raises(CnaConfigError, match="max_vectors"):
        runtime.load(FIRST.packed())
    with pytest.raises(ValueError, match="1 vectors, over 0"):
        runtime.add_request("v", resolved([], [(FIRST.digest, 1.0)], "all"), 3)


def test_the_proof_leaves_no_trace() -> None:
    runtime = make_runtime([found(i, Mlp()) for i in range(LAYERS)])
    assert runtime.vectors is not None
    assert not any(runtime.vectors.layer_vectors(layer).any() for layer in range(LAYERS))
    assert (runtime.state.row_slot == -1).all()
    assert (runtime.state.slot_vectors == -1).all()
    assert (runtime.state.slot_coefficients == 0).all()


def test_a_layer_that_does_not_obey_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    deaf = Mlp()
    monkeypatch.setattr(deaf, "register_forward_hook", lambda hook: None)
    for module in (deaf, Tuple()):
        mlps = [found(0, Mlp()), found(1, module), found(2, Mlp())]
        with pytest.raises(UnsupportedModelError, match=r"1 of 3 layers.*: 1 \(layers\.1\)"):
            make_runtime(mlps)


def test_outputs_that_are_not_whole_are_refused() -> None:
    routed = found(1, Mlp(), routed_experts=("layers.1.experts",))
    with pytest.raises(UnsupportedModelError, match=r"layer 1 has routed experts \(layers\.1\.e"):
        make_runtime([routed])
    share = found(1, Mlp(), total_width=2 * WIDTH)
    share.down_proj.reduce_results = False  # type: ignore[assignment]
    with pytest.raises(UnsupportedModelError, match="sum over tensor-parallel ranks"):
        make_runtime([share])
    share.down_proj.reduce_results = True  # type: ignore[assignment]
    make_runtime([found(1, Mlp(), total_width=2 * WIDTH)])


def test_a_request_for_vectors_that_are_gone_holds_nothing() -> None:
    runtime = make_runtime([found(0, Mlp())])
    runtime.load(CIRCUIT.packed())
    with pytest.raises(CircuitTableError, match=r"with vector .* not resident"):
        runtime.add_request("a", resolved([(CIRCUIT.digest, 0.0)], [(FIRST.digest, 1.0)], "all"), 3)
    assert runtime.table.users(CIRCUIT.digest) == 0


def test_rows_outlive_their_unload() -> None:
    table = VectorTable((1, 2), HIDDEN, 2, torch.device("cpu"))
    first, second = table.load(FIRST.packed()), table.load(SECOND.packed())
    assert torch.equal(table.layer_vectors(1)[first], torch.tensor(FIRST.vectors[1]))
    assert not table.layer_vectors(2)[second].any(), "SECOND has no vector for layer 2"
    with pytest.raises(CircuitTableError, match=r"2 vector rows.*cna\.max_vectors"):
        table.load(THIRD.packed())
    held = table.acquire([FIRST.digest])
    table.unload(FIRST.digest)
    with pytest.raises(CircuitTableError):
        table.load(THIRD.packed())
    table.release(held)
    assert table.load(THIRD.packed()) == first
    assert torch.equal(table.layer_vectors(2)[first], torch.tensor(THIRD.vectors[2]))


@pytest.mark.parametrize("deferred", [True, False])
@torch.inference_mode()
def test_outputs_and_the_stream_are_recorded(deferred: bool) -> None:
    torch.manual_seed(0)
    layers = [Layer(deferred) for _ in range(LAYERS)]
    mlps = [found(i, layer.mlp, decoder=layer) for i, layer in enumerate(layers)]
    runtime = make_runtime(mlps, record=True, stream=True)
    runtime.load(FIRST.packed())
    hidden = torch.randn(5, HIDDEN)
    for what in ("mlp", "residual", "neurons", "mlp"):
        runtime.start_recording(what=what)
        runtime.add_request("steered", resolved([], [(FIRST.digest, 9.0)], "all"), 3)
        runtime.add_request("recorded", None, 4, "g")
        step(runtime, ("steered", 1, 0), ("recorded", 4, 0))
        for layer in layers:
            layer(hidden)
        for req_id in ("steered", "recorded"):
            runtime.remove_request(req_id)
        taken = runtime.take_recording()
        assert taken["groups"]["g"]["count"] == 1
        if what != "neurons":
            parts = np.frombuffer(taken["parts"], dtype=np.int32).reshape(-1, 4)
            assert parts[:, 1:].tolist() == [[-1, 0, HIDDEN]] * LAYERS
            sums = np.frombuffer(taken["groups"]["g"]["sum"]).reshape(LAYERS, HIDDEN)
            before = hidden[4] if what == "residual" else torch.zeros(HIDDEN)
            rows = [before + layer.mlp.plain(hidden)[4] for layer in layers]
            assert np.array_equal(sums, torch.stack(rows).double().numpy())


def test_what_is_not_recorded_is_told() -> None:
    runtime = make_runtime([found(0, Mlp())], record=True, stream=False)
    with pytest.raises(RuntimeError, match="does not record residual"):
        runtime.start_recording(what="residual")
    runtime = make_runtime([found(0, Mlp())])
    for call in (runtime.start_recording, runtime.take_recording):
        with pytest.raises(RuntimeError, match=r"cna\.record"):
            call()


SERVED = ServedModel("served", "A", Shape.of(LAYERS, WIDTH), HIDDEN)


def make_admission() -> Admission:
    registry = Registry(SERVED)
    registry.register("off", CIRCUIT)
    registry.register("v", FIRST)
    return Admission(CnaConfig(max_vectors=2), registry)


def test_admission_resolves_vectors_and_keys_blocks_by_them() -> None:
    gate = make_admission()
    asked = {**steer("off", 0.0, scope="all"), **steer_vector("v", -1.0, scope="all"), "other": 1}
    admitted = gate.admit(asked)
    assert admitted is not None and admitted["other"] == 1
    assert Steering.from_field(admitted["cna_resolved"]) == Steering(
        ((CIRCUIT.digest, 0.0),), "all", ((FIRST.digest, -1.0),)
    )
    alone = gate.admit(steer_vector("v", -1.0, scope="generated"))
    keys = {block_key(fields, 8, 32) for fields in (admitted, alone)}
    assert len(keys) == 2 and None not in keys
    assert block_key(alone, 32, 32) is None
    assert gate.admit(steer_vector("v", 0.0)) == {}
    for fields, says in (
        (steer_vector("w", 0.0), "no vector is named 'w'; known vectors: v"),
        (steer_vector([("v", 1.0)] * 3), "at most 2"),
        (steer_vector("v", 1001.0), "over the limit"),
    ):
        with pytest.raises(SteeringError, match=says):
            gate.admit(fields)


def test_circuits_and_vectors_share_one_space_of_names() -> None:
    registry = make_admission().registry
    registry.register("french", Adapter.parse("off@0"))
    registry.check_free("new", "circuit")
    registry.check_free("off", "circuit")  # to be replaced
    held = {"off": "circuit", "v": "vector", "french": "adapter"}
    for name, kind in held.items():
        for other in set(held.values()) - {kind}:
            with pytest.raises(CnaConfigError, match=f"that of an? {kind}; choose another"):
                registry.check_free(name, other)  # type: ignore[arg-type]
        with pytest.raises(CnaConfigError, match=f"served model, and of an? {kind} too"):
            registry.reserve([name])
    with pytest.raises(CnaConfigError, match="that of a served model"):
        registry.check_free("french", "adapter")
    assert registry.names().digests() == {CIRCUIT.digest: "off", FIRST.digest: "v"}
    with pytest.raises(CnaConfigError, match="'v' is that of a vector"):
        registry.register("v", CIRCUIT)


def test_the_registry_refuses_what_does_not_fit(tmp_path: Path) -> None:
    registry = Registry(SERVED)
    with pytest.raises(VectorError, match="do not fit 'served'"):
        registry.register("v", VectorSet("mlp", "m", "A", 9, HIDDEN, FIRST.vectors))
    with pytest.raises(VectorError, match="'residual' is not supported for A"):
        registry.register("v", VectorSet("residual", "m", "A", LAYERS, HIDDEN, SECOND.vectors))
    with pytest.raises(CnaConfigError):
        registry.register("", FIRST)
    assert registry.names().vectors == {}
    path = tmp_path / "v.safetensors"
    FIRST.save(path)
    registry = Registry.from_config(CnaConfig(vectors={"v": str(path)}, max_vectors=1), SERVED)
    assert registry.digest("vector", "v") == FIRST.digest


@pytest.mark.parametrize(
    ("section", "says"),
    [
        ({"vectors": {"v": "v.st"}}, r"1 sets of vectors, more than cna\.max_vectors = 0"),
        ({"vectors": ["v"]}, r"cna\.vectors must map names to vector files"),
        ({"vectors": {"v": 7}, "max_vectors": 1}, r"cna\.vectors\['v'\] must be the path"),
        ({"vectors": {"": "v"}, "max_vectors": 1}, "1 to 128 printable"),
        ({"max_vectors": -1}, r"cna\.max_vectors must be a whole number of at least 0"),
        ({"max_vectors": True}, r"cna\.max_vectors"),
        ({"max_vectors_per_request": 0}, r"cna\.max_vectors_per_request"),
        (
            {"circuits": {"x": "x.json"}, "vectors": {"x": "x.st"}, "max_vectors": 1},
            "name of a circuit",
        ),
    ],
)
def test_configuration_is_checked(section: dict[str, Any], says: str) -> None:
    with pytest.raises(CnaConfigError, match=says):
        CnaConfig.from_additional_config({"cna": section})


def test_configuration_of_vectors() -> None:
    config = CnaConfig.from_additional_config(
        {"cna": {"vectors": {"v": Path("f") / "v.st"}, "max_vectors": 3}}
    )
    assert config is not None
    assert config.vectors == {"v": str(Path("f") / "v.st")}
    assert (config.max_vectors, config.max_vectors_per_request) == (3, 2)
