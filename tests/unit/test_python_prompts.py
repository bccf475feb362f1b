# SPDX-License-Identifier: Apache-2.0
"""Prompts and circuits as Python code has them at hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from cna_vllm import Circuit, Neuron, SteeringError, steer, steer_vector
from cna_vllm.batch.plan import plan
from cna_vllm.discovery.options import _universal
from cna_vllm.discovery.prefill import DiscoveryError, as_prompts
from cna_vllm.evaluation.answers import PromptSet
from cna_vllm.steering.arms import Arm
from cna_vllm.steering.vectors import VectorSet
from cna_vllm.text.prompts import Prompt, PromptError, prompts_of, render, templated

CHAT = [{"role": "user", "content": "hi"}]


@pytest.mark.parametrize(
    ("value", "prompt"),
    [
        ("hi", Prompt(text="hi")),
        (CHAT, Prompt(messages=CHAT)),
        ([3, 4], Prompt(token_ids=[3, 4])),
        ((np.int64(3), 4), Prompt(token_ids=[3, 4])),
        ({"prompt": "hi"}, Prompt(text="hi")),
        ({"prompt_token_ids": [3, 4]}, Prompt(token_ids=[3, 4])),
        ({"messages": CHAT}, Prompt(messages=CHAT)),
        (Prompt(text="hi"), Prompt(text="hi")),
    ],
)
def test_every_form_is_a_prompt_everywhere(value: Any, prompt: Prompt) -> None:
    assert prompts_of([value, "x"]) == as_prompts([value, "x"]) == [prompt, Prompt(text="x")]
    assert plan([value], [Arm("plain")], {"temperature": 0.0})[0].prompt == prompt
    assert list(PromptSet("set", [value]).prompts) == [prompt]
    assert _universal([value]) == ((prompt,), "given")
    assert Prompt.of(prompt.to_dict()) == prompt


@pytest.mark.parametrize("value", ["", [], {}, None, 3, [-1], [1, "x"], [["hi"]], {"text": "hi"}])
def test_anything_else_is_told_with_its_number(value: Any) -> None:
    with pytest.raises(PromptError, match="good prompt 2: "):
        prompts_of(["hi", value], "good")
    with pytest.raises(DiscoveryError, match="prompt 2: "):
        as_prompts(["hi", value])


PICTURE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}}


@pytest.mark.parametrize(
    ("value", "named"),
    [
        ([{"role": "user", "content": [{"type": "text", "text": "hi"}, PICTURE]}], "image_url"),
        ([*CHAT, {"role": "user", "content": [{"image": "a.png"}]}], "image"),
        ([{"role": "user", "content": "hi", "images": ["a.png"]}], "images"),
        ([{"role": "user", "content": ({"type": "input_audio", "data": ""},)}], "input_audio"),
        ({"prompt": "hi", "multi_modal_data": {"image": None}}, "multi_modal_data"),
        ({"prompt_token_ids": [3], "multi_modal_data": {}}, "multi_modal_data"),
    ],
)
def test_images_are_refused_with_the_place_that_takes_them(value: Any, named: str) -> None:
    """A template would write an image's mark, and the model would be run without the image."""
    with pytest.raises(PromptError, match=f"good prompt 2: .*'{named}'.*cna-vllm serve"):
        prompts_of(["hi", value], "good")
    with pytest.raises(DiscoveryError, match=f"prompt 2: .*'{named}'"):
        as_prompts(["hi", value])


def test_parts_of_text_are_text() -> None:
    content = [{"type": "text", "text": "an image of a file"}, {"text": "video"}, "audio"]
    assert Prompt.of([{"role": "user", "content": content, "profile": "x"}]).messages is not None


def test_a_single_string_is_no_list_of_prompts() -> None:
    with pytest.raises(PromptError, match="must be a list of prompts"):
        prompts_of("hello", "positive")


class Tokenizer:
    def __init__(self, chat_template: str | None) -> None:
        self.chat_template = chat_template

    def encode(self, text: str) -> list[int]:
        return [len(text)]

    def apply_chat_template(self, messages: Any, **options: Any) -> list[int]:
        return [100, len(messages)]


def test_ids_stay_as_they_are_and_templates_are_known() -> None:
    chat, base = Tokenizer("x"), Tokenizer(None)
    ids, text, messages = Prompt.of([7, 8]), Prompt.of("abc"), Prompt.of(CHAT)
    assert render(chat, ids) == render(base, ids, raw=True) == [7, 8]
    for tokenizer, raw in ((chat, False), (chat, True), (base, False), (base, True)):
        assert templated(tokenizer, text, raw=raw) == (render(tokenizer, text, raw=raw)[0] == 100)
        assert not templated(tokenizer, ids, raw=raw)
    assert templated(chat, messages) and templated(chat, messages, raw=True)


CIRCUIT = Circuit("org/tiny", "LlamaForCausalLM", 2, 8, (Neuron(1, 3, 1.0),))
VECTORS = VectorSet("mlp", "m", "LlamaForCausalLM", 2, 4, {0: np.ones(4)})


@pytest.mark.parametrize("call", [lambda: steer(CIRCUIT, 0.0), lambda: steer([(CIRCUIT, 0.0)])])  # type: ignore[arg-type,list-item]
def test_a_circuit_itself_is_told_how_to_be_named(call: Any) -> None:
    with pytest.raises(SteeringError) as told:
        call()
    assert "load_circuit(llm, NAME, circuit), of cna_vllm.serving.control" in str(told.value)


def test_vectors_themselves_are_told_how_to_be_named() -> None:
    with pytest.raises(SteeringError, match=r"load_vectors\(llm, NAME"):
        steer_vector(VECTORS, 1.0)  # type: ignore[arg-type]
