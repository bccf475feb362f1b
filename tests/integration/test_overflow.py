# SPDX-License-Identifier: Apache-2.0
"""A request that overflows ends with an error, and no other request's bits change: neither beside
it nor after it, in blocks that were its own. And one that was not steered as asked ends too."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from tests import tiny_models
from tests.engine_job import OVERLAPS, V1_HERE, V2, run_engine
from tests.integration.conftest import Subject
from tests.server import serve
from tests.vector_files import random_vectors, save_vectors

pytestmark = pytest.mark.engine

ALL = tiny_models.WIDTH  # neurons a layer: circuits that share all of them multiply
MILLION = 1e6  # the largest limit that an operator may set
GENTLE = {"cna_circuit": "some", "cna_multiplier": 0.5, "cna_scope": "all"}
OVERFLOW = "cna_multiplier: the steered activations left the range of "


def harmful(circuits: int, multiplier: float) -> dict[str, Any]:
    names = [f"all{i}" for i in range(circuits)]
    return {"cna_circuit": names, "cna_multiplier": [multiplier] * circuits, "cna_scope": "all"}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, str]:
    """Four circuits of all neurons, that differ in nothing but a neuron, and a small one."""
    folder = tmp_path_factory.mktemp("circuits")
    found = {}
    for name, per_layer, seed in [*((f"all{i}", ALL - i, i) for i in range(4)), ("some", 9, 7)]:
        channels = tiny_models.channels(tiny_models.LAYERS, tiny_models.WIDTH, per_layer, seed)
        found[name] = str(folder / f"{name}.json")
        Path(found[name]).write_text(json.dumps(tiny_models.circuit_object(channels)))
    return found


def engine(tiny: Subject, files: Mapping[str, str], dtype: str, **options: Any) -> dict[str, Any]:
    section = {"circuits": dict(files), "max_multiplier": MILLION}
    return {
        **tiny.config(dtype=dtype, max_num_seqs=8, max_model_len=128, block_size=32, **options),
        "additional_config": {"cna": section},
    }


def batch(
    prompts: list[list[int]], fields: Mapping[str, Any] | None, tokens: int
) -> list[dict[str, Any]]:
    """Plain and gently steered requests, and between them two of ``fields``."""
    asked = [None, fields, GENTLE, None, fields, GENTLE, None, None]
    params = {"max_tokens": tokens, "ignore_eos": True, "logprobs": 2}
    return [
        {"prompt": p, "params": {**params, **({"extra_args": dict(f)} if f else {})}}
        for p, f in zip(prompts, asked, strict=True)
    ]


# The last one twice: the second time its blocks must not be found as sound ones.
HARM = [(1, 1000.0), (2, 1000.0), (3, 1000.0), (1, MILLION), (4, MILLION), (4, MILLION)]
NEIGHBOURS = (0, 2, 3, 5, 6, 7)


@pytest.mark.parametrize(
    ("dtype", "cache", "runner", "options"),
    [
        ("float16", False, V1_HERE, {}),
        ("float16", True, V1_HERE, {}),
        ("float16", True, V1_HERE, {"max_num_batched_tokens": 32}),
        ("bfloat16", False, V1_HERE, {}),
        ("bfloat16", True, V1_HERE, {}),
        ("float16", True, V2, {}),
        ("bfloat16", False, V2, {"async_scheduling": True}),
    ],
    ids=lambda value: "V2" if value is V2 else "V1" if value is V1_HERE else str(value),
)
def test_others_keep_their_bits(
    tiny: Subject,
    files: Mapping[str, str],
    dtype: str,
    cache: bool,
    runner: Mapping[str, str],
    options: Mapping[str, Any],
) -> None:
    """Of 8 requests two overflow, or nearly so; there are too few blocks for all, so that those
    of the ones that ended are soon others'. 544 requests beside and after, over all rows."""
    harm = HARM[-2:] if runner is V2 else HARM
    prompts = tiny_models.prompts(8, longest=40)
    config = engine(
        tiny, files, dtype, enable_prefix_caching=cache, num_gpu_blocks_override=14, **options
    )
    quiet = batch(prompts, None, tokens := 6 if runner is V2 else 24)
    steps = [{"op": "generate", "requests": quiet}]
    for circuits, multiplier in harm:
        mixed = batch(prompts, harmful(circuits, multiplier), tokens)
        steps += [{"op": "generate", "requests": mixed}, {"op": "generate", "requests": quiet}]
    usual, *results = run_engine(config, steps, env=runner, setup=OVERLAPS)
    for output in usual:
        output.pop("cached")
    ended = 0
    for (circuits, multiplier), beside, after in zip(
        harm, results[::2], results[1::2], strict=True
    ):
        for output in (*beside, *after):
            output.pop("cached")
        told = f"{circuits} circuits at {multiplier}"
        for i in NEIGHBOURS:
            assert beside[i] == usual[i], f"beside {told}"
        assert after == usual, f"after {told}"
        for i in (1, 4):
            if "error" in beside[i]:
                assert beside[i]["error"].startswith(OVERFLOW + dtype)
                assert beside[i]["token_ids"] == [[]] and "logprobs" not in beside[i]
                ended += 1
            else:
                assert beside[i] != usual[i], "steered without an effect"
    assert ended >= 4, "nothing overflowed: this proves nothing"
    assert results[-2] == results[-4]


# Requests leave when their first step was scheduled and nothing is known of it yet.
ABORTS = """
from vllm import SamplingParams, TokensPrompt
engine = llm.llm_engine
core = engine.engine_core.engine_core
assert core.batch_queue is not None, "one step at a time: this proves nothing"
for i, request in enumerate({requests!r}):
    params = SamplingParams(temperature=0.0, detokenize=False, **request["params"])
    engine.add_request(str(i), TokensPrompt(prompt_token_ids=request["prompt"]), params)
engine.step()
in_flight = [r for r in core.scheduler.requests.values() if r.num_in_flight_tokens]
assert any(r.request_id.split("-")[0] in ("1", "4") for r in in_flight), "nothing is in flight"
engine.abort_request(["1", "4"])
while engine.has_unfinished_requests():
    engine.step()
"""


def test_an_abort_before_the_step_is_known(tiny: Subject, files: Mapping[str, str]) -> None:
    """Blocks of a step that is in flight are taken for unsound: no report of it is waited for."""
    options = {"enable_prefix_caching": False, "async_scheduling": True}
    config = engine(tiny, files, "float16", num_gpu_blocks_override=14, **options)
    prompts = tiny_models.prompts(8, longest=40)
    quiet = {"op": "generate", "requests": batch(prompts, None, 4)}
    mixed = batch(prompts, harmful(1, MILLION), 4)
    aborts = {"op": "run", "code": ABORTS.format(requests=mixed)}
    usual, _, after = run_engine(config, [quiet, aborts, quiet], env=V2, setup=OVERLAPS)
    assert after == usual


def test_vectors_overflow_alike(tiny: Subject, files: Mapping[str, str], tmp_path: Path) -> None:
    """A steering vector far too large: the same end, and the same safety of others."""
    vectors = random_vectors("mlp", range(tiny_models.LAYERS), seed=1, scale=1.0)
    config = engine(tiny, files, "float16", num_gpu_blocks_override=14)
    config["additional_config"]["cna"]["max_vectors"] = 1
    config["additional_config"]["cna"]["vectors"] = save_vectors(tmp_path, {"v": vectors})
    prompts = tiny_models.prompts(8, longest=40)
    quiet = batch(prompts, None, 16)
    fields = {"cna_vector": "v", "cna_coefficient": MILLION, "cna_scope": "all"}
    steps = [{"op": "generate", "requests": r} for r in (quiet, batch(prompts, fields, 16), quiet)]
    usual, beside, after = run_engine(config, steps)
    assert [o["token_ids"] for o in after] == [o["token_ids"] for o in usual]
    assert [beside[i].get("logprobs") for i in NEIGHBOURS] == [
        usual[i]["logprobs"] for i in NEIGHBOURS
    ]
    assert all(beside[i]["error"].startswith(OVERFLOW) for i in (1, 4))


# A runner whose count of computed tokens lags by one, as a batch that is read too early has it.
LAGS = """
from cna_vllm.serving.worker.state import SteeringState
fill = SteeringState.fill
SteeringState.fill = lambda self, ids, tokens, computed: fill(self, ids, tokens, computed - 1)
"""


@pytest.mark.parametrize("scope", ["last", "generated"])
def test_what_is_not_steered_as_asked_is_no_answer(
    tiny: Subject, files: Mapping[str, str], scope: str
) -> None:
    fields = {"cna_circuit": "some", "cna_multiplier": 0.0, "cna_scope": scope}
    prompts = tiny_models.prompts(8, longest=40)
    requests = batch(prompts, fields, 8)
    config = engine(tiny, files, "float32")
    (outputs,) = run_engine(config, [{"op": "generate", "requests": requests}], setup=LAGS)
    for i in (1, 4):
        assert "steered 0 token rows of a step in place of 1" in outputs[i]["error"]
        assert outputs[i]["token_ids"] == [[]]
    for i in (0, 3, 6, 7):
        assert "error" not in outputs[i] and len(outputs[i]["token_ids"][0]) == 8


def test_over_http(tiny: Subject, files: Mapping[str, str], tmp_path: Path) -> None:
    """The client reads why, streamed or not; the metrics count it."""
    model = tiny_models.add_tokenizer(tiny_models.llama(tmp_path / "model"))
    given = [x for name, path in files.items() for x in ("--circuit", f"{name}={path}")]
    arguments = [*given, "--max-multiplier", "1e6", "--dtype", "float16", "--enforce-eager"]
    arguments += ["--max-model-len", "128", "--served-model-name", "tiny"]
    fields = {"cna_circuit": "all0", "cna_multiplier": MILLION}
    chat = {
        "model": "tiny",
        "messages": [{"role": "user", "content": "w7 w8 w9"}],
        "max_tokens": 4,
        "vllm_xargs": fields,
    }
    plain = {"model": "tiny", "prompt": "w7 w8", "max_tokens": 4, "vllm_xargs": fields}
    with serve(str(model), arguments, tmp_path / "log") as server, server.http() as http:
        for route, body in (("chat/completions", chat), ("completions", plain)):
            reply = http.post(f"/v1/{route}", json=body)
            assert reply.status_code == 400, reply.text
            assert reply.json()["error"]["param"] == "cna_multiplier"
            assert reply.json()["error"]["message"].startswith(OVERFLOW + "float16")
            streamed = http.post(f"/v1/{route}", json={**body, "stream": True}).text
            assert OVERFLOW + "float16" in streamed
        assert 'cna:failed_requests_total{reason="overflow"} 4.0' in http.get("/metrics").text
