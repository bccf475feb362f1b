# SPDX-License-Identifier: Apache-2.0
"""The ``cna`` section of ``additional_config``: parsed once, refused with the field and the fix."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from cna_vllm.steering.content import is_int
from cna_vllm.steering.request import FIELD_RECORD, SteeringError

CONFIG_KEY = "cna"
SECRET_VARIABLE = "CNA_VLLM_SECRET"
"""Environment variable with the secret of a deployment's seals (``serving/seal.py``). Unset, the
first process makes one; where engines run on several nodes, all get the same from the operator.
Not a key of ``additional_config``: vLLM writes that to its log."""


class CnaConfigError(ValueError):
    """The engine cannot be started as configured; the message names the setting and the fix."""


class CircuitTableError(RuntimeError):
    """A circuit or vector cannot be made resident, or a request names one that is not."""


WITHOUT_CONFIG = (
    "this engine was started without circuits; start it with "
    "additional_config={'cna': {'circuits': {...}}}"
)


@dataclass(frozen=True)
class CnaConfig:
    """What one engine may steer.

    circuits: name -> path of a circuit file, read by the front end only.
    max_circuits: rows of the resident table; memory is rows * layers * intermediate_size / 8
        bytes over all ranks.
    max_circuits_per_request: how many circuits one request may combine.
    max_multiplier: largest accepted |multiplier|, and |coefficient|.
    vectors: name -> path of a file of steering vectors, loaded like the circuits.
    max_vectors: rows of the table of vectors, at 4 * layers * hidden_size bytes each on every
        rank; 0: the model has not one operation more, and requests for vectors are refused.
    max_vectors_per_request: how many sets of vectors one request may combine.
    record: also keep activations of requests that ask for it (discovery).
    adapters: name -> {"circuit": ..., "multiplier": ..., "scope": ..., "lora": ...}: steering that
        a request gets by naming it as its model.
    circuit_dir: folder from which circuits may be loaded over HTTP; None: no run-time control.
    registry_dir: folder that keeps what was loaded at run time, across restarts and for all API
        server processes.
    max_expert_neurons: neurons of routed experts that one circuit may have on a rank, at
        4 * max_circuits bytes each; 0: routed experts are not steered, and vLLM may compute them
        by any backend.
    max_neurons, max_file_bytes: limits of a circuit that is loaded over HTTP.
    """

    circuits: Mapping[str, str] = field(default_factory=dict)
    max_circuits: int = 128
    max_circuits_per_request: int = 4
    max_multiplier: float = 1000.0
    vectors: Mapping[str, str] = field(default_factory=dict)
    max_vectors: int = 0
    max_vectors_per_request: int = 2
    record: bool = False
    adapters: Mapping[str, Any] = field(default_factory=dict)
    circuit_dir: str | None = None
    registry_dir: str | None = None
    max_expert_neurons: int = 65536
    max_neurons: int = 1_000_000
    max_file_bytes: int = 16 * 2**20

    @classmethod
    def from_additional_config(cls, additional_config: Any) -> CnaConfig | None:
        """None when there is no ``cna`` key: then the engine is plain vLLM.

        Raises CnaConfigError for anything that is not understood.
        """
        if not isinstance(additional_config, Mapping) or CONFIG_KEY not in additional_config:
            return None
        section = additional_config[CONFIG_KEY]
        if not isinstance(section, Mapping):
            raise CnaConfigError(
                f"additional_config['{CONFIG_KEY}'] must be an object, got "
                f"{type(section).__name__}; use {{}} for an engine without circuits at start"
            )
        known = {f.name for f in fields(cls)}
        for key in section:
            if key not in known:
                raise CnaConfigError(
                    f"additional_config['{CONFIG_KEY}'] has the unknown key {key!r}; "
                    f"known keys: {', '.join(sorted(known))}"
                )
        paths = {kind: _paths(kind, section.get(kind, {})) for kind in ("circuits", "vectors")}
        config = cls(**{**section, **paths})
        for name, least in _LEAST.items():
            value = getattr(config, name)
            if not is_int(value) or value < least:
                raise CnaConfigError(f"cna.{name} must be a whole number of at least {least}")
        limit = config.max_multiplier
        if not (is_int(limit) or isinstance(limit, float)) or not 0 < limit <= 1e6:
            raise CnaConfigError("cna.max_multiplier must be a number above 0 and up to 1e6")
        if not isinstance(config.adapters, Mapping):
            raise CnaConfigError("cna.adapters must map names to objects")
        for name in config.adapters:
            check_name(name)
        for name in ("circuit_dir", "registry_dir"):
            folder = getattr(config, name)
            if folder is not None and not (isinstance(folder, str) and os.path.isabs(folder)):
                raise CnaConfigError(f"cna.{name} must be the absolute path of a folder")
        if not isinstance(config.record, bool):
            raise CnaConfigError("cna.record must be true or false")
        for kind, noun in (("circuits", "circuits"), ("vectors", "sets of vectors")):
            count, most = len(getattr(config, kind)), getattr(config, f"max_{kind}")
            if count > most:
                raise CnaConfigError(
                    f"cna.{kind} names {count} {noun}, more than cna.max_{kind} = {most}; raise "
                    f"max_{kind}"
                )
        for name in config.vectors:
            if name in config.circuits or name in config.adapters:
                raise CnaConfigError(
                    f"cna.vectors[{name!r}] has the name of a circuit or adapter; choose another"
                )
        return config

    def check_recording_group(self, group: Any) -> None:
        """Raises SteeringError unless the engine records, and ``group`` can name what it keeps."""
        if not self.record:
            raise SteeringError(
                FIELD_RECORD, "this engine does not record; start it with cna.record = true"
            )
        if not isinstance(group, str) or not 0 < len(group) <= 64:
            raise SteeringError(FIELD_RECORD, "must be a group name of 1 to 64 characters")


_LEAST = {
    "max_circuits": 1,
    "max_circuits_per_request": 1,
    "max_expert_neurons": 0,
    "max_neurons": 1,
    "max_file_bytes": 1,
    "max_vectors": 0,
    "max_vectors_per_request": 1,
}


def _paths(kind: str, value: Any) -> dict[str, str]:
    if not isinstance(value, Mapping):
        raise CnaConfigError(f"cna.{kind} must map names to {kind.removesuffix('s')} files")
    paths: dict[str, str] = {}
    for name, path in value.items():
        check_name(name)
        if not isinstance(path, str | os.PathLike):
            raise CnaConfigError(
                f"cna.{kind}[{name!r}] must be the path of a {kind.removesuffix('s')} file"
            )
        paths[name] = os.fspath(path)
    return paths


def check_name(name: Any) -> None:
    """Raises CnaConfigError unless ``name`` can name a circuit: 1 to 128 printable characters."""
    if not isinstance(name, str) or not 0 < len(name) <= 128 or not name.isprintable():
        raise CnaConfigError(
            f"circuit name {str(name)[:40]!r} is not a string of 1 to 128 printable characters"
        )
