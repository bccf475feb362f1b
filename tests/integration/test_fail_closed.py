# SPDX-License-Identifier: Apache-2.0
"""Nothing runs silently unsteered: bad requests, files, models and engines are refused."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest

from tests import tiny_models
from tests.architectures import ARCHITECTURES
from tests.engine_job import V1_HERE, V2, EngineFailed, run_engine
from tests.integration.conftest import PLAIN, Subject
from tests.oracles import assert_token_exact

pytestmark = pytest.mark.engine

# request fields -> what the message must say
BAD_REQUESTS: list[tuple[dict[str, object], str]] = [
    ({"cna_circuit": "nope", "cna_multiplier": 0.0}, "cna_circuit: no circuit is named 'nope'"),
    ({"cna_circuit": 7, "cna_multiplier": 0.0}, "cna_circuit: must be a circuit's name"),
    ({"cna_circuit": "one", "cna_multiplier": "0"}, "cna_multiplier: must be a number"),
    ({"cna_circuit": "one", "cna_multiplier": True}, "cna_multiplier: must be a number"),
    ({"cna_circuit": "one"}, "cna_multiplier: missing"),
    ({"cna_multiplier": 0.0}, "cna_circuit: missing"),
    ({"cna_circuit": ["one", "two"], "cna_multiplier": [0.0]}, "equal length"),
    ({"cna_circuit": ["one"] * 5, "cna_multiplier": [0.5] * 5}, "5 circuits on one request"),
    ({"cna_circuit": [], "cna_multiplier": []}, "cna_circuit: is an empty list"),
    ({"cna_circuit": "one", "cna_multiplier": float("nan")}, "cna_multiplier: must be finite"),
    ({"cna_circuit": "one", "cna_multiplier": float("-inf")}, "cna_multiplier: must be finite"),
    ({"cna_circuit": "one", "cna_multiplier": 1001}, "cna_multiplier: 1001 is over the limit"),
    ({"cna_circuit": "one", "cna_multiplier": 0.0, "cna_scope": "first"}, "cna_scope: must be"),
    ({"cna_circut": "one", "cna_multiplier": 0.0}, "did you mean cna_circuit?"),
    ({"cna_resolved": {"circuits": [["0" * 64, 0.0]], "scope": "all"}}, "set by the server only"),
    ({"cna_record": "positive"}, "cna_record: this engine does not record"),
]


def test_bad_requests_never_reach_the_engine(tiny: Subject) -> None:
    """Each is refused by vLLM's validation error that names the field; then all still works."""
    (prompt,) = tiny_models.prompts(1)
    bad = [{"prompt": prompt, "params": {"extra_args": fields}} for fields, _ in BAD_REQUESTS]
    arms = [PLAIN, tiny.arm(("one", 0.0))]
    good, wanted = tiny.requests([prompt], arms, max_tokens=8, ignore_eos=True)
    messages, outputs = run_engine(
        tiny.config(), [{"op": "refused", "requests": bad}, {"op": "generate", "requests": good}]
    )
    for (fields, expected), message in zip(BAD_REQUESTS, messages, strict=True):
        assert message.startswith("VLLMValidationError: cna_"), (fields, message)
        assert expected in message, (fields, message)
        assert "\n" not in message
    assert_token_exact(tiny.verdicts(wanted, outputs), "after refused requests")


def test_steering_is_refused_by_an_engine_without_circuits(tiny: Subject) -> None:
    """The plugin is installed, the engine is not configured: asking to steer is an error."""
    request = tiny.requests(tiny_models.prompts(1), [tiny.arm(("one", 0.0))])[0]
    (messages,) = run_engine(
        tiny.config(additional_config={}), [{"op": "refused", "requests": request}]
    )
    assert "this engine was started without circuits" in messages[0]


def test_an_unconfigured_engine_is_plain_vllm(tiny: Subject) -> None:
    """Installed but not configured: the same classes and outputs as without the plugin."""
    requests, _ = tiny.requests(
        tiny_models.prompts(4), [PLAIN], max_tokens=16, ignore_eos=True, logprobs=2
    )
    steps = [{"op": "classes"}, {"op": "generate", "requests": requests}]
    engine = tiny.config(additional_config={})
    installed = run_engine(engine, steps)
    absent = run_engine(engine, steps, env={**V1_HERE, "VLLM_PLUGINS": ""})
    assert installed == absent
    configured = run_engine(tiny.config(), steps)
    assert configured[0] != absent[0], "the comparison of classes must be able to fail"
    assert configured[1] == absent[1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_layers": 5}, "'num_layers' is 5"),
        ({"intermediate_size": 97}, "97"),
        ({"architecture": "MistralForCausalLM"}, "MistralForCausalLM"),
        ({"neurons": []}, "neurons"),
        ({"format": "other"}, "format"),
    ],
)
def test_bad_circuit_files_stop_the_start(
    tiny: Subject, tmp_path: Path, change: dict[str, object], message: str
) -> None:
    """A circuit of another model, or no circuit: the engine does not start, and says why."""
    file = tmp_path / "bad.json"
    circuit = tiny_models.circuit_object(tiny.circuits["one"])
    file.write_text(json.dumps({**circuit, **change}))
    config = {"cna": {"circuits": {"bad": str(file)}}}
    with pytest.raises(EngineFailed) as failure:
        run_engine(tiny.config(additional_config=config), [{"op": "status"}])
    assert message in str(failure.value)


BYPASS = """
import torch.nn.functional as F
from vllm.model_executor.models import llama
from vllm import ModelRegistry

class DeafMLP(llama.LlamaMLP):
    def forward(self, x):
        x, _ = self.gate_up_proj(x)
        gate, up = x.chunk(2, -1)
        x, _ = self.down_proj(F.silu(gate) * up)
        return x

class DeafForCausalLM(llama.LlamaForCausalLM):
    def __init__(self, *, vllm_config, prefix=""):
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        self.model.layers[2].mlp.__class__ = DeafMLP

ModelRegistry.register_model("LlamaForCausalLM", DeafForCausalLM)
"""


@pytest.mark.parametrize("runner", [V1_HERE, V2], ids=["V1", "V2-interpreted"])
def test_start_refuses_a_layer_that_goes_around_its_hook(tiny: Subject, runner) -> None:
    """A model whose third layer computes its activation by itself would run unsteered there."""
    with pytest.raises(EngineFailed) as failure:
        run_engine(tiny.config(), [{"op": "status"}], env=runner, setup=BYPASS)
    assert "1 of 4 layers do not obey the steering hook: 2 (model.layers.2.mlp)" in str(
        failure.value
    )


def test_unsupported_models_are_refused(tmp_path: Path) -> None:
    """Routed experts that are left as they are, or that vectors would leave out, and models without
    an MLP: refused by name when circuits are configured."""
    for model, cna, reason in (
        (
            tiny_models.mixtral(tmp_path / "moe"),
            {"max_expert_neurons": 0},
            "all of routed experts, which cna.max_expert_neurons = 0 leaves as they are",
        ),
        (tmp_path / "moe", {"max_vectors": 1}, "layer 0 (model.layers.0) has no dense MLP"),
        (
            ARCHITECTURES["qwen2_moe"].save(tmp_path / "shared"),
            {"max_vectors": 1},
            "layer 0 has routed experts",
        ),
        (tiny_models.mamba(tmp_path / "mamba"), {}, "has no MLP in any layer"),
    ):
        engine = {
            "model": str(model),
            "skip_tokenizer_init": True,
            "dtype": "float32",
            "enforce_eager": True,
            "max_model_len": 128,
            "additional_config": {"cna": cna},
        }
        with pytest.raises(EngineFailed) as failure:
            run_engine(engine, [{"op": "status"}])
        assert reason in str(failure.value)


AFTER = """
from vllm import LLM, SamplingParams
plain = LLM(**{engine!r})
params = SamplingParams(max_tokens=2, temperature=0.0)
(output,) = plain.generate([{{"prompt_token_ids": [3, 4, 5]}}], params)
assert len(output.outputs[0].token_ids) == 2
"""


@pytest.mark.parametrize("runner", [V1_HERE, V2], ids=["V1", "V2"])
def test_a_plain_engine_after_a_steered_one_in_one_process(
    tiny: Subject, runner: Mapping[str, str]
) -> None:
    engine = tiny.config()
    plain = {key: value for key, value in engine.items() if key != "additional_config"}
    run_engine(engine, [{"op": "run", "code": AFTER.format(engine=plain)}], env=runner)


ASLEEP = """
from cna_vllm import Circuit, Neuron
from cna_vllm.serving.config import CircuitTableError
from cna_vllm.serving.control import list_circuits, load_circuit, status
from cna_vllm.serving.seams.front_end import admission_of
served = admission_of(llm).registry.served
for level in (1, 2):
    new = Circuit(**served.of_circuits(), neurons=(Neuron(0, level),))
    held = status(llm)[0]["resident"]
    llm.sleep(level=level)
    try:
        load_circuit(llm, f"new {level}", new)
    except CircuitTableError as error:
        assert "wake it up" in str(error)
    else:
        raise AssertionError("a load into memory that is elsewhere")
    assert f"new {level}" not in list_circuits(llm)
    llm.wake_up()
    assert status(llm)[0]["resident"] == held
    load_circuit(llm, f"new {level}", new)
"""


@pytest.mark.parametrize("runner", [V1_HERE, V2], ids=["V1", "V2"])
def test_nothing_is_loaded_into_an_engine_that_sleeps(
    tiny: Subject, runner: Mapping[str, str]
) -> None:
    run_engine(tiny.config(), [{"op": "run", "code": ASLEEP}], env=runner)
