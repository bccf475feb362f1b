# SPDX-License-Identifier: Apache-2.0
"""The file that a run writes while it runs: whatever ends the process, finished rows are kept.

`OUT.partial` holds a header line that says which run it is of, then one line for each finished
row, in the order in which they finished. A line is complete if it ends in a newline and reads as
a record; the file is taken up to the first line that is not, which a crash can have left. At the
end the rows go to `OUT` in the order of the plan, in one atomic step, and the partial file goes.
"""

from __future__ import annotations

import fcntl
import io
import json
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from cna_vllm.files import write_atomic
from cna_vllm.steering.content import is_int

FORMAT, VERSION = "cna-batch-partial", 1
SUFFIX = ".partial"
SYNC_SECONDS = 10.0


class BatchError(ValueError):
    """A batch that cannot be run, or gone on with: one line."""


def partial_path(target: Path) -> Path:
    """Where the rows of an unfinished run to `target` are."""
    return target.with_name(target.name + SUFFIX)


class PartialFile:
    """The unfinished rows of one run, held exclusively until closed.

    Attributes:
        dropped: bytes of a torn end that were cut off when it was opened.
    """

    def __init__(self, target: Path, identity: Mapping[str, Any], rows: int) -> None:
        """Opens the partial file of `target`, or starts it.

        Args:
            identity: what a run must have in common with this one to be gone on with; JSON types.
            rows: number of rows of the whole run.

        Raises:
            BatchError: it is of another run, or another process writes it.
        """
        self.target = target
        self.path = partial_path(target)
        self._rows = rows
        self._places: dict[int, int] = {}
        self._handle = open(self.path, "a+b", buffering=0)  # noqa: SIM115 (held until closed)
        try:
            _lock(self._handle.fileno(), target)
            self.dropped = self._take_up(json.loads(json.dumps(identity)))
        except BaseException:
            self._handle.close()
            raise
        self._synced = time.monotonic()

    @property
    def done(self) -> frozenset[int]:
        """Positions in the plan of the rows that are there."""
        return frozenset(self._places)

    def append(self, position: int, row: Mapping[str, Any]) -> None:
        """Adds a finished row; it outlives the process from here on."""
        self._write({"at": position, "row": row})
        if time.monotonic() - self._synced > SYNC_SECONDS:
            os.fsync(self._handle.fileno())
            self._synced = time.monotonic()

    def finish(self) -> None:
        """Writes the target, in the order of the plan, and removes the partial file; raises
        BatchError if a row is missing."""
        missing = self._rows - len(self._places)
        if missing:
            raise BatchError(f"{self.path}: {missing} of {self._rows} rows are missing")
        write_atomic(self.target, self._in_order())
        self.path.unlink()

    def close(self) -> None:
        """Gives the file free; its rows stay. One without rows goes, for it keeps nothing."""
        if not self._handle.closed and not self._places:
            self.path.unlink(missing_ok=True)
        self._handle.close()

    def __enter__(self) -> PartialFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _take_up(self, identity: dict[str, Any]) -> int:
        """Reads what is there and cuts off what is torn; returns how many bytes that were."""
        size = os.fstat(self._handle.fileno()).st_size
        self._handle.seek(0)
        lines = io.BufferedReader(io.FileIO(self._handle.fileno(), closefd=False))
        header = lines.readline()
        if not header.endswith(b"\n"):  # no row can have been written after it
            os.ftruncate(self._handle.fileno(), 0)
            self._write({"format": FORMAT, "version": VERSION, "identity": identity})
            os.fsync(self._handle.fileno())
            return size
        self._check_header(header, identity)
        end = len(header)
        for line in lines:
            position = self._position(line)
            if position is None:
                break
            self._places.setdefault(position, end)
            end += len(line)
        os.ftruncate(self._handle.fileno(), end)
        return size - end

    def _check_header(self, line: bytes, identity: dict[str, Any]) -> None:
        advice = f"go on as it was started, or add --restart to discard {self.path.name}"
        header = _record(line)
        if header is None or header.get("format") != FORMAT:
            raise BatchError(f"{self.path}: is not a file of an unfinished run; {advice}")
        if header.get("version") != VERSION:
            raise BatchError(f"{self.path}: is of another version of this package; {advice}")
        found = header.get("identity")
        if found == identity:
            return
        found = found if isinstance(found, dict) else {}
        names = [n for n in {**identity, **found} if found.get(n) != identity.get(n)]
        changes = ", ".join(_change(n, found.get(n), identity.get(n)) for n in names)
        raise BatchError(f"{self.path}: is of a run with other settings ({changes}); {advice}")

    def _position(self, line: bytes) -> int | None:
        """The row's place in the plan; None if the line was not written to its end."""
        record = (_record(line) if line.endswith(b"\n") else None) or {}
        position: Any = record.get("at")
        whole = isinstance(record.get("row"), dict) and is_int(position)
        return position if whole and 0 <= position < self._rows else None

    def _in_order(self) -> Iterator[str]:
        with open(self.path, "rb") as lines:
            for position in range(self._rows):
                lines.seek(self._places[position])
                row = json.loads(lines.readline())["row"]
                yield json.dumps(row, ensure_ascii=False) + "\n"

    def _write(self, record: Mapping[str, Any]) -> None:
        line = (json.dumps(record, ensure_ascii=False) + "\n").encode("utf-8")
        place = os.fstat(self._handle.fileno()).st_size
        written = 0
        while written < len(line):
            written += os.write(self._handle.fileno(), line[written:])
        if "at" in record:
            self._places[record["at"]] = place


def discard(target: Path) -> None:
    """Removes the partial file of `target`, if any; raises BatchError if a process writes it."""
    path = partial_path(target)
    if not path.exists():
        return
    with open(path, "ab") as handle:
        _lock(handle.fileno(), target)
        path.unlink()


def _lock(descriptor: int, target: Path) -> None:
    """Holds the open partial file of `target`, or raises BatchError."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        same = os.path.samestat(os.fstat(descriptor), os.stat(partial_path(target)))
    except (BlockingIOError, FileNotFoundError):
        same = False
    if not same:  # held by another process, or finished by it since it was opened
        raise BatchError(f"{target}: another process is writing it; wait for that one")


def _record(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) else None


def _change(name: str, then: Any, now: Any) -> str:
    """What differs; digests only by name."""
    shown = [json.dumps(value) for value in (then, now)]
    if max(map(len, shown)) > 40:
        return name
    return f"{name}: {shown[0]} then, {shown[1]} now"
