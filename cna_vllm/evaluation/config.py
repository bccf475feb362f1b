# SPDX-License-Identifier: Apache-2.0
"""The YAML file of an A/B test: the same things that the command's flags say, by name.

    circuits: {refusal: refusal.json}
    arms: ["off=refusal@0:all", "half=refusal@0.5:all"]
    prompts: ["harmful.txt:harmful", {file: benign.csv, tag: benign, column: goal}]
    metrics: [refusal, false_refusal, quality]
    effects: {refusal: 0.1}
    sampling: {temperature: 0.7, max_tokens: 128}
    samples: 2
    seed: 0
    control: plain

Files are looked for beside the configuration file.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cna_vllm.evaluation.answers import PromptSet
from cna_vllm.steering.content import is_int, show
from cna_vllm.steering.request import SCOPES
from cna_vllm.text.prompts import PromptError, read_prompts

MAX_FILE_BYTES = 2**20


class ConfigError(ValueError):
    """A configuration that cannot be used: `FILE: KEY: reason`, one line."""


@dataclass(frozen=True)
class PromptFile:
    """Where a prompt set comes from; `name` defaults to the tag, then to the file's own name."""

    file: str
    tag: str | None = None
    name: str | None = None
    column: str | None = None

    @classmethod
    def parse(cls, text: str, column: str | None = None) -> PromptFile:
        """Reads `FILE[:TAG]`; a colon in the name of a file that is there is part of the name."""
        file, separator, tag = text.rpartition(":")
        if not (separator and file and tag) or Path(text).exists():
            file, tag = text, ""
        return cls(file, tag or None, None, column if file.lower().endswith(".csv") else None)

    def read(self) -> PromptSet:
        """Raises PromptError as `read_prompts` does."""
        name = self.name or self.tag or Path(self.file).stem
        return PromptSet(
            name, read_prompts(self.file, column=self.column), self.tag, os.fspath(self.file)
        )


def read_sets(files: list[PromptFile]) -> list[PromptSet]:
    """Raises PromptError where a file cannot be read, or two sets have one name."""
    sets = [file.read() for file in files]
    names = [one.name for one in sets]
    for one in sets:
        if names.count(one.name) > 1:
            raise PromptError(f"{one.source}: another set is called {one.name!r}, too; tag them")
    return sets


def read_config(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Values by key, those of `_KEYS`, of what the file says.

    Raises:
        ConfigError: it cannot be read, a key is unknown, or a value is of another type.
    """
    import yaml

    try:
        raw = Path(path).read_bytes()
        if len(raw) > MAX_FILE_BYTES:
            raise ConfigError(f"{path}: is larger than {MAX_FILE_BYTES} bytes")
        whole = yaml.safe_load(raw)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(f"{path}: is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(whole, Mapping):
        raise ConfigError(f"{path}: must hold keys and values, like arms: [...]")
    found: dict[str, Any] = {}
    for key, value in whole.items():
        if key not in _KEYS:
            raise ConfigError(f"{path}: unknown key {show(key)}; known are {', '.join(_KEYS)}")
        try:
            found[key] = _KEYS[key](value)
        except ConfigError as error:
            raise ConfigError(f"{path}: {key}: {error}") from error
    return _beside(found, Path(path).absolute().parent)


def _beside(found: dict[str, Any], folder: Path) -> dict[str, Any]:
    """With the names of files made absolute."""
    for key in ("circuits", "vectors"):
        if key in found:
            found[key] = {name: str(folder / file) for name, file in found[key].items()}
    if "prompts" in found:
        entries = [
            entry if isinstance(entry, PromptFile) else PromptFile.parse(str(folder / entry))
            for entry in found["prompts"]
        ]
        found["prompts"] = [replace(entry, file=str(folder / entry.file)) for entry in entries]
    return found


def _must(be: str, fits: Callable[[Any], bool]) -> Callable[[Any], Any]:
    """A check that gives the value itself, or says what it must be."""

    def check(value: Any) -> Any:
        if not fits(value):
            raise ConfigError(f"must {be}, not {show(value)}")
        return value

    return check


def _is_number(value: Any) -> bool:
    return (is_int(value) or isinstance(value, float)) and abs(value) <= sys.float_info.max


_text = _must("be a text", lambda value: isinstance(value, str) and value != "")


def _number(value: Any) -> float:
    return float(_must("be a finite number", _is_number)(value))


def _whole(least: int) -> Callable[[Any], Any]:
    return _must(
        f"be a whole number of at least {least}", lambda value: is_int(value) and value >= least
    )


def _list(item: Callable[[Any], Any]) -> Callable[[Any], list[Any]]:
    is_list = _must("be a list with something in it", lambda v: isinstance(v, list) and bool(v))
    return lambda value: [_at(i, item, one) for i, one in enumerate(is_list(value))]


def _mapping(item: Callable[[Any], Any]) -> Callable[[Any], dict[str, Any]]:
    is_mapping = _must("hold names and values", lambda value: isinstance(value, Mapping))
    return lambda value: {_text(k): _at(k, item, one) for k, one in is_mapping(value).items()}


def _at(place: Any, item: Callable[[Any], Any], value: Any) -> Any:
    try:
        return item(value)
    except ConfigError as error:
        raise ConfigError(f"{place}: {error}") from error


def _prompts(value: Any) -> str | PromptFile:
    if isinstance(value, str) and value:
        return value
    fields, known = _mapping(_text)(value), PromptFile.__dataclass_fields__
    for key in fields:
        if key not in known:
            raise ConfigError(f"unknown key {show(key)}; known are {', '.join(known)}")
    if "file" not in fields:
        raise ConfigError("'file' is missing")
    return PromptFile(**fields)


def _confidence(value: Any) -> float:
    _number(value)
    return float(_must("lie between 0 and 1", lambda share: 0 < share < 1)(value))


_KEYS: dict[str, Callable[[Any], Any]] = {
    "circuits": _mapping(_text),
    "vectors": _mapping(_text),
    "arms": _list(_text),
    "multipliers": _list(_number),
    "scopes": _list(_must(f"be one of {', '.join(SCOPES)}", lambda value: value in SCOPES)),
    "prompts": _list(_prompts),
    "metrics": _list(_text),
    "effects": _mapping(_number),
    "control": _text,
    "confidence": _confidence,
    "sampling": _mapping(lambda value: value),
    "samples": _whole(1),
    "seed": _whole(0),
    "raw": _must("be true or false", lambda value: isinstance(value, bool)),
}
