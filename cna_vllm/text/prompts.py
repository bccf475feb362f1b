# SPDX-License-Identifier: Apache-2.0
"""Prompts: read from .txt, .jsonl and .csv files, and rendered to the token ids that the engine
sees, in one way for discovery and generation."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from numbers import Integral
from pathlib import Path
from typing import Any

from cna_vllm.files import FileError, read_bounded

MAX_FILE_BYTES = 256 * 2**20
DEFAULT_COLUMN = "prompt"
_MEDIA = re.compile(r"(^|_)(image|video|audio|file)s?(_|$)|multi_modal")
_TEXT_ONLY = (
    "images, audio and video are taken by the server only (`cna-vllm serve`, a chat request's "
    "'image_url'); give text"
)


class PromptError(ValueError):
    """A prompt or a prompt file that cannot be used: one line with the file and the line."""


@dataclass(frozen=True)
class Prompt:
    """One request's input: plain `text`, or chat `messages` with `role` and `content`, or the
    `token_ids` that the engine shall see as they are."""

    text: str | None = None
    messages: Sequence[Mapping[str, Any]] | None = None
    token_ids: Sequence[int] | None = None

    def __post_init__(self) -> None:
        if self.token_ids is not None:
            if self.text is not None or self.messages is not None:
                raise PromptError("give exactly one of 'prompt', 'messages' and token ids")
            ids = self.token_ids
            if not isinstance(ids, list | tuple) or not ids or not all(map(_is_id, ids)):
                raise PromptError("token ids must be a non-empty list of whole numbers from 0")
            object.__setattr__(self, "token_ids", tuple(map(int, ids)))
        elif (self.text is None) == (self.messages is None):
            raise PromptError("give exactly one of 'prompt' and 'messages'")
        elif self.text is not None:
            if not isinstance(self.text, str) or not self.text.strip():
                raise PromptError("'prompt' must be a non-empty string")
        else:
            if not isinstance(self.messages, list | tuple) or not self.messages:
                raise PromptError("'messages' must be a non-empty list")
            for message in self.messages:
                if not isinstance(message, dict) or not isinstance(message.get("role"), str):
                    raise PromptError("each of 'messages' must be an object with a 'role'")
                if "content" not in message:
                    raise PromptError("each of 'messages' must have a 'content'")
                _refuse_media(message)
            object.__setattr__(self, "messages", tuple(self.messages))

    @classmethod
    def of(cls, value: PromptLike) -> Prompt:
        """From what Python code has at hand: a string, chat messages or token ids, as they are or
        in vLLM's forms `{"prompt": ...}`, `{"prompt_token_ids": ...}` and `{"messages": ...}`.

        Raises:
            PromptError: it is none of these.
        """
        if isinstance(value, Prompt):
            return value
        if isinstance(value, str):
            return cls(text=value)
        if isinstance(value, Mapping) and len(value) == 1 and (key := next(iter(value))) in _FORMS:
            return cls(**{_FORMS[key]: value[key]})
        if isinstance(value, Mapping) and (key := _media_key(value)):
            raise PromptError(f"{key!r}: {_TEXT_ONLY}")
        if isinstance(value, list | tuple) and value:
            return cls(token_ids=value) if _is_id(value[0]) else cls(messages=value)
        raise PromptError(
            "a prompt must be a string, a list of chat messages or a list of token ids, not "
            f"{type(value).__name__}"
        )

    def to_dict(self) -> dict[str, Any]:
        """`{"prompt": text}` or `{"messages": [...]}`, as in a .jsonl file; token ids as
        `{"prompt_token_ids": [...]}`."""
        if self.token_ids is not None:
            return {"prompt_token_ids": list(self.token_ids)}
        if self.text is not None:
            return {"prompt": self.text}
        return {"messages": [dict(message) for message in self.messages or ()]}


PromptLike = Prompt | str | Sequence[int] | Sequence[Mapping[str, Any]] | Mapping[str, Any]
"""Whatever `Prompt.of` takes."""

_FORMS = {"prompt": "text", "messages": "messages", "prompt_token_ids": "token_ids"}


def prompts_of(values: Iterable[PromptLike], what: str = "") -> list[Prompt]:
    """`Prompt.of` each of them.

    Args:
        what: name of the set, for messages.

    Raises:
        PromptError: one is no prompt, by its number from 1; or `values` is a single string.
    """
    if isinstance(values, str | Mapping):
        raise PromptError(f"{what or 'prompts'}: must be a list of prompts, not a single one")
    found = []
    for number, value in enumerate(values, start=1):
        try:
            found.append(Prompt.of(value))
        except PromptError as error:
            raise PromptError(f"{what} prompt {number}: {error}".lstrip()) from error
    return found


def read_prompts(path: str | os.PathLike[str], *, column: str | None = None) -> list[Prompt]:
    """Reads a prompt file by its suffix.

    `.txt`: one prompt a line. `.jsonl`: objects with `prompt` or `messages`. `.csv`: the column
    named `column` (default `prompt`). Blank lines are skipped.

    Raises:
        PromptError: `FILE: reason` or `FILE:LINE: reason`.
    """
    name, suffix = os.fspath(path), Path(path).suffix.lower()
    if suffix not in (".txt", ".jsonl", ".csv"):
        raise PromptError(f"{name}: unknown kind of file; use .txt, .jsonl, .csv")
    if column is not None and suffix != ".csv":
        raise PromptError(f"{name}: a column can be named for .csv files only")
    text = read_text(name)
    rows: Iterable[tuple[int, Mapping[str, Any]]]
    if suffix == ".txt":
        rows = ((number, {"prompt": line}) for number, line in numbered_lines(text))
    elif suffix == ".jsonl":
        rows = json_rows(name, text)
    else:
        at = column or DEFAULT_COLUMN
        rows = ((number, {"prompt": row[at]}) for number, row in csv_rows(name, text, at))
    prompts = []
    for number, row in rows:
        with at_line(name, number):
            prompts.append(Prompt(text=row.get("prompt"), messages=row.get("messages")))
    if not prompts:
        raise PromptError(f"{name}: holds no prompt")
    return prompts


def templated(tokenizer: Any, prompt: Prompt, *, raw: bool = False) -> bool:
    """Whether ``render`` applies the chat template to a prompt: messages need it."""
    if prompt.text is None:
        return prompt.messages is not None
    return not raw and getattr(tokenizer, "chat_template", None) is not None


def chat_template_used(
    tokenizer: Any, prompts: Sequence[Prompt], *, raw: bool = False
) -> bool | str:
    """Whether ``render`` applies the chat template to prompts: what provenance says of them.

    A text where it is so for some of them only.
    """
    count = sum(templated(tokenizer, prompt, raw=raw) for prompt in prompts)
    return bool(count) if count in (0, len(prompts)) else f"for {count} of {len(prompts)} prompts"


def render(tokenizer: Any, prompt: Prompt, *, raw: bool = False) -> list[int]:
    """Token ids of a prompt: one user turn through the chat template, with the generation prompt.

    Text of a model without a chat template, or with ``raw``, is tokenized as it is, and token ids
    are the prompt. Ids are returned rather than text, so that no special token is added twice.

    Raises:
        ValueError: messages for a model without a chat template, or its template refuses them.
    """
    if prompt.token_ids is not None:
        return list(prompt.token_ids)
    messages = prompt.messages
    if messages is None:
        if not templated(tokenizer, prompt, raw=raw):
            return list(tokenizer.encode(prompt.text))
        messages = [{"role": "user", "content": prompt.text}]
    elif getattr(tokenizer, "chat_template", None) is None:
        raise ValueError("messages: this model has no chat template; give prompts as text")
    try:
        ids = tokenizer.apply_chat_template(
            [dict(message) for message in messages],
            tokenize=True,
            add_generation_prompt=True,
            return_dict=False,
        )
    except Exception as error:  # a template is a program of the model's: it can raise anything
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"messages: the model's chat template refuses them: {reason}") from error
    return list(ids)


def prompts_digest(prompts: Iterable[Prompt]) -> str:
    """SHA-256 (64 hex digits) over the prompts, in order."""
    whole = hashlib.sha256()
    for prompt in prompts:
        line = json.dumps(prompt.to_dict(), ensure_ascii=True, sort_keys=True)
        whole.update(line.encode("ascii") + b"\n")
    return whole.hexdigest()


def read_text(name: str) -> str:
    """Text of a prompt file, without a byte order mark.

    Raises:
        PromptError: it cannot be read, is too large, or is not UTF-8.
    """
    try:
        raw = read_bounded(name, MAX_FILE_BYTES)
    except FileError as error:
        raise PromptError(f"{name}: {error}") from error
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise PromptError(f"{name}:{line}: is not UTF-8 text") from error


def numbered_lines(text: str) -> Iterator[tuple[int, str]]:
    """Numbered non-blank lines; only newlines end a line, not every character Unicode calls so."""
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield number, line.strip()


def json_rows(name: str, text: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Line number and object of every non-blank line of a .jsonl file.

    Raises:
        PromptError: a line is not a JSON object.
    """
    for number, line in numbered_lines(text):
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise PromptError(f"{name}:{number}: is not JSON: {error.msg}") from error
        except (RecursionError, ValueError) as error:
            raise PromptError(f"{name}:{number}: is not usable JSON: {error}") from error
        if not isinstance(row, dict):
            raise PromptError(f"{name}:{number}: must be an object with 'prompt' or 'messages'")
        yield number, row


def csv_rows(name: str, text: str, column: str) -> Iterator[tuple[int, dict[str, str]]]:
    """Last line number and fields of every row of a .csv file that is not blank.

    Raises:
        PromptError: it is not CSV, or has no column of that name.
    """
    # As csv reads an open file: only line feed and carriage return end a line.
    rows = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        if column not in (rows.fieldnames or ()):
            found = ", ".join(map(repr, rows.fieldnames or ())) or "none"
            raise PromptError(f"{name}:1: no column {column!r}; the columns are {found}")
        for row in rows:
            if any(isinstance(value, str) and value.strip() for value in row.values()):
                yield rows.line_num, {k: v or "" for k, v in row.items() if k is not None}
    except csv.Error as error:
        raise PromptError(f"{name}:{rows.line_num}: is not CSV: {error}") from error


@contextmanager
def at_line(name: str, number: int) -> Iterator[None]:
    """Puts `FILE:LINE: ` before what a PromptError inside says."""
    try:
        yield
    except PromptError as error:
        raise PromptError(f"{name}:{number}: {error}") from error


def _refuse_media(message: Mapping[str, Any]) -> None:
    """A chat template would write only the mark of an image that the model never gets to see."""
    content = message["content"]
    parts = content if isinstance(content, list | tuple) else ()
    for part in (message, *(part for part in parts if isinstance(part, Mapping))):
        if named := _media(part.get("type")) or _media_key(part):
            raise PromptError(f"a message has {named!r}: {_TEXT_ONLY}")


def _media_key(part: Mapping[Any, Any]) -> str:
    return next(filter(None, map(_media, part)), "")


def _media(name: object) -> str:
    return name if isinstance(name, str) and _MEDIA.search(name) else ""


def _is_id(value: object) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= 0
