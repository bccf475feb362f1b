# SPDX-License-Identifier: Apache-2.0
"""Reading a file that lies in a folder: no path out of it, no link in or out of it."""

from __future__ import annotations

import os
import stat

MAX_PATH = 1024


class PathError(ValueError):
    """A path that is not that of a readable file in the folder. Never names the folder, and says
    the same of a file that is missing and of one that may not be read."""


def read_beneath(folder: str, path: str, max_bytes: int) -> bytes:
    """The bytes of ``folder``/``path``, without following a single link.

    Every part is opened relative to the one before it, so nothing that changes meanwhile can lead
    outside. Raises PathError.
    """
    if not 0 < len(path) <= MAX_PATH:
        raise PathError(f"must have 1 to {MAX_PATH} characters")
    parts = path.split("/")
    if any(part in ("", ".", "..") for part in parts) or "\0" in path or "\\" in path:
        raise PathError("must be relative to the server's circuit folder, without '.' and '..'")
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            for part in parts[:-1]:
                inner = os.open(
                    part, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=descriptor
                )
                os.close(descriptor)
                descriptor = inner
            # Not blocking: the open of a pipe would wait for its writer.
            flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK
            file = os.open(parts[-1], flags, dir_fd=descriptor)
        finally:
            os.close(descriptor)
    except (OSError, ValueError) as error:
        raise PathError("no such file in the server's circuit folder") from error
    if not stat.S_ISREG(os.fstat(file).st_mode):
        os.close(file)
        raise PathError("no such file in the server's circuit folder")
    with open(file, "rb") as handle:
        raw = handle.read(max_bytes + 1)
    if len(raw) > max_bytes:
        raise PathError(f"the file is larger than {max_bytes} bytes, the server's limit")
    return raw
