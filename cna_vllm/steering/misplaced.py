# SPDX-License-Identifier: Apache-2.0
"""Signs that a request wants steering in a place or a spelling that nothing reads.

Steering fields are taken in one object of a request, its *place*, and nowhere else. vLLM ignores
what it does not know, so that a field outside of it would be answered by the plain model. This
module finds such fields in what a client sent; it knows JSON, and nothing of HTTP or of vLLM.

A key is a sign if it holds the letters `cna`, and, outside of the user's own data (`OWN_DATA`), if
it is a field without its prefix. Inside that data a key may hold them where they are only the end
of one word and the beginning of `name`: `docname`, `cname`, `funcName`.
"""

from __future__ import annotations

import difflib
import json
import re
from collections import deque
from collections.abc import Mapping
from typing import Any

from cna_vllm.steering.content import show
from cna_vllm.steering.request import (
    FIELD_PREFIX,
    FIELD_RECORD,
    FIELDS,
    RESOLVED_FIELD,
    SCOPES,
    SteeringError,
)

Path = tuple[str, ...]

XARGS: Path = ("vllm_xargs",)
EXTRA_ARGS: Path = ("sampling_params", "extra_args")

OWN_DATA = frozenset(
    {
        "arguments",
        "chat_template_kwargs",
        "documents",
        "features",
        "functions",
        "input",
        "items",
        "logit_bias",
        "media_io_kwargs",
        "messages",
        "metadata",
        "mm_processor_kwargs",
        "output_config",
        "prompt",
        "questions",
        "response_format",
        "state",
        "structured_outputs",
        "system",
        "text",
        "tools",
    }
)
"""Fields of requests whose keys the user chooses, at any depth."""

_ONCE = frozenset({"model", *XARGS, *EXTRA_ARGS, "extra_body"})
_BARE = frozenset(field.removeprefix(FIELD_PREFIX) for field in FIELDS) - {"scope"}
_WORDS = (b"cna", b"circuit", b"multiplier", b"vector", b"coefficient", b"scope", b"steer")
_HIDDEN = re.compile(rb"\\u00[4-7]")  # escapes of ASCII letters, which need none


class Pairs(list[tuple[str, Any]]):
    """A JSON object as it was written: in order, and with keys that are there twice."""


def may_hold_signs(raw: bytes) -> bool:
    """Whether JSON text has to be read to know. Of a plain request, this is all that happens."""
    return (
        _holds_words(raw)
        or b"\0" in raw  # UTF-16 or UTF-32
        or _HIDDEN.search(raw) is not None
        or raw.count(b'"model"') > 1
    )


def first_sign_in_text(raw: bytes, place: Path | None) -> SteeringError | None:
    """`first_sign` of JSON text in any encoding that Python's `json` reads.

    Text that cannot be read, and holds a word of ours, is refused.
    """
    if not may_hold_signs(raw):
        return None
    try:
        value = json.loads(raw, object_pairs_hook=Pairs)
    except (ValueError, RecursionError) as error:
        if not _holds_words(raw):
            return None
        problem = f"cannot be read as JSON, and may ask for steering: {show(str(error))}"
        return SteeringError("body", problem)
    return first_sign(value, place)


def _holds_words(raw: bytes) -> bool:
    lowered = raw.lower()
    return any(word in lowered for word in _WORDS)


def top_level(raw: bytes, key: str) -> Any:
    """The value of a key of a JSON object, the last one as JSON has it; None where there is none,
    or no such object."""
    try:
        value = json.loads(raw)
    except (ValueError, RecursionError):
        return None
    return value.get(key) if isinstance(value, dict) else None


def first_sign(value: Any, place: Path | None) -> SteeringError | None:
    """What is wrong with the outermost sign of steering outside of `place`, or None.

    Args:
        value: JSON; objects are mappings or `Pairs`.
        place: path of the object that takes steering fields, whose own `cna_` fields are left to
            admission (but for booleans within a body, which vLLM's models make numbers of); None
            where nothing takes them.
    """
    queue: deque[tuple[Path, Any, bool]] = deque([((), value, False)])
    while queue:
        path, value, own = queue.popleft()
        if isinstance(value, Pairs | Mapping):
            pairs = value if isinstance(value, Pairs) else value.items()
            if isinstance(value, Pairs) and (twice := _twice(path, value, own)) is not None:
                return twice
            for key, inner in pairs:
                if not isinstance(key, str):
                    continue
                if path == place and key.startswith(FIELD_PREFIX):
                    if place and (wrong := _boolean(key, inner)) is not None:
                        return wrong
                    continue
                if _is_sign(key, inner, own):
                    return _error(path, key, inner, place, own)
                queue.append(((*path, _shown(key)), inner, own or key in OWN_DATA))
        elif isinstance(value, list | tuple):
            queue.extend(((*path, str(i)), inner, own) for i, inner in enumerate(value))
    return None


def holds_letters(key: str, *, own: bool = False) -> bool:
    """Whether a key holds the letters `cna`. own: those of `...c` + `name` do not count."""
    folded = key.casefold()
    if own:
        folded = folded.replace("cname", " ")
    return "cna" in folded or "cna" in "".join(c for c in folded if c.isprintable())


def _is_sign(key: str, value: Any, own: bool) -> bool:
    if own:
        return holds_letters(key, own=True)
    word = _word(key)
    return (
        holds_letters(key)
        or "circuit" in word
        or word.startswith("steer")
        or word.removesuffix("s") in _BARE
        or (word == "scope" and isinstance(value, str) and value.casefold() in SCOPES)
    )


def _word(key: str) -> str:
    return "".join(c for c in key.casefold() if c.isalnum())


def _twice(path: Path, pairs: Pairs, own: bool) -> SteeringError | None:
    """Of a key that is there twice, JSON keeps the last one and says nothing."""
    seen: dict[str, Any] = {}
    for key, value in pairs:
        once = not own and (key in _ONCE or key.startswith(FIELD_PREFIX))
        if once and key in seen and seen[key] != value:
            return SteeringError(
                ".".join((*path, _shown(key))), "is there twice, with different values; send one"
            )
        seen[key] = value
    return None


def _boolean(key: str, value: Any) -> SteeringError | None:
    for one in value if isinstance(value, list) else [value]:
        if isinstance(one, bool):
            return SteeringError(key, f"must be a name or a number, not {str(one).lower()}")
    return None


def _error(path: Path, key: str, value: Any, place: Path | None, own: bool) -> SteeringError:
    field = ".".join((*path, _shown(key)))
    if key in (RESOLVED_FIELD, FIELD_RECORD):
        return SteeringError(field, "is set by the server only; remove it")
    if place is None:
        return SteeringError(field, "nothing here is steered by fields; remove it")
    where = f"is in {'.'.join(path)}" if path else "is at the top level of the body"
    target = ".".join(place) or "extra_args itself"
    if own:
        return SteeringError(
            field,
            "holds the letters cna, as steering fields do, which are not taken here but in "
            f"{target}; rename it if it is something else",
        )
    meant = key if key in FIELDS else _meant(key)
    if meant is None:
        return SteeringError(field, f"unknown field; in {target} there are {', '.join(FIELDS)}")
    put = f"put it into {target}: {_example(place, meant, value)}"
    if meant == key:
        return SteeringError(field, f"{where}; {put}")
    if path == place:
        return SteeringError(field, f"unknown field; did you mean {meant}?")
    return SteeringError(field, f"{where}; did you mean {meant}? Then {put}")


def _meant(key: str) -> str | None:
    bare = FIELD_PREFIX + _word(key[:64]).replace("cna", "", 1)
    close = difflib.get_close_matches(bare, FIELDS, n=1, cutoff=0.8)
    return close[0] if close else None


def _example(place: Path, field: str, value: Any) -> str:
    shown = "..."
    if isinstance(value, str | int | float) and len(str(value)[:61]) <= 60:
        shown = json.dumps(value)
    example = f'{{"{field}": {shown}}}'
    for key in reversed(place):
        example = f'{{"{key}": {example}}}'
    return example


def _shown(key: str) -> str:
    return key if key.isprintable() and len(key) <= 64 else show(key)
