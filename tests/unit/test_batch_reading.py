# SPDX-License-Identifier: Apache-2.0
"""Batch files: what a row may carry, the OpenAI form, and errors that name the file and line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cna_vllm.batch.reading import BatchPrompt, read_batch
from cna_vllm.steering.arms import Arm
from cna_vllm.text.prompts import PromptError

TURN = {"role": "user", "content": "Hi"}


def jsonl(folder: Path, *rows: Any) -> Path:
    path = folder / "in.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def openai(**changes: Any) -> dict[str, Any]:
    """A chat request; `body_...` changes the body, None removes a key of the envelope."""
    body = {"messages": [TURN]} | {
        key.removeprefix("body_"): value for key, value in changes.items() if key[:5] == "body_"
    }
    row = {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": body}
    row |= {key: value for key, value in changes.items() if key[:5] != "body_"}
    return {key: value for key, value in row.items() if value is not None}


def test_jsonl_with_id_tags_and_sampling(tmp_path: Path) -> None:
    sampling = {"temperature": 0.5, "stop": ["x"]}
    path = jsonl(
        tmp_path,
        {"prompt": "a", "id": "q1", "tags": ["mild", "law"], "sampling": sampling},
        {"messages": [TURN], "id": 7},
        {"prompt": "b", "messages": None, "tags": None},
    )
    first, second, third = read_batch(path)
    assert first == BatchPrompt("a", id="q1", tags=("mild", "law"), sampling=sampling)
    assert second == BatchPrompt(messages=(TURN,), id=7)
    assert third == BatchPrompt("b")
    assert [row.source for row in (first, second, third)] == [f"{path}:{n}" for n in (1, 2, 3)]
    assert first.to_dict() == {"id": "q1", "tags": ["mild", "law"], "prompt": "a"}
    assert second.to_dict() == {"id": 7, "messages": [TURN]}
    assert third.to_dict() == {"prompt": "b"}


def test_txt_and_csv(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("one\n\n two \n")
    assert read_batch(tmp_path / "p.txt") == [BatchPrompt("one"), BatchPrompt("two")]
    text = 'id,prompt,q,tags\n1,"two\nlines",x,a; b;\n,b,y,\n3,c,z,c,extra\n4,d,w\n'
    (tmp_path / "p.csv").write_text(text)
    assert read_batch(tmp_path / "p.csv") == [
        BatchPrompt("two\nlines", id="1", tags=("a", "b")),
        BatchPrompt("b"),
        BatchPrompt("c", id="3", tags=("c",)),
        BatchPrompt("d", id="4"),
    ]
    assert [row.text for row in read_batch(tmp_path / "p.csv", column="q")] == ["x", "y", "z", "w"]
    assert [row.source[-6:] for row in read_batch(tmp_path / "p.csv")][:2] == [".csv:3", ".csv:4"]


def test_openai_chat_and_completion(tmp_path: Path) -> None:
    chat = openai(
        body_model="m",
        body_max_completion_tokens=9,
        body_temperature=0.5,
        body_n=2,
        body_seed=4,
        body_stop="END",
        body_logprobs=True,
        body_top_logprobs=3,
        body_user="someone",
        body_stream=False,
        body_top_p=None,
        body_vllm_xargs={"cna_circuit": ["f", "g"], "cna_multiplier": [0, 2.5], "other": 1},
    )
    body = {"prompt": "Once", "max_tokens": 3, "logprobs": 2, "top_k": 5}
    completion = {"custom_id": "b", "url": "/v1/completions", "body": body}
    first, second = read_batch(jsonl(tmp_path, chat, completion))
    assert first.messages == (TURN,) and not first.raw and first.model == "m" and first.id == "a"
    assert first.sampling == {
        "max_tokens": 9,
        "temperature": 0.5,
        "n": 2,
        "seed": 4,
        "stop": "END",
        "logprobs": 3,
        "extra_args": {"other": 1},
    }
    assert first.arm == Arm("f@0+g@2.5", (("f", 0.0), ("g", 2.5)))
    assert second == BatchPrompt(
        "Once", raw=True, id="b", sampling={"max_tokens": 3, "logprobs": 2, "top_k": 5}
    )


def test_steering_is_not_lost_in_a_column_or_a_second_key(tmp_path: Path) -> None:
    table = tmp_path / "rows.csv"
    table.write_text("prompt,docname,cna_circuit\na,b,c\n")
    with pytest.raises(PromptError, match=r"rows.csv:1: the column 'cna_circuit' steers nothing"):
        read_batch(table)
    lines = tmp_path / "rows.jsonl"
    xargs = '{"cna_circuit": "f", "cna_multiplier": 0, "cna_multiplier": 1}'
    body = f'{{"prompt": "a", "vllm_xargs": {xargs}}}'
    lines.write_text(f'{{"custom_id": "a", "url": "/v1/completions", "body": {body}}}\n')
    with pytest.raises(PromptError, match=r"rows.jsonl:1: body.vllm_xargs.cna_mult.*twice"):
        read_batch(lines)


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"prompt": "a", "temperature": 1}, "unknown key 'temperature'; known are prompt"),
        ({"prompt": "a", "sampling": [1]}, "'sampling' must be an object"),
        ({"prompt": "a", "tags": "x"}, "'tags' must be a list of strings"),
        ({"prompt": "a", "tags": [1]}, "'tags' must be a list of strings"),
        ({"prompt": "a", "id": True}, "'id' must be"),
        ({"prompt": "a", "id": [1]}, "'id' must be"),
        ({"prompt": "\ud800"}, "is not Unicode text"),
        ({"prompt": "a", "tags": ["\udfff"]}, "is not Unicode text"),
        ({"prompt": "a", "messages": [TURN]}, "exactly one"),
        ({"id": 1}, "exactly one"),
        (openai(priority=1), "unknown key 'priority'"),
        (openai(method="GET"), "'method' must be POST"),
        (openai(url="/v1/embeddings"), "'url' must be"),
        (openai(url=None), "'url' must be"),
        (openai(body=None), "'body' must be an object"),
        (openai(custom_id=[1]), "'id' must be"),
        (openai(body_stream=True), "'stream'"),
        (openai(body_messages=None), "'messages' must be a non-empty list"),
        (openai(url="/v1/completions", body={}), "'prompt' must be a non-empty string"),
        (openai(body_tools=[{}]), "'body': 'tools' is not supported"),
        (openai(body_response_format={"type": "json_object"}), "'response_format' is not"),
        (openai(body_vllm_xargs=3), "'vllm_xargs' must be an object"),
        (openai(body_vllm_xargs={"cna_circuit": "f"}), "cna_multiplier: missing"),
        (openai(body_vllm_xargs={"cna_circut": "f"}), "did you mean cna_circuit"),
        (openai(body_vllm_xargs={"cna_circuit": "f", "cna_multiplier": "0"}), "must be a number"),
        (openai(body_vllm_xargs={"circuit": "f"}), "body.vllm_xargs.circuit: unknown field; did"),
        (openai(body_cna_circuit="f"), "body.cna_circuit: is in body; put it into body.vllm_xargs"),
        (openai(cna_circuit="f"), "cna_circuit: is at the top level"),
        (openai(body_metadata={"cna_scope": "all"}), "body.metadata.cna_scope: holds the letters"),
        ({"prompt": "a", "cna_circuit": "f"}, "cna_circuit steers nothing: rows are steered by"),
        ({"prompt": "a", "vllm_xargs": {"cna_scope": "all"}}, "vllm_xargs.cna_scope steers no"),
        ({"prompt": "a", "sampling": {"extra_args": {"circuit": 1}}}, "sampling.extra_args.circ"),
        ({"messages": [{**TURN, "CNA": 1}]}, "messages.0.CNA steers nothing"),
    ],
)
def test_bad_rows_name_the_line(tmp_path: Path, row: Any, says: str) -> None:
    path = jsonl(tmp_path, {"prompt": "good"}, row)
    with pytest.raises(PromptError) as refused:
        read_batch(path)
    assert str(refused.value).startswith(f"{path}:2: ")
    assert says in str(refused.value)
    assert "\n" not in str(refused.value)


def test_bad_files(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("\n")
    for name, says in [("p.txt", "holds no prompt"), ("p.xml", "unknown kind"), ("n.csv", "read")]:
        with pytest.raises(PromptError, match=says):
            read_batch(tmp_path / name)
    with pytest.raises(PromptError, match=r"\.csv files only"):
        read_batch(tmp_path / "p.txt", column="q")
