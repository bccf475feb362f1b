# SPDX-License-Identifier: Apache-2.0
"""Every way to select an arm, driven by the openai client."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import openai
import pytest

from tests.integration.conftest import PLAIN
from tests.integration.serving.deployment import QUESTION, TOKENS, Deployment, extra
from tests.oracles import Arm, assert_token_exact

pytestmark = [pytest.mark.engine, pytest.mark.slow]


def test_every_form_of_selection_on_every_endpoint(deployed: Deployment, prompt: list[int]) -> None:
    """Fields and adapters; chat, completions and responses; whole and streamed; n and logprobs."""
    client = deployed.server.openai()
    names = {model.id: model for model in client.models.list()}
    assert {"smollm2", *deployed.arms} <= set(names)
    assert all(names[name].model_extra["parent"] == "smollm2" for name in deployed.arms)

    chat: dict[str, Any] = {
        "messages": [{"role": "user", "content": QUESTION}],
        "max_tokens": TOKENS,
        "temperature": 0,
    }
    fields = {"cna_circuit": "one", "cna_multiplier": 0.0}
    forms = [("smollm2", None, PLAIN), ("smollm2", fields, deployed.arms["one-off"])]
    forms += [(name, None, arm) for name, arm in deployed.arms.items()]
    wanted: list[tuple[list[int], Arm]] = []
    outputs: list[dict[str, Any]] = []

    def seen(token_ids: Sequence[int], arm: Arm) -> None:
        if (prompt, arm) in wanted:
            assert list(token_ids) in (o["token_ids"][0] for o in outputs)
        else:
            wanted.append((prompt, arm))
            outputs.append({"token_ids": [list(token_ids)]})

    for model, xargs, arm in forms:
        reply = client.chat.completions.create(
            model=model, logprobs=True, top_logprobs=2, extra_body=extra(xargs), **chat
        )
        assert reply.model == model
        choice = reply.choices[0]
        assert choice.logprobs is not None and len(choice.logprobs.content or ()) == len(
            choice.model_extra["token_ids"]
        )
        seen(choice.model_extra["token_ids"], arm)

        streamed: list[int] = []
        for chunk in client.chat.completions.create(
            model=model, stream=True, extra_body=extra(xargs), **chat
        ):
            assert chunk.model == model
            for part in chunk.choices:
                streamed += part.model_extra.get("token_ids") or []
        seen(streamed, arm)

        text = client.completions.create(
            model=model,
            prompt=[prompt, prompt],
            max_tokens=TOKENS,
            extra_body=extra(xargs, top_k=1),
            n=2,
        )
        assert len(text.choices) == 4
        for one in text.choices:
            seen(one.model_extra["token_ids"], arm)

        parts = client.completions.create(
            model=model,
            prompt=prompt,
            max_tokens=TOKENS,
            logprobs=1,
            stream=True,
            extra_body=extra(xargs, top_k=1),
        )
        pieces = [part.choices[0] for part in parts]
        seen([token for piece in pieces for token in piece.model_extra["token_ids"] or ()], arm)
        assert all(piece.logprobs is not None for piece in pieces if piece.text)

        ask: dict[str, Any] = {
            "model": model,
            "input": QUESTION,
            "max_output_tokens": TOKENS,
            "temperature": 0,
            "extra_body": {} if xargs is None else {"vllm_xargs": dict(xargs)},
        }
        assert client.responses.create(**ask).output_text == choice.message.content
        events = client.responses.create(stream=True, **ask)
        deltas = [e.delta for e in events if e.type == "response.output_text.delta"]
        assert "".join(deltas) == choice.message.content
    assert_token_exact(deployed.subject.verdicts(wanted, outputs), "every form of selection")


def test_structured_output_and_tools_of_an_adapter(deployed: Deployment) -> None:
    client = deployed.server.openai()
    schema = {
        "type": "object",
        "properties": {"fruit": {"enum": ["apple", "cherry"]}},
        "required": ["fruit"],
        "additionalProperties": False,
    }
    ask: dict[str, Any] = {
        "model": "one-off",
        "messages": [{"role": "user", "content": "Which fruit?"}],
        "max_tokens": 40,
        "temperature": 0,
    }
    reply = client.chat.completions.create(
        response_format={
            "type": "json_schema",
            "json_schema": {"name": "fruit", "schema": schema, "strict": True},
        },
        **ask,
    )
    assert json.loads(reply.choices[0].message.content or "")["fruit"] in ("apple", "cherry")
    tool = {"type": "function", "function": {"name": "pick", "parameters": schema}}
    fields = {"cna_circuit": "one", "cna_multiplier": 0.0}
    calls = [
        client.chat.completions.create(
            **{**ask, "model": model, "max_tokens": 100},
            tools=[tool],
            tool_choice="required",
            extra_body=body,
        )
        .choices[0]
        .message
        for model, body in (("one-off", {}), ("smollm2", {"vllm_xargs": fields}))
    ]
    assert calls[0].content == calls[1].content
    arguments = [[c.function.arguments for c in call.tool_calls or ()] for call in calls]
    assert arguments[0] == arguments[1] != []


def test_a_base_model_cannot_be_named_twice(deployed: Deployment) -> None:
    """An adapter sets the steering; fields of the request beside it are refused."""
    client = deployed.server.openai()
    with pytest.raises(openai.BadRequestError, match="sets the steering") as error:
        client.chat.completions.create(
            model="one-off",
            messages=[{"role": "user", "content": "x"}],
            extra_body=extra({"cna_circuit": "two", "cna_multiplier": 0}),
        )
    assert error.value.param == "cna_circuit"
    tokens = deployed.server.http().post("/tokenize", json={"model": "one-off", "prompt": "Hello"})
    assert tokens.status_code == 200
