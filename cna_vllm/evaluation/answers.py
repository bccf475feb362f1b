# SPDX-License-Identifier: Apache-2.0
"""From the rows of an A/B test's answers.jsonl to answers by arm, prompt and sample."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cna_vllm.evaluation.metrics import Answer
from cna_vllm.text.prompts import Prompt, prompts_digest, prompts_of

Answers = dict[str, list[list[Answer]]]  # arm -> prompt, all sets in their order -> sample


class AnswerError(ValueError):
    """Answers that are not those of the test: one line."""


@dataclass(frozen=True)
class PromptSet:
    """Prompts that are judged together.

    Attributes:
        name: what reports call it; unique in a test.
        prompts: its prompts: strings, chat messages, token ids or `Prompt`s; kept as `Prompt`s.
        tag: `harmful`, `benign` or another word that metrics may know; None for none.
        source: the file that it was read from, if any.
    """

    name: str
    prompts: Sequence[Prompt]
    tag: str | None = None
    source: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "prompts", prompts_of(self.prompts, self.name))

    def info(self) -> SetInfo:
        return SetInfo(
            self.name, self.tag, self.source, len(self.prompts), prompts_digest(self.prompts)
        )


@dataclass(frozen=True)
class SetInfo:
    """What a result keeps of a `PromptSet`: `prompts` is their number."""

    name: str
    tag: str | None
    source: str | None
    prompts: int
    digest: str


def read_rows(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The rows of an answers.jsonl. Raises AnswerError with file and line."""
    rows = []
    try:
        with Path(path).open(encoding="utf-8") as handle:
            for number, line in enumerate(handle, start=1):
                row = json.loads(line)
                if not isinstance(row, dict):
                    raise AnswerError(f"{path}:{number}: is not an object")
                rows.append(row)
    except OSError as error:
        raise AnswerError(f"{path}: cannot be read: {error.strerror}") from error
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise AnswerError(f"{path}:{len(rows) + 1}: is not a row of JSON: {error}") from error
    return rows


def collect(
    rows: Iterable[Mapping[str, Any]],
    arms: Sequence[str],
    sets: Sequence[SetInfo],
    samples: int,
    *,
    prompt_token_ids: Sequence[Sequence[int]] | None = None,
) -> Answers:
    """Sorts rows by arm, prompt and sample.

    rows: with `index` (of the prompt, over all sets), `arm`, `sample` (absent or None: 0),
    `prompt` or `messages`, `text`, `token_ids`, `finish_reason`.
    prompt_token_ids: of each prompt, for metrics that need the engine.

    Raises:
        AnswerError: a row is malformed, belongs to none of the prompts or arms, comes twice or is
            missing, or the prompts are not those of `sets`.
    """
    infos = [info for info in sets for _ in range(info.prompts)]
    grid: dict[tuple[str, int, int], Answer] = {}
    prompts: dict[int, Prompt] = {}
    for row in rows:
        try:
            prompt = Prompt(row.get("prompt"), row.get("messages"), row.get("prompt_token_ids"))
            key = str(row["arm"]), int(row["index"]), int(row.get("sample") or 0)
            ids = tuple(int(token) for token in row.get("token_ids") or ())
            text = str(row["text"])
        except (KeyError, TypeError, ValueError) as error:
            raise AnswerError(f"answers: a row is malformed ({error!r}): {row!r:.200}") from error
        if key[0] not in arms or not 0 <= key[1] < len(infos) or not 0 <= key[2] < samples:
            raise AnswerError(f"answers: {_place(key)} is not part of this test")
        if key in grid:
            raise AnswerError(f"answers: {_place(key)} is there twice")
        if prompts.setdefault(key[1], prompt) != prompt:
            raise AnswerError(f"answers: {_place(key)} is to another prompt than in other arms")
        tag = infos[key[1]].tag
        grid[key] = Answer(
            prompt=last_user_turn(prompt),
            text=text,
            messages=None if prompt.messages is None else tuple(prompt.messages),
            token_ids=ids,
            prompt_token_ids=tuple(prompt_token_ids[key[1]]) if prompt_token_ids else (),
            finish_reason=row.get("finish_reason"),
            tags=frozenset({tag} if tag else ()),
        )
    for key in itertools.product(arms, range(len(infos)), range(samples)):
        if key not in grid:
            raise AnswerError(f"answers: {_place(key)} is missing; run the test to its end")
    start = 0
    for info in sets:
        part = [prompts[index] for index in range(start, start + info.prompts)]
        if prompts_digest(part) != info.digest:
            raise AnswerError(f"answers: the prompts of the set {info.name!r} are not the test's")
        start += info.prompts
    return {
        arm: [[grid[arm, i, sample] for sample in range(samples)] for i in range(len(infos))]
        for arm in arms
    }


def last_user_turn(prompt: Prompt) -> str:
    """Plain text of the last user turn of a chat, or the whole text of another prompt."""
    for message in reversed(prompt.messages or ()):
        if message["role"] == "user":
            content = message["content"]
            if isinstance(content, str):
                return content
            parts = content if isinstance(content, list | tuple) else ()
            return "\n".join(
                part["text"]
                for part in parts
                if isinstance(part, Mapping) and isinstance(part.get("text"), str)
            )
    return prompt.text or ""


def _place(key: tuple[str, int, int]) -> str:
    return f"arm {key[0]!r}, prompt {key[1]}, sample {key[2]}"
