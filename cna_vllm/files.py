# SPDX-License-Identifier: Apache-2.0
"""Writing files so that no reader, and no crash, ever sees a part of one."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable
from pathlib import Path


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
