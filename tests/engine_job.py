# SPDX-License-Identifier: Apache-2.0
"""A real vLLM engine in a process of its own: a list of steps in, their results out.

One process per engine keeps environment, compile caches and patched modules apart, and lets the
GPU model runner run on a CPU through Triton's interpreter, which must be chosen before vLLM is
imported.
"""

from __future__ import annotations

import asyncio
import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from tests.engine_forks import forks
from tests.processes import python_path

V1: Mapping[str, str] = {"VLLM_USE_V2_MODEL_RUNNER": "0"}
"""The engine core in a process of its own, as `LLM` has it: it imports vLLM once more."""
V1_HERE: Mapping[str, str] = {**V1, "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
V2: Mapping[str, str] = {
    "VLLM_USE_V2_MODEL_RUNNER": "1",
    "TRITON_INTERPRET": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
}

OVERLAPS = """
from vllm.platforms.cpu import CpuPlatform
update = CpuPlatform.check_and_update_config
def check_and_update_config(cls, config):
    wanted = config.scheduler_config.async_scheduling
    update(config)
    config.scheduler_config.async_scheduling = wanted
CpuPlatform.check_and_update_config = classmethod(check_and_update_config)
"""
"""Set-up: vLLM turns asynchronous scheduling off on a CPU, whatever was asked; V2 has it there."""


class EngineFailed(AssertionError):
    """The engine's process ended with an error; carries its output."""


def run_engine(
    engine: Mapping[str, Any],
    steps: Sequence[Mapping[str, Any]],
    *,
    env: Mapping[str, str] = V1_HERE,
    setup: str = "",
    timeout: int = 900,
) -> list[Any]:
    """Starts ``LLM(**engine)``, runs ``steps`` in order and returns one result per step.

    steps: {"op": "generate", "requests": [{"prompt": ids, "params": {...}}]} -> outputs with
    token_ids and cached tokens; {"op": "load" | "unload" | "status" | "classes" | ...}.
    setup: Python source run before the engine is built (to register a test's own model).
    """
    with tempfile.TemporaryDirectory() as folder:
        job, result = Path(folder) / "job.json", Path(folder) / "result.json"
        job.write_text(json.dumps({"engine": dict(engine), "steps": list(steps), "setup": setup}))
        ended = forks("TRITON_INTERPRET" in env).run(
            "tests.engine_job:run_job",
            [str(job), str(result)],
            environment(
                **{"TORCH_COMPILE_DISABLE": "1" if engine.get("enforce_eager") else "0", **env}
            ),
            timeout,
        )
        if ended.status != 0 or not result.exists():
            raise EngineFailed(f"engine ended with {ended.status}\n{ended.output[-20000:]}")
        return json.loads(result.read_text())


def environment(**more: str) -> dict[str, str]:
    """Of a process that has an engine."""
    return {
        **os.environ,
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_LOGGING_LEVEL": "WARNING",
        "HF_HUB_OFFLINE": "1",
        "TORCH_COMPILE_DISABLE": "1",  # even an eager engine has a function compiled: 28 s
        "PYTHONPATH": python_path(),
        **own_core(),
        **more,
    }


def own_core() -> dict[str, str]:
    """Under pytest-xdist, a core for each worker's engines; left alone, all bind to the same."""
    worker = os.environ.get("PYTEST_XDIST_WORKER")
    if worker is None:
        return {}
    return {
        "VLLM_CPU_OMP_THREADS_BIND": str(int(worker.removeprefix("gw")) % (os.cpu_count() or 1))
    }


def stand_in_driver() -> None:
    """Triton has no CPU driver; vLLM only wants to see one that is active."""
    from types import SimpleNamespace

    import triton

    from tests.quick_interpreter import quicken

    quicken()

    driver = SimpleNamespace(is_active=lambda: True)
    triton.backends.backends["cpu"] = SimpleNamespace(driver=driver, compiler=None)


def _plain(output: Any) -> dict[str, Any]:
    result: dict[str, Any] = {
        "token_ids": [list(o.token_ids) for o in output.outputs],
        "prompt": list(output.prompt_token_ids),
        "cached": output.num_cached_tokens,
    }
    if output.outputs[0].finish_reason == "error":
        result["error"] = output.outputs[0].stop_reason
    if output.outputs[0].logprobs is not None:
        # Hexadecimal, so that a comparison is to the last bit.
        result["logprobs"] = [
            sorted((token, value.logprob.hex()) for token, value in step.items())
            for step in output.outputs[0].logprobs
        ]
    return result


def _seen(request: Mapping[str, Any]) -> dict[str, Any]:
    """The image of a request that names the file of one."""
    if not request.get("image"):
        return {}
    from PIL import Image

    return {"multi_modal_data": {"image": Image.open(request["image"])}}


class _Steps:
    def __init__(self, engine: Mapping[str, Any]) -> None:
        self.engine = engine

    @cached_property
    def llm(self) -> Any:
        from vllm import LLM

        return LLM(**self.engine)

    def generate(self, requests: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        from vllm import SamplingParams, TokensPrompt

        prompts = [TokensPrompt(prompt_token_ids=r["prompt"], **_seen(r)) for r in requests]
        params = [SamplingParams(**{"temperature": 0.0, **r.get("params", {})}) for r in requests]
        outputs = self.llm.generate(prompts, params, use_tqdm=False)
        return [_plain(output) for output in outputs]

    def stream(self, requests: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """The same through AsyncLLM, all requests at once, outputs as they come."""
        from vllm import SamplingParams, TokensPrompt
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.sampling_params import RequestOutputKind
        from vllm.v1.engine.async_llm import AsyncLLM

        engine = AsyncLLM.from_engine_args(AsyncEngineArgs(**self.engine))

        async def one(index: int, request: Mapping[str, Any]) -> dict[str, Any]:
            params = SamplingParams(
                temperature=0.0, output_kind=RequestOutputKind.DELTA, **request["params"]
            )
            tokens: list[int] = []
            pieces = 0
            async for output in engine.generate(
                TokensPrompt(prompt_token_ids=request["prompt"]), params, f"stream-{index}"
            ):
                tokens += output.outputs[0].token_ids
                pieces += 1
            return {"token_ids": [tokens], "pieces": pieces}

        async def everything() -> list[dict[str, Any]]:
            return await asyncio.gather(*(one(i, r) for i, r in enumerate(requests)))

        try:
            return asyncio.run(everything())
        finally:
            engine.shutdown()

    def refused(self, requests: Sequence[Mapping[str, Any]]) -> list[str]:
        """The error text of each request, "" where it was accepted."""
        messages = []
        for request in requests:
            try:
                self.generate([request])
            except Exception as error:
                messages.append(f"{type(error).__name__}: {error}")
            else:
                messages.append("")
        return messages

    def load(self, name: str, circuit: Mapping[str, Any]) -> str:
        from cna_vllm import Circuit
        from cna_vllm.serving.control import load_circuit

        return load_circuit(self.llm, name, Circuit.from_dict(circuit)).digest

    def unload(self, name: str) -> None:
        from cna_vllm.serving.control import unload_circuit

        unload_circuit(self.llm, name)

    def load_vectors(self, name: str, path: str) -> str:
        from cna_vllm.serving.control import list_vectors, load_vectors

        digest = load_vectors(self.llm, name, path).digest
        assert list_vectors(self.llm)[name].digest == digest
        return digest

    def mean_difference(
        self, positive: Sequence[Sequence[int]], negative: Sequence[Sequence[int]], form: str
    ) -> Any:
        """[layers, hidden_size], as lists."""
        from cna_vllm.baselines import mean_difference

        ids = [[list(p) for p in prompts] for prompts in (positive, negative)]
        return mean_difference(self.llm, *ids, form=form).tolist()

    def status(self) -> list[dict[str, Any]]:
        from cna_vllm.serving.control import status

        return status(self.llm)

    def self_test(self) -> list[dict[str, Any]]:
        from cna_vllm.serving.doctor.selftest import self_test

        return [vars(check) for check in self_test(self.llm)]

    def run(self, code: str) -> None:
        """Python source that sees the engine as ``llm``."""
        exec(code, {"llm": self.llm})

    def metric(self, name: str) -> int:
        return int(sum(m.value for m in self.llm.get_metrics() if m.name == name))

    def classes(self) -> list[str]:
        """Class names of the model's modules and of the runner, in order."""

        def names(worker: Any) -> list[str]:
            runner = worker.model_runner
            state = getattr(runner, "model_state", None)
            modules = runner.get_model().modules()
            return [type(runner).__qualname__, type(state).__qualname__] + [
                f"{type(m).__module__}.{type(m).__qualname__}" for m in modules
            ]

        return self.llm.collective_rpc(names)[0]

    def hooks(self) -> list[list[str]]:
        """Per steering hook, in layer order: the class it is in, and its activation."""

        def names(worker: Any) -> list[list[str]]:
            from cna_vllm.serving.worker.activation import SteeredActAndMul

            return [
                [type(owner).__name__, child.activation]
                for owner in worker.model_runner.get_model().modules()
                for child in owner.children()
                if isinstance(child, SteeredActAndMul)
            ]

        return self.llm.collective_rpc(names)[0]

    def record(self, groups: Mapping[str, Sequence[Sequence[int]]]) -> dict[str, Any]:
        """Per group of token-id prompts, the mean recorded activation [layers, width]."""
        from cna_vllm.discovery.prefill import prefill

        requests = [(list(p), name) for name, prompts in groups.items() for p in prompts]
        counts = {name: len(prompts) for name, prompts in groups.items()}
        return self._means(prefill(self.llm, requests), counts)

    def _means(self, reports: Sequence[Any], counts: Mapping[str, int]) -> dict[str, Any]:
        """Per group, of each layer the mean of each neuron."""
        from cna_vllm.discovery import layout_of
        from cna_vllm.discovery.shares import assemble

        layout = layout_of(self.llm)
        means = assemble(reports, counts, layout)
        return {
            name: [values.tolist() for values in layout.by_layer(found.mean)]
            for name, found in means.items()
        }

    def record_among(
        self,
        recorded: Mapping[str, Sequence[Sequence[int]]],
        others: Sequence[Mapping[str, Any]],
    ) -> dict[str, Any]:
        """``record`` with other requests between the recorded ones, all in one batch."""
        requests = [
            {"prompt": p, "params": {"max_tokens": 1, "extra_args": {"cna_record": name}}}
            for name, prompts in recorded.items()
            for p in prompts
        ]
        mixed, at = list(others), []
        for i, request in enumerate(requests):
            at.append(min(2 * i, len(mixed)))
            mixed.insert(at[-1], request)
        self.llm.collective_rpc("cna_start_recording", args=({},))
        outputs = self.generate(mixed)
        counts = {name: len(prompts) for name, prompts in recorded.items()}
        reports = self.llm.collective_rpc("cna_take_recording")
        return {
            "means": self._means(reports, counts),
            "others": [output for i, output in enumerate(outputs) if i not in at],
        }

    def activations(self, prompts: Sequence[str], **options: Any) -> dict[str, Any]:
        """``record_activations``, rows as lists."""
        from cna_vllm.discovery import record_activations

        rows = record_activations(self.llm, prompts, **options)
        return {str(layer): values.tolist() for layer, values in rows.items()}

    def discover(self, positive: Sequence[str], negative: Sequence[str], **options: Any) -> Any:
        """The circuit's object; or, when the prompts are refused, the message."""
        from cna_vllm.discovery import DiscoveryError, UniversalRule, discover

        if "rule" in options:
            options["rule"] = UniversalRule(**options["rule"])
        try:
            return discover(self.llm, positive, negative, **options).to_dict()
        except DiscoveryError as error:
            return str(error)


def run_job(job_path: str, result_path: str) -> None:
    """What `run_engine` has a process do."""
    job = json.loads(Path(job_path).read_text())
    exec(job["setup"], {"__name__": "setup"})
    steps = _Steps(job["engine"])
    results = []
    for step in job["steps"]:
        arguments = dict(step)
        results.append(getattr(steps, arguments.pop("op"))(**arguments))
    Path(result_path).write_text(json.dumps(results))
