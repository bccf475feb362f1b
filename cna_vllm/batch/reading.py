# SPDX-License-Identifier: Apache-2.0
"""Rows of a batch: prompts with identifiers, tags and sampling of their own, from four formats."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cna_vllm.batch.openai_file import read_request
from cna_vllm.steering.arms import Arm
from cna_vllm.steering.content import show
from cna_vllm.steering.misplaced import XARGS, first_sign_in_text, holds_letters
from cna_vllm.text.prompts import (
    DEFAULT_COLUMN,
    Prompt,
    PromptError,
    at_line,
    csv_rows,
    json_rows,
    numbered_lines,
    read_text,
)

_KEYS = ("prompt", "messages", "id", "tags", "sampling")
_TAG_SEPARATOR = ";"
_ARMS = (
    "steers nothing: rows are steered by the run's arms, or, as requests of an OpenAI batch file, "
    "by fields in body.vllm_xargs; remove it"
)


@dataclass(frozen=True)
class BatchPrompt(Prompt):
    """A prompt as a batch file has it.

    Attributes:
        id: the file's own name of the row; carried to the output.
        tags: words to group rows by; carried to the output.
        sampling: fields of `vllm.SamplingParams` that replace the run's.
        raw: tokenize the text as it is, without the chat template.
        arm: the row's own steering, in place of the run's arms.
        model: the model that the row names, to be compared with the run's.
        source: `FILE:LINE`, for messages.
    """

    id: str | int | None = None
    tags: tuple[str, ...] = ()
    sampling: Mapping[str, Any] = field(default_factory=dict)
    raw: bool = False
    arm: Arm | None = None
    model: str | None = None
    source: str = field(default="", compare=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.id is not None and (
            isinstance(self.id, bool) or not isinstance(self.id, str | int)
        ):
            raise PromptError(f"'id' must be a string or a whole number, not {show(self.id)}")
        if not isinstance(self.tags, list | tuple) or not all(
            isinstance(t, str) for t in self.tags
        ):
            raise PromptError(f"'tags' must be a list of strings, not {show(self.tags)}")
        object.__setattr__(self, "tags", tuple(self.tags))
        if not isinstance(self.sampling, Mapping):
            raise PromptError(f"'sampling' must be an object, not {show(self.sampling)}")
        try:
            json.dumps(self.to_dict(), ensure_ascii=False).encode("utf-8")
        except UnicodeEncodeError as error:  # half of a surrogate pair, written as an escape
            raise PromptError(f"is not Unicode text: {error.reason}") from error

    def to_dict(self) -> dict[str, Any]:
        """Columns of an output row: `id` and `tags` where there are any, `prompt` or `messages`."""
        row: dict[str, Any] = {} if self.id is None else {"id": self.id}
        if self.tags:
            row["tags"] = list(self.tags)
        return row | super().to_dict()


def read_batch(path: str | os.PathLike[str], *, column: str | None = None) -> list[BatchPrompt]:
    """Reads the rows of a batch file by its suffix.

    `.txt`: one prompt a line. `.csv`: the column named `column` (default `prompt`), and the
    columns `id` and `tags` (several separated by `;`) where they are; others are ignored.
    `.jsonl`: objects with `prompt` or `messages`, and optionally `id`, `tags`, `sampling`; or
    requests of an OpenAI batch file, which have a `custom_id`. What asks for steering elsewhere
    than in a request's `vllm_xargs` is refused.

    Raises:
        PromptError: `FILE: reason` or `FILE:LINE: reason`.
    """
    readers = {".txt": _from_txt, ".jsonl": _from_jsonl, ".csv": _from_csv}
    name, suffix = os.fspath(path), Path(path).suffix.lower()
    if suffix not in readers:
        raise PromptError(f"{name}: unknown kind of file; use {', '.join(readers)}")
    if column is not None and suffix != ".csv":
        raise PromptError(f"{name}: a column can be named for .csv files only")
    rows: list[BatchPrompt] = []
    for number, fields in readers[suffix](name, read_text(name), column or DEFAULT_COLUMN):
        with at_line(name, number):
            rows.append(BatchPrompt(**fields, source=f"{name}:{number}"))
    if not rows:
        raise PromptError(f"{name}: holds no prompt")
    return rows


Numbered = Iterator[tuple[int, dict[str, Any]]]


def _from_txt(name: str, text: str, column: str) -> Numbered:
    for number, line in numbered_lines(text):
        yield number, {"text": line}


def _from_csv(name: str, text: str, column: str) -> Numbered:
    for number, row in csv_rows(name, text, column):
        for key in (key for key in row if holds_letters(key, own=True)):
            raise PromptError(f"{name}:1: the column {show(key)} {_ARMS}")
        tags = (tag.strip() for tag in row.get("tags", "").split(_TAG_SEPARATOR))
        yield (
            number,
            {"text": row[column], "id": row.get("id") or None, "tags": tuple(filter(None, tags))},
        )


def _from_jsonl(name: str, text: str, column: str) -> Numbered:
    lines = numbered_lines(text)
    for (number, row), (_, line) in zip(json_rows(name, text), lines, strict=True):
        with at_line(name, number):
            openai = "custom_id" in row
            raw = line.encode("utf-8", "surrogatepass")
            error = first_sign_in_text(raw, ("body", *XARGS) if openai else None)
            if error is not None:
                raise PromptError(str(error) if openai else f"{error.field} {_ARMS}")
            yield number, read_request(row) if openai else _own_form(row)


def _own_form(row: Mapping[str, Any]) -> dict[str, Any]:
    for key in row:
        if key not in _KEYS:
            raise PromptError(f"unknown key {show(key)}; known are {', '.join(_KEYS)}")
    present = {key: value for key, value in row.items() if value is not None}
    if "prompt" in present:
        present["text"] = present.pop("prompt")
    return present
