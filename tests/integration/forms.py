# SPDX-License-Identifier: Apache-2.0
"""The table of request forms: every way to ask for steering, at every endpoint, and what follows.

An `Endpoint` knows how a request looks there and what tokens its reply holds; a `Form` puts the
wish for steering somewhere into that request. A cell of both is answered with the tokens of an arm,
or refused.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx

BASE, TOKENS = "base", 6
PROMPT = [7, 8, 9]
CHAT = [3, *PROMPT, 4]  # what the tiny models' chat template makes of WORDS
WORDS = "w7 w8 w9"
MESSAGES = [{"role": "user", "content": WORDS}]
FIELDS = {"cna_circuit": "one", "cna_multiplier": 0.0}
SAGEMAKER = "X-Amzn-SageMaker-Adapter-Identifier"

Body = dict[str, Any]


@dataclass(frozen=True)
class Request:
    """A request as it is sent. content: in place of ``body`` as JSON."""

    body: Body
    query: str = ""
    headers: Mapping[str, str] = field(default_factory=dict)
    content: bytes | None = None

    def post(self, http: httpx.Client, path: str) -> httpx.Response:
        content = json.dumps(self.body).encode() if self.content is None else self.content
        headers = {"Content-Type": "application/json", **self.headers}
        return http.post(path + self.query, content=content, headers=headers)


@dataclass(frozen=True)
class Endpoint:
    """A route and a request of it. place: where it takes fields. chat: the prompt is CHAT, not
    PROMPT. render: its answer is a request, which is then sent to where tokens are generated."""

    path: str
    body: Body
    place: tuple[str, ...] = ("vllm_xargs",)
    chat: bool = False
    render: bool = False

    @property
    def prompt(self) -> list[int]:
        return CHAT if self.chat else PROMPT

    def request(self) -> Request:
        return Request(copy.deepcopy(self.body))

    def ask(
        self, http: httpx.Client, request: Request
    ) -> tuple[httpx.Response, list[list[int]] | None]:
        """The reply, and the generated tokens of every choice unless it is an error."""
        reply = request.post(http, self.path)
        if reply.status_code == 200 and self.render:
            rendered = reply.json()
            rendered = rendered[0] if isinstance(rendered, list) else rendered
            assert "cna_resolved" not in reply.text
            reply = http.post("/inference/v1/generate", json=rendered)
        return reply, tokens_of(reply) if reply.status_code == 200 else None


def tokens_of(reply: httpx.Response) -> list[list[int]]:
    """Generated tokens of every choice, of all endpoints' replies and streams."""
    if reply.headers["content-type"].startswith("text/event-stream"):
        lines = [line[6:] for line in reply.text.splitlines() if line.startswith("data: {")]
        return [[token for line in lines for token in _delta(json.loads(line))]]
    answer = reply.json()
    if "choices" in answer:
        return [choice["token_ids"] for choice in answer["choices"]]
    parts = answer["content"] if "content" in answer else answer["output"][0]["content"]
    return [tokens_of_text(parts[0]["text"])]


def _delta(event: Mapping[str, Any]) -> list[int]:
    match event.get("type"):
        case "response.output_text.delta":
            return tokens_of_text(event["delta"])
        case "content_block_delta":
            return tokens_of_text(event["delta"]["text"])
    choices = event.get("choices")
    return (choices[0].get("token_ids") or []) if choices else []


def tokens_of_text(text: str) -> list[int]:
    """What the tiny models' tokenizer made into this text."""
    names = ["<unk>", "<s>", "</s>", "user", "assistant", "system"]
    return [names.index(w) if w in names else int(w[1:]) for w in text.split()]


_LENGTH = {"max_tokens": TOKENS, "temperature": 0}
_COMPLETION = {"model": BASE, "prompt": PROMPT, "return_token_ids": True, **_LENGTH}
_CHAT = {"model": BASE, "messages": MESSAGES, "return_token_ids": True, **_LENGTH}
_ANTHROPIC = {"model": BASE, "messages": MESSAGES, **_LENGTH}
_RESPONSE = {"model": BASE, "input": WORDS, "max_output_tokens": TOKENS, "temperature": 0}
_GENERATE = {"model": BASE, "token_ids": PROMPT, "sampling_params": dict(_LENGTH)}

GENERATING = (
    Endpoint("/v1/completions", _COMPLETION),
    Endpoint("/v1/chat/completions", _CHAT, chat=True),
    Endpoint("/v1/chat/completions/batch", {**_CHAT, "messages": [MESSAGES] * 2}, chat=True),
    Endpoint("/v1/responses", _RESPONSE, chat=True),
    Endpoint("/v1/messages", _ANTHROPIC, chat=True),
    Endpoint("/invocations", {k: v for k, v in _COMPLETION.items() if k != "model"}),
    Endpoint("/inference/v1/generate", _GENERATE, place=("sampling_params", "extra_args")),
    Endpoint("/v1/completions/render", _COMPLETION, render=True),
    Endpoint("/v1/chat/completions/render", _CHAT, chat=True, render=True),
    Endpoint("/v1/responses/render", _RESPONSE, chat=True, render=True),
    Endpoint("/v1/messages/render", _ANTHROPIC, chat=True, render=True),
)
# Routes that generate nothing that could be steered: they take no field and no circuit.
OTHERS = (
    Endpoint("/tokenize", {"model": BASE, "prompt": WORDS}),
    Endpoint("/detokenize", {"model": BASE, "tokens": PROMPT}),
    Endpoint("/v1/messages/count_tokens", {"model": BASE, "messages": MESSAGES}),
    Endpoint(
        "/generative_scoring",
        {"model": BASE, "query": "w7", "items": ["w8"], "label_token_ids": [9, 10]},
    ),
    Endpoint(
        "/v1/completions/derender",
        {"model": BASE, "generate_responses": [{"choices": [{"index": 0, "token_ids": PROMPT}]}]},
    ),
    Endpoint("/v1/systemone", {"model": BASE, "state": WORDS, "questions": {}}),
    Endpoint("/v1/decisions", {"model": BASE, "input": WORDS, "questions": []}),
    Endpoint("/v1/embeddings", {"model": BASE, "input": WORDS}),
)

Put = Callable[[Endpoint, Request], Request | None]


@dataclass(frozen=True)
class Form:
    """A way to ask. put: makes the endpoint's request one of this form; None where there is none.

    arm: circuits with multipliers and a scope, where it is to be steered; None: it is refused.
    said: what the error's parameter or message holds then.
    """

    name: str
    put: Put
    arm: tuple[tuple[tuple[str, float], ...], str] | None = None
    said: str = "cna"


def within(body: Body, path: Sequence[str], more: Mapping[str, Any]) -> Body:
    """The body with entries added to the object at a path, which is made where it is not there."""
    at = body = copy.deepcopy(body)
    for key in path:
        at = at.setdefault(key, {})
    at.update(copy.deepcopy(dict(more)))
    return body


def _in_place(fields: Mapping[str, Any], **more: Any) -> Put:
    return lambda e, r: Request({**within(r.body, e.place, fields), **more})


def _at(path: Sequence[str], more: Mapping[str, Any]) -> Put:
    def put(endpoint: Endpoint, request: Request) -> Request | None:
        taken = (*path, next(iter(more)))[: len(endpoint.place)] == endpoint.place
        return None if taken else Request(within(request.body, path, more))

    return put


def _model(name: str, **more: Any) -> Put:
    """As the model; at ``/invocations`` that is a header."""

    def put(endpoint: Endpoint, request: Request) -> Request:
        if endpoint.path == "/invocations":
            return Request({**request.body, **more}, headers={SAGEMAKER: name})
        return Request({**request.body, "model": name, **more})

    return put


def _written(change: Callable[[str], bytes], fields: Mapping[str, Any], top: bool = False) -> Put:
    """Fields in their place, or at the top, in JSON that is then changed."""

    def put(endpoint: Endpoint, request: Request) -> Request:
        body = within(request.body, () if top else endpoint.place, fields)
        return Request(body, content=change(json.dumps(body)))

    return put


def _streamed(endpoint: Endpoint, request: Request) -> Request | None:
    if endpoint.path.endswith("/batch"):
        return None
    return Request({**within(request.body, endpoint.place, FIELDS), "stream": True})


def _choices(endpoint: Endpoint, request: Request) -> Request | None:
    if endpoint.path not in ("/v1/completions", "/v1/chat/completions", "/invocations"):
        return None
    more = {"n": 2, "temperature": 1.0, "top_k": 1}
    return Request({**within(request.body, endpoint.place, FIELDS), **more})


def _echo(endpoint: Endpoint, request: Request) -> Request | None:
    if endpoint.path != "/v1/completions":
        return None
    return Request({**within(request.body, endpoint.place, FIELDS), "echo": True})


def _beams(endpoint: Endpoint, request: Request) -> Request | None:
    if "/completions" not in endpoint.path or endpoint.path.endswith("derender"):
        return None
    return Request({**within(request.body, endpoint.place, FIELDS), "use_beam_search": True})


def _escaped(text: str) -> bytes:
    return text.replace('"cna_', '"\\u0063na_').encode()


def _doubled(text: str) -> bytes:
    return text.replace('"cna_multiplier"', '"cna_multiplier": 1, "cna_multiplier"').encode()


def _body_model(name: str) -> Put:
    return lambda e, r: Request({**r.body, "model": name}) if e.path == "/invocations" else None


_ONE = ((("one", 0.0),), "last")
_BOTH = ((("one", 0.5), ("two", -1.0)), "all")
_LISTS = {"cna_circuit": ["one", "two"], "cna_multiplier": [0.5, -1.0], "cna_scope": "all"}
_GENERATED = {**FIELDS, "cna_scope": "generated"}
_BARE = {"circuit": "one", "multiplier": 0}
_NESTED = {"steering": FIELDS}
_TOOL = {"type": "object", "properties": {"cna_circuit": {"type": "string"}}}

FORMS = (
    Form("in place", _in_place(FIELDS), _ONE),
    Form("in place, streamed", _streamed, _ONE),
    Form("in place, two choices", _choices, _ONE),
    Form("in place, echo", _echo, _ONE),
    Form("in place, lists", _in_place(_LISTS), _BOTH),
    Form("in place, generated", _in_place(_GENERATED), (_ONE[0], "generated")),
    Form("in place, UTF-16", _written(lambda t: t.encode("utf-16"), FIELDS), _ONE),
    Form("in place, byte-order mark", _written(lambda t: t.encode("utf-8-sig"), FIELDS), _ONE),
    Form("adapter", _model("one-off"), _ONE),
    Form("adapter of two", _model("both"), _BOTH),
    Form("adapter in the body of /invocations", _body_model("one-off"), said="header"),
    Form("circuit in the body of /invocations", _body_model("one"), said="header"),
    Form("circuit as the model", _model("one"), said="is a circuit"),
    Form("mistyped adapter", _model("one-of"), said="Did you mean one-off"),
    Form("adapter and fields at the top", _model("one-off", **FIELDS)),
    Form(
        "adapter and fields in place",
        lambda e, r: _model("one-off")(e, _in_place(FIELDS)(e, r) or r),
        said="sets the steering",
    ),
    Form("beam search", _beams, said="eam search"),
    Form("unknown circuit", _in_place({**FIELDS, "cna_circuit": "on"}), said="no circuit is named"),
    Form("resolved", _in_place({"cna_resolved": "x"}), said="set by the server"),
    Form("top level", _at((), FIELDS)),
    Form("top level, scope alone", _at((), {"cna_scope": "all"})),
    Form("top level, null", _at((), {"cna_circuit": None})),
    Form("top level, without prefix", _at((), _BARE), said="circuit"),
    Form("top level, scope without prefix", _at((), {"scope": "all"}), said="cna_scope"),
    Form("top level, an object", _at((), {"cna": _BARE})),
    Form("top level, UTF-16", _written(lambda t: t.encode("utf-16"), FIELDS, top=True)),
    Form("top level, byte-order mark", _written(lambda t: t.encode("utf-8-sig"), FIELDS, top=True)),
    Form("top level, escaped", _written(_escaped, FIELDS, top=True)),
    Form("vllm_xargs", _at(("vllm_xargs",), FIELDS)),
    Form("extra_args", _at(("extra_args",), FIELDS)),
    Form("sampling_params", _at(("sampling_params",), FIELDS)),
    Form("sampling_params.extra_args", _at(("sampling_params", "extra_args"), FIELDS)),
    Form("extra_body", _at(("extra_body",), FIELDS)),
    Form("extra_body.vllm_xargs", _at(("extra_body", "vllm_xargs"), FIELDS)),
    Form("nested in place", _in_place(_NESTED), said="steering"),
    Form("nested twice in place", _in_place({"other": {"x": FIELDS}})),
    Form("in place, without prefix", _in_place(_BARE), said="circuit"),
    Form("in place, plural", _in_place({"cna_circuits": "one", "cna_multiplier": 0})),
    Form("in place, camel case", _in_place({"cnaCircuit": "one", "cnaMultiplier": 0})),
    Form("in place, upper case", _in_place({"CNA_CIRCUIT": "one", "CNA_MULTIPLIER": 0})),
    Form("in place, dash", _in_place({"cna-circuit": "one", "cna\u2011multiplier": 0})),
    Form("in place, dot", _in_place({"cna.circuit": "one", "cna.multiplier": 0})),
    Form("in place, space", _in_place({" cna_circuit": "one", "cna_multiplier ": 0})),
    Form("in place, escaped", _written(_escaped, FIELDS), _ONE),
    Form("twice", _written(_doubled, FIELDS)),
    Form("metadata", _at(("metadata",), {"cna_circuit": "one"})),
    Form("chat template", _at(("chat_template_kwargs",), {"cna_circuit": "one"})),
    Form("tool", lambda e, r: Request({**r.body, "tools": [{"parameters": _TOOL}]})),
    Form("query", lambda e, r: Request(r.body, query="?cna_circuit=one&cna_multiplier=0")),
    Form("header", lambda e, r: Request(r.body, headers={"X-CNA-Circuit": "one"})),
)
_NO_ANSWER = ("adapter", "adapter of two", "circuit as the model", "mistyped adapter")

# What is no wish for steering: answered, and plain.
CONTROLS = (
    Form("plain", lambda e, r: r),
    Form("another plugin's field", _in_place({"other": 1})),
    Form("the user's words", _at(("metadata",), {"docname": "x", "cname": "y", "scope": "all"})),
    Form("what vLLM may ignore", _at(("sampling_params",), {"temperature": 0})),
    Form("text", lambda e, r: Request({**r.body, "user": "cna_circuit: circuit"})),
    Form("byte-order mark", _written(lambda t: t.encode("utf-8-sig"), {}, top=True)),
)


def cells() -> Iterator[tuple[Endpoint, Form, Request]]:
    """Every endpoint with every form that it can have."""
    for endpoint in GENERATING:
        for form in FORMS:
            if (request := form.put(endpoint, endpoint.request())) is not None:
                yield endpoint, form, request
    for endpoint in OTHERS:
        for form in FORMS:
            if form.name in _NO_ANSWER or form.name.endswith("/invocations"):
                continue  # an adapter's name is the base model's where nothing is generated
            if (request := form.put(endpoint, endpoint.request())) is not None:
                yield endpoint, form, request


def takes(endpoint: Endpoint, form: Form) -> bool:
    """Whether this cell is to be steered."""
    return form.arm is not None and endpoint in GENERATING
