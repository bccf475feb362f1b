# SPDX-License-Identifier: Apache-2.0
"""What circuits and sets of vectors share: the model they are of, their origin, their files."""

from __future__ import annotations

import json
import os
import reprlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from datetime import datetime
from typing import Any, ClassVar, Self, TypeGuard

from cna_vllm.files import FileError, read_bounded, write_atomic

MAX_FILE_BYTES = 64 * 2**20
MAX_LAYERS = 2**16

ORIGIN = ("dtype", "method", "prompts", "tools", "created", "notes")
"""The fields that may be left out, and that no digest counts."""


class Content(ABC):
    """A circuit or a set of vectors: frozen, and checked when it is made.

    Attributes:
        FORMAT, VERSIONS: of its files.
        REQUIRED, OPTIONAL: what its files must say, in their order, and may say.
        MISFIT: the message for another model, of two descriptions.
        Error: what is raised for anything that cannot be used.
    """

    FORMAT: ClassVar[str]
    VERSIONS: ClassVar[tuple[int, ...]] = (1,)
    REQUIRED: ClassVar[tuple[str, ...]]
    OPTIONAL: ClassVar[tuple[str, ...]] = ()
    MISFIT: ClassVar[str]
    Error: ClassVar[type[ValueError]]

    model: str
    architecture: str
    num_layers: int
    dtype: str
    method: Mapping[str, Any]
    prompts: Mapping[str, Any]
    tools: Mapping[str, Any]
    created: str
    notes: tuple[str, ...]

    def __post_init__(self) -> None:
        for name in ("model", "dtype", "created"):
            self._check_text(name, getattr(self, name))
        if not self.model:
            raise self.Error("'model' must not be empty")
        if not (isinstance(self.architecture, str) and self.architecture.isidentifier()):
            raise self.Error(
                f"'architecture' must be a class name such as 'LlamaForCausalLM', "
                f"not {show(self.architecture)}"
            )
        try:
            if self.created:
                datetime.fromisoformat(self.created)
        except ValueError:
            raise self.Error(
                f"'created' must be an ISO 8601 time, not {show(self.created)}"
            ) from None
        self._check_count("num_layers", MAX_LAYERS)
        for name in ("method", "prompts", "tools"):
            object.__setattr__(self, name, self._plain_json(name, getattr(self, name)))
        if not isinstance(self.notes, list | tuple):
            raise self.Error(f"'notes' must be a list of strings, not {show(self.notes)}")
        for note in self.notes:
            self._check_text("notes", note)
        object.__setattr__(self, "notes", tuple(self.notes))

    @property
    @abstractmethod
    def digest(self) -> str:
        """SHA-256 (64 hex digits) over what steers, always computed from the content."""

    @abstractmethod
    def to_bytes(self) -> bytes:
        """The content of the file that `save` writes."""

    @property
    def version(self) -> int:
        """Of the file that `save` writes: the oldest that can say it."""
        return 1

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the file atomically: readers see the old file or the whole new one.

        Raises:
            OSError: the folder does not exist or cannot be written.
        """
        write_atomic(path, [self.to_bytes()])

    def _check_fit(self, mine: object, model: str, architecture: str, theirs: object) -> None:
        """Raises `Error`, naming both models, unless architectures and dimensions are equal; what
        `str` makes of dimensions is shown."""
        if (self.architecture, mine) != (architecture, theirs):
            ours = f"{self.model!r} ({self.architecture}, {mine})"
            raise self.Error(self.MISFIT.format(ours, f"{model!r} ({architecture}, {theirs})"))

    def _check_count(self, name: str, limit: int) -> None:
        if not in_range(value := getattr(self, name), 1, limit):
            raise self.Error(f"{name!r} must be an integer from 1 to {limit}, not {show(value)}")

    @classmethod
    def _load(
        cls, path: str | os.PathLike[str], max_bytes: int, decode: Callable[[bytes], Self]
    ) -> Self:
        try:
            return decode(read_bounded(path, max_bytes))
        except (FileError, cls.Error) as error:
            raise cls.Error(f"{os.fspath(path)}: {error}") from error

    def _fields(self) -> dict[str, Any]:
        """What its file says, but for the content itself."""
        head = [name for name in self.REQUIRED if name != "neurons"]
        fields = {name: getattr(self, name) for name in (*head, *self.OPTIONAL, *ORIGIN)}
        fields = {name: value for name, value in fields.items() if value is not None}
        fields["notes"] = list(self.notes)
        return {"format": self.FORMAT, "version": self.version, **fields, "digest": self.digest}

    @classmethod
    def _of_fields(cls, data: Mapping[str, Any], **content: Any) -> Self:
        """Of what `_fields` said, and content that is stored elsewhere."""
        if data.get("format") != cls.FORMAT:
            raise cls.Error(f"'format' must be {cls.FORMAT!r}, not {show(data.get('format'))}")
        if not is_int(version := data.get("version")) or version not in cls.VERSIONS:
            raise cls.Error(
                f"'version' must be {' or '.join(map(str, cls.VERSIONS))}, not {show(version)}; a "
                "newer file needs a newer cna-vllm"
            )
        stored = (*cls.REQUIRED, *cls.OPTIONAL, *ORIGIN)
        if unknown := sorted(data.keys() - {"format", "version", "digest", *stored}):
            raise cls.Error(f"unknown field {show(unknown[0])}; remove it")
        if missing := [name for name in cls.REQUIRED if name not in data]:
            raise cls.Error(f"the field {missing[0]!r} is missing")
        made = cls(**{name: data[name] for name in stored if name in data}, **content)
        if version < made.version:
            raise cls.Error(
                f"'version' is {version}, but only {made.version} has layers of several widths "
                "and routed experts; write that"
            )
        if (claimed := data.get("digest", made.digest)) != made.digest:
            raise cls.Error(
                f"'digest' is {show(claimed)} but the content has {made.digest!r}; the file was "
                "edited or damaged: remove the field to accept its content"
            )
        return made

    def _summary(self, content: Iterable[str], origin: Iterable[str]) -> str:
        lines = [*content, f"digest  {self.digest}"]
        if self.created or self.dtype:
            lines.append(f"found   {self.created or 'at an unknown time'} in {self.dtype or '?'}")
        return "\n".join([*lines, *origin, *(f"note    {note}" for note in self.notes)])

    def _check_text(self, name: str, value: object) -> None:
        # Printable, so that messages and tables that quote it stay on one line.
        if not isinstance(value, str) or not value.isprintable():
            raise self.Error(f"{name!r} must be printable text on one line, not {show(value)}")

    def _plain_json(self, name: str, value: object) -> dict[str, Any]:
        """A deep copy of JSON types only, so that it equals what a file or a process gives."""
        if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
            raise self.Error(f"{name!r} must be an object with string keys")
        try:
            plain: dict[str, Any] = json.loads(json.dumps(dict(value), allow_nan=False))
        except (TypeError, ValueError, RecursionError) as error:
            raise self.Error(f"{name!r} cannot be written as JSON: {error}") from error
        return plain


def show(value: object) -> str:
    """`value` for an error message: short, on one line, whatever it is."""
    try:
        return reprlib.repr(value)
    except ValueError:  # an integer over the interpreter's limit of digits
        return f"a huge {type(value).__name__}"


def is_int(value: object) -> TypeGuard[int]:
    """True for int but not for bool, which JSON keeps apart and Python does not."""
    return isinstance(value, int) and not isinstance(value, bool)


def in_range(value: object, least: int, most: int) -> bool:
    """Whether it is an integer from `least` to `most`."""
    return is_int(value) and least <= value <= most
