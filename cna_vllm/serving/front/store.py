# SPDX-License-Identifier: Apache-2.0
"""The registry directory: which circuits and adapters were loaded at run time, on disk.

``registry.json`` is the truth that API server processes share and that survives a restart;
``circuits/DIGEST.json`` holds the content, written before any manifest names it. Every file
appears whole or not at all (``write_atomic``), so a crash leaves the last acknowledged state and
at most circuit files that no manifest names, which the next change removes.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from multiprocessing import current_process
from pathlib import Path
from typing import Any

from cna_vllm.files import FileError, read_json, write_atomic
from cna_vllm.serving.front.adapter import Adapter
from cna_vllm.steering.circuit import Circuit, CircuitError
from cna_vllm.steering.content import MAX_FILE_BYTES, show
from cna_vllm.steering.request import SteeringError

FORMAT = "cna-registry"
VERSION = 1


class StoreError(ValueError):
    """The registry directory cannot be used: one line with the file and the reason."""


Stored = Mapping[str, str | Adapter]
"""What the manifest says: name -> content digest of a circuit, or adapter."""


class RegistryStore:
    """One registry directory; any number of processes may read it, one at a time changes it."""

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        """Makes the directory if only its last part is missing. Raises StoreError."""
        self._directory = Path(directory)
        self._manifest = self._directory / "registry.json"
        self._circuits = self._directory / "circuits"
        try:
            self._directory.mkdir(exist_ok=True)
            self._circuits.mkdir(exist_ok=True)
        except OSError as error:
            raise StoreError(f"registry directory {directory}: {error.strerror}") from error

    def claim(self) -> int:
        """Lets this process use the directory, until it ends, beside others of its deployment;
        returns the descriptor that says so. Every front end claims, and who starts front ends.

        Other servers' workers would not hold what is loaded here. Raises StoreError if one runs.
        """
        descriptor = os.open(self._directory / "server", os.O_RDWR | os.O_CREAT, 0o644)
        mine = _deployment()
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, mine, 0)
        except BlockingIOError:
            pass  # others use it; which deployment's they are, it says
        fcntl.flock(descriptor, fcntl.LOCK_SH)  # waits for no longer than one takes to write
        # Whoever holds a shared lock is of the deployment that is named: writing takes them all.
        if os.pread(descriptor, 2 * len(mine), 0) != mine:
            os.close(descriptor)
            raise StoreError(
                f"registry directory {self._directory}: another server uses it; give each server "
                "one of its own"
            )
        return descriptor

    def stamp(self) -> tuple[int, ...]:
        """Changes with every write; one ``stat``."""
        try:
            found = os.stat(self._manifest)
        except FileNotFoundError:
            return ()
        return (found.st_ino, found.st_mtime_ns, found.st_size)

    def read(self) -> Stored:
        """The manifest; empty before the first write. Raises StoreError when it is malformed."""
        if not self._manifest.exists():
            return {}
        try:
            data = read_json(self._manifest, MAX_FILE_BYTES)
            return _stored(data)
        except (FileError, SteeringError) as error:
            raise StoreError(f"{self._manifest}: {error}") from error

    def circuit(self, digest: str) -> Circuit:
        """A circuit that the manifest names. Raises StoreError if it is missing or damaged."""
        path = self._path(digest)
        try:
            circuit = Circuit.load(path)
        except CircuitError as error:
            raise StoreError(str(error)) from error
        if circuit.digest != digest:
            raise StoreError(f"{path}: holds {circuit.digest}; restore the file or remove its name")
        return circuit

    def save_circuit(self, circuit: Circuit) -> None:
        """Makes the content durable; a later ``write`` may then name it."""
        if not self._path(circuit.digest).exists():
            circuit.save(self._path(circuit.digest))

    def write(self, stored: Stored) -> None:
        """Replaces the manifest and removes circuits that it does not name, and what a writer that
        was killed left; hold the lock."""
        circuits = {name: one for name, one in stored.items() if isinstance(one, str)}
        adapters = {n: one.to_dict() for n, one in stored.items() if isinstance(one, Adapter)}
        data = {"format": FORMAT, "version": VERSION, "circuits": circuits, "adapters": adapters}
        write_atomic(self._manifest, [json.dumps(data, indent=1) + "\n"])
        kept = {self._path(digest) for digest in circuits.values()}
        for left in self._directory.glob(f".{self._manifest.name}.*"):
            left.unlink()
        for path in self._circuits.iterdir():
            if path not in kept:
                path.unlink(missing_ok=True)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keeps every other process from changing the directory; waits for its turn."""
        descriptor = os.open(self._directory / "lock", os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)

    def _path(self, digest: str) -> Path:
        return self._circuits / f"{digest}.json"


def _deployment() -> bytes:
    """The same in a process and in all that it starts, by fork or spawn, as vLLM starts its own;
    another one in every other process."""
    return hashlib.sha256(current_process().authkey).hexdigest().encode()


def _stored(data: Any) -> Stored:
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise FileError(f"is not a registry: 'format' must be {FORMAT!r}")
    if data.get("version") != VERSION:
        raise FileError(
            f"'version' must be {VERSION}, not {show(data.get('version'))}; "
            "a newer registry needs a newer cna-vllm"
        )
    circuits, adapters = data.get("circuits"), data.get("adapters")
    if not isinstance(circuits, dict) or not isinstance(adapters, dict):
        raise FileError("'circuits' and 'adapters' must be objects")
    for name, digest in circuits.items():
        if not isinstance(digest, str) or not digest.isalnum():
            raise FileError(f"'circuits'[{show(name)}] must be a content digest")
    return {**circuits, **{name: Adapter.from_dict(a) for name, a in adapters.items()}}
