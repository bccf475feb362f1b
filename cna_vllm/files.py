# SPDX-License-Identifier: Apache-2.0
"""Files written so that no reader, and no crash, ever sees a part of one; and read with a limit."""

from __future__ import annotations

import json
import os
import reprlib
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any


class FileError(ValueError):
    """What is wrong with a file, or with its text: one line that does not name it."""


def write_atomic(path: str | os.PathLike[str], chunks: Iterable[str | bytes]) -> None:
    """Writes the chunks, text as UTF-8, to a temporary neighbour that then replaces `path`.

    Raises:
        OSError: the folder does not exist or cannot be written; `path` is then as it was.
    """
    target = Path(path)
    descriptor, temporary = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
    try:
        with open(descriptor, "wb") as handle:
            for chunk in chunks:
                handle.write(chunk.encode("utf-8") if isinstance(chunk, str) else chunk)
            handle.flush()
            os.fchmod(handle.fileno(), 0o644)  # mkstemp's files are private to the user
            os.fsync(handle.fileno())
        os.replace(temporary, target)
    except BaseException:
        os.unlink(temporary)
        raise
    folder = os.open(target.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the rename itself is durable only then
    finally:
        os.close(folder)


def read_bounded(path: str | os.PathLike[str], max_bytes: int) -> bytes:
    """A file's content. Raises FileError: it cannot be read, or is larger than that."""
    try:
        with open(path, "rb") as handle:
            raw = handle.read(max_bytes + 1)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else None
        raise FileError(f"cannot be read: {reason or error}") from error
    if len(raw) > max_bytes:
        raise FileError(f"is larger than {max_bytes} bytes")
    return raw


def read_json(path: str | os.PathLike[str], max_bytes: int) -> Any:
    """`parse_json` of a file of at most `max_bytes`. Raises FileError."""
    return parse_json(read_bounded(path, max_bytes))


def parse_json(raw: bytes) -> Any:
    """Decodes UTF-8 JSON, with a byte order mark or without.

    Raises:
        FileError: anything else; also a key that is there twice, NaN, or an endless integer.
    """
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise FileError(f"is not UTF-8 text: {error.reason} at byte {error.start}") from error
    try:
        return json.loads(text, object_pairs_hook=_unique_keys, parse_constant=_no_constant)
    except json.JSONDecodeError as error:
        at = f"line {error.lineno}, column {error.colno}"
        raise FileError(f"is not JSON: {error.msg} at {at}") from error
    except RecursionError as error:
        raise FileError("holds JSON that is nested too deeply") from error
    except FileError:
        raise
    except ValueError as error:  # an integer over the interpreter's limit of digits
        raise FileError("holds an integer that is too long") from error


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise FileError(f"the key {reprlib.repr(key)} is there twice; remove one")
        result[key] = value
    return result


def _no_constant(name: str) -> Any:
    raise FileError(f"holds {name}, which is not JSON; every number must be finite")
