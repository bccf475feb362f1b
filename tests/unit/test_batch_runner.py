# SPDX-License-Identifier: Apache-2.0
"""The runner on a stand-in engine: what it submits, when, and what an interruption leaves."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from cna_vllm.batch import runner, sampling
from cna_vllm.batch.partial import BatchError, partial_path
from cna_vllm.batch.plan import Request, plan
from cna_vllm.batch.reading import BatchPrompt
from cna_vllm.batch.runner import rows_done, run_batch
from cna_vllm.steering.arms import parse_arm
from cna_vllm.text.prompts import Prompt, PromptError
from tests import tiny_models

ARMS = [parse_arm("plain"), parse_arm("off=f@0")]
SLOTS = 3


class Engine:
    """Answers a request with a function of its prompt and parameters, in an order of its own."""

    def __init__(self, seed: int = 0, interrupt: Callable[[int], None] = lambda steps: None):
        self.rng, self.interrupt = random.Random(seed), interrupt
        self.waiting: dict[str, tuple[Any, Any]] = {}
        self.steps, self.most, self.added = 0, 0, []
        self.reason = "stop"

    def has_unfinished_requests(self) -> bool:
        return bool(self.waiting)

    def add_request(self, request_id: str, prompt: Any, params: Any) -> str:
        assert request_id not in self.waiting
        self.waiting[request_id] = (prompt, params)
        self.added.append((prompt["prompt_token_ids"], params))
        self.most = max(self.most, len(self.waiting))
        return f"{request_id}-internal"

    def abort_request(self, request_ids: list[str], internal: bool) -> None:
        assert internal
        for request_id in request_ids:
            del self.waiting[request_id.removesuffix("-internal")]

    def step(self) -> list[Any]:
        self.steps += 1
        self.interrupt(self.steps)
        done = self.rng.sample(sorted(self.waiting), self.rng.randint(0, len(self.waiting)))
        return [self._output(request_id, *self.waiting.pop(request_id)) for request_id in done]

    def _output(self, request_id: str, prompt: Any, params: Any) -> Any:
        ids = [*prompt["prompt_token_ids"], params.seed or 0, len(params.extra_args or {})]
        completion = SimpleNamespace(
            text=str(ids),
            token_ids=tuple(ids),
            finish_reason=self.reason,
            stop_reason=None,
            logprobs=None,
        )
        return SimpleNamespace(
            request_id=request_id, finished=True, outputs=[completion], prompt_logprobs=None
        )


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tiny_models.add_tokenizer(tmp_path_factory.mktemp("tokenizer"))
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(autouse=True)
def no_engine_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    """The stand-in has no model to ask whether sampling fits it."""
    limits = SimpleNamespace(max_num_seqs=SLOTS, max_model_len=50, chunked_prefill=False)
    for module in (runner, sampling):
        monkeypatch.setattr(module, "engine_of", lambda llm: limits)
    monkeypatch.setattr(runner, "check_requests", lambda requests, llm: None)


def llm(tokenizer: Any, engine: Engine) -> Any:
    renderer = SimpleNamespace(render_cmpl=lambda prompts: list(prompts))
    return SimpleNamespace(llm_engine=engine, renderer=renderer, get_tokenizer=lambda: tokenizer)


def rows_of(count: int) -> list[Request]:
    prompts = [Prompt(f"w{6 + i} w7") for i in range(count)]
    return plan(prompts, ARMS, {"temperature": 1.0, "max_tokens": 3}, samples=2)


def run(tokenizer: Any, engine: Engine, rows: list[Request], path: Path, **more: Any) -> None:
    run_batch(llm(tokenizer, engine), rows, path, identity=more, progress=False)


@settings(deadline=None, max_examples=30)
@given(count=st.integers(1, 12), stops=st.lists(st.integers(1, 6), max_size=6), seed=st.integers())
def test_stopped_after_any_step_it_ends_with_the_whole_file(
    tokenizer: Any,
    tmp_path_factory: pytest.TempPathFactory,
    count: int,
    stops: list[int],
    seed: int,
) -> None:
    folder, rows = tmp_path_factory.mktemp("run"), rows_of(count)
    run(tokenizer, Engine(), rows, folder / "whole")
    answered = 0

    def stop(steps: int) -> None:
        if stops and steps >= stops[0]:
            stops.pop(0)
            raise KeyboardInterrupt

    while not (folder / "parts").exists():
        engine = Engine(seed, stop)
        before = rows_done(rows, folder / "parts", {})
        try:
            run(tokenizer, engine, rows, folder / "parts")
        except KeyboardInterrupt as interrupt:
            done = rows_done(rows, folder / "parts", {})
            assert f"{done} of {len(rows)} rows are kept" in str(interrupt)
            answered += done - before
        else:
            answered += len(rows) - before
        assert engine.most <= 2 * SLOTS
    assert answered == len(rows)
    assert (folder / "parts").read_bytes() == (folder / "whole").read_bytes()
    assert not partial_path(folder / "parts").exists()


def test_what_the_engine_is_given(tokenizer: Any, tmp_path: Path) -> None:
    prompts = [BatchPrompt("w8 w9", id="a"), BatchPrompt("w8", raw=True)]
    engine = Engine()
    run(tokenizer, engine, plan(prompts, ARMS, {"temperature": 0.0, "top_k": 3}), tmp_path / "o")
    assert [ids for ids, _ in engine.added] == [[3, 8, 9, 4]] * 2 + [[8]] * 2
    assert [params.extra_args or None for _, params in engine.added][:2] == [
        None,
        {"cna_circuit": "f", "cna_multiplier": 0.0, "cna_scope": "last"},
    ]
    assert {(params.seed, params.temperature) for _, params in engine.added} == {(None, 0.0)}
    first = json.loads((tmp_path / "o").read_text().splitlines()[0])
    assert first["id"] == "a" and first["token_ids"] == [3, 8, 9, 4, 0, 0]
    assert first["finish_reason"] == "stop" and "seed" not in first and "sample" not in first


@pytest.mark.parametrize(
    ("prompt", "says"),
    [
        (BatchPrompt("w7 " * 48, source="f:3"), "f:3: the prompt has 50 tokens; the engine takes"),
        (
            BatchPrompt(messages=[{"role": "tool", "content": "w7"}], source="f:3"),
            "f:3: messages: the model's chat template refuses them: no tools, please",
        ),
        (Prompt(messages=[{"role": "tool", "content": "w7"}]), "prompt 1: messages: the model's"),
        (BatchPrompt(messages=[{"role": "user", "content": None}], source="f:3"), None),
    ],
)
def test_prompts_are_checked_before_any_is_answered(
    tokenizer: Any, tmp_path: Path, prompt: Prompt, says: str | None
) -> None:
    engine = Engine()
    rows = plan([Prompt("w7"), prompt], ARMS, {"temperature": 0.0})
    if says is None:  # a template may print what is not text; that is its own affair
        run(tokenizer, engine, rows, tmp_path / "o")
        return
    with pytest.raises(PromptError) as refused:
        run(tokenizer, engine, rows, tmp_path / "o")
    assert str(refused.value).startswith(says) and "\n" not in str(refused.value)
    assert not engine.added and not list(tmp_path.iterdir())


def test_a_failed_request_leaves_the_engine_idle_and_the_others_kept(
    tokenizer: Any, tmp_path: Path
) -> None:
    rows, engine = rows_of(8), Engine()

    def fail(steps: int) -> None:
        engine.reason = "abort" if steps == 4 else "stop"

    engine.interrupt = fail
    with pytest.raises(BatchError, match="the engine ended arm 'plain' with 'abort'"):
        run(tokenizer, engine, rows, tmp_path / "o")
    assert not engine.waiting
    assert 0 < rows_done(rows, tmp_path / "o", {}) < len(rows)
    run(tokenizer, Engine(), rows, tmp_path / "o")
    assert len((tmp_path / "o").read_text().splitlines()) == len(rows)


def test_an_engine_in_use_and_another_run_are_refused(tokenizer: Any, tmp_path: Path) -> None:
    rows, engine = rows_of(2), Engine()
    engine.waiting["another"] = (None, None)
    with pytest.raises(BatchError, match="unfinished requests of others"):
        run(tokenizer, engine, rows, tmp_path / "o")

    def stop(steps: int) -> None:
        if steps == 4:
            raise KeyboardInterrupt

    rows = rows_of(8)
    with pytest.raises(KeyboardInterrupt):
        run(tokenizer, Engine(interrupt=stop), rows, tmp_path / "o", model="a")
    with pytest.raises(BatchError, match=r'\(model: "a" then, "b" now\)'):
        run(tokenizer, Engine(), rows, tmp_path / "o", model="b")
    with pytest.raises(BatchError, match=r"\(rows: 32 then, 4 now, prompts, seeds\)"):
        rows_done(rows_of(1), tmp_path / "o", {"model": "a"})
