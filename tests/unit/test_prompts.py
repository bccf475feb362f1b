# SPDX-License-Identifier: Apache-2.0
"""Prompt files: the three kinds, and errors that name the file and the line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cna_vllm.cli.demo import packaged
from cna_vllm.text.prompts import Prompt, PromptError, prompts_digest, read_prompts

TURN = {"role": "user", "content": "Hi"}


def write(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
    return path


def texts(prompts: list[Prompt]) -> list[str | None]:
    return [prompt.text for prompt in prompts]


def test_txt(tmp_path: Path) -> None:
    path = write(tmp_path, "p.txt", "\ufeffune été\r\n\n  \nline\u2028separator\nlast")
    assert texts(read_prompts(path)) == ["une été", "line\u2028separator", "last"]


def test_jsonl(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        "p.jsonl",
        '{"prompt": "a", "id": 1}\n\n{"messages": [{"role": "user", "content": "Hi"}]}\n',
    )
    assert read_prompts(path) == [Prompt(text="a"), Prompt(messages=(TURN,))]


def test_csv(tmp_path: Path) -> None:
    path = write(tmp_path, "p.csv", 'id,prompt,q\n1,"two\nlines, one",x\n\n2,b,y\n')
    assert texts(read_prompts(path)) == ["two\nlines, one", "b"]
    assert texts(read_prompts(path, column="q")) == ["x", "y"]


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("p.txt", "\n \n", "holds no prompt"),
        ("p.txt", b"good\n\xff\n", ":2: is not UTF-8"),
        ("p.jsonl", '{"prompt": "a"}\n{\n', ":2: is not JSON"),
        ("p.jsonl", '"a"\n', ":1: must be an object"),
        ("p.jsonl", "{}\n", ":1: give exactly one"),
        ("p.jsonl", '{"prompt": "a", "messages": []}\n', ":1: give exactly one"),
        ("p.jsonl", '{"prompt": " "}\n', ":1: 'prompt'"),
        ("p.jsonl", '{"prompt": 3}\n', ":1: 'prompt'"),
        ("p.jsonl", '{"messages": []}\n', ":1: 'messages'"),
        ("p.jsonl", '{"messages": "Hi"}\n', ":1: 'messages'"),
        ("p.jsonl", '{"messages": ["Hi"]}\n', ":1: each of 'messages'"),
        ("p.jsonl", '{"messages": [{"role": "user"}]}\n', ":1: each of 'messages'"),
        ("p.jsonl", "[" * 100_000 + "\n", ":1: is not usable JSON"),
        ("p.jsonl", '{"prompt": ' + "9" * 5000 + "}\n", ":1: is not usable JSON"),
        ("p.csv", "a,b\n1,2\n", ":1: no column 'prompt'; the columns are 'a', 'b'"),
        ("p.csv", "", ":1: no column"),
        ("p.csv", "id,prompt\n1,x\n2,\n", ":3: 'prompt'"),
        ("p.csv", 'prompt\n"open\n', "is not CSV"),
        ("p.parquet", "x", "unknown kind of file"),
    ],
)
def test_bad_files(tmp_path: Path, name: str, content: str | bytes, says: str) -> None:
    path = write(tmp_path, name, content)
    with pytest.raises(PromptError) as refused:
        read_prompts(path)
    assert str(refused.value).startswith(str(path))
    assert says in str(refused.value)
    assert "\n" not in str(refused.value)


def test_missing_file_and_misplaced_column(tmp_path: Path) -> None:
    with pytest.raises(PromptError, match="No such file"):
        read_prompts(tmp_path / "none.txt")
    with pytest.raises(PromptError, match=r"\.csv files only"):
        read_prompts(write(tmp_path, "p.txt", "a"), column="q")


@pytest.mark.parametrize(
    "fields",
    [{}, {"text": "a", "messages": [TURN]}, {"text": ""}, {"messages": []}, {"text": 1}],
)
def test_prompt_is_text_or_messages(fields: dict[str, Any]) -> None:
    with pytest.raises(PromptError):
        Prompt(**fields)


def test_digest_depends_on_content_and_order() -> None:
    a, b, chat = Prompt(text="a"), Prompt(text="b"), Prompt(messages=(TURN,))
    digests = {prompts_digest(p) for p in ([a, b], [b, a], [a], [chat], [])}
    assert len(digests) == 5
    assert prompts_digest([chat]) == prompts_digest(
        [Prompt(messages=[dict(reversed(TURN.items()))])]
    )


def test_packaged_prompts() -> None:
    counts = {name: len(packaged(name)) for name in ("positive", "negative", "heldout", "plain")}
    assert counts == {"positive": 12, "negative": 12, "heldout": 16, "plain": 8}
    seen = {prompt.text for prompt in packaged("positive")}
    assert not seen & {prompt.text for prompt in packaged("heldout")}
