# SPDX-License-Identifier: Apache-2.0
"""Steering vectors (contrastive activation addition): what is added to a model's layers."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import numpy as np
import safetensors
import safetensors.numpy
from numpy.typing import NDArray

from cna_vllm.files import FileError, parse_json
from cna_vllm.steering.content import MAX_FILE_BYTES, Content, in_range, is_int, show
from cna_vllm.steering.packed import Packed

Form = Literal["mlp", "residual"]
FORMS: tuple[Form, ...] = ("mlp", "residual")

_METADATA = "cna_vectors"
_MAX_HIDDEN_SIZE = 2**20

RESIDUAL_ARCHITECTURES = frozenset(
    {
        "LlamaForCausalLM",
        "MistralForCausalLM",
        "Phi3ForCausalLM",
        "Qwen2ForCausalLM",
        "Qwen3ForCausalLM",
        "SmolLM3ForCausalLM",
    }
)
"""Where the residual stream after a layer is the stream before its MLP plus the MLP's output, with
no norm and no factor between: there, adding to that output is adding to the stream."""


class VectorError(ValueError):
    """A set of vectors, or the file of one, that cannot be used: one line with the reason."""


@dataclass(frozen=True, eq=False)
class VectorSet(Content):
    """What one coefficient multiplies: a vector for each of some layers of one model.

    Attributes:
        form: ``mlp``: layer l's vector is added to the output of its MLP (of ``down_proj``, summed
            over tensor-parallel ranks); ``residual``: to the residual stream after one layer.
        model: id of the model it was found in; only a name, since one model has many.
        architecture: class name of the model, for example `LlamaForCausalLM`.
        num_layers, hidden_size: of the model.
        vectors: layer -> finite float32 [hidden_size]; exactly one layer in the form ``residual``.
            The arrays are copies and read-only.
        dtype, method, prompts, tools, created, notes: as in `Circuit`.

    Raises:
        VectorError: a field has a wrong type or value.
    """

    FORMAT = "cna-vectors"
    REQUIRED = ("form", "model", "architecture", "num_layers", "hidden_size")
    MISFIT = "vectors of {} do not fit {}; discover them in the model they shall steer"
    Error = VectorError

    form: Form
    model: str
    architecture: str
    num_layers: int
    hidden_size: int
    vectors: Mapping[int, NDArray[np.float32]]
    dtype: str = ""
    method: Mapping[str, Any] = field(default_factory=dict)
    prompts: Mapping[str, Any] = field(default_factory=dict)
    tools: Mapping[str, Any] = field(default_factory=dict)
    created: str = ""
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.form not in FORMS:
            raise VectorError(f"'form' must be one of {', '.join(FORMS)}, not {show(self.form)}")
        super().__post_init__()
        self._check_count("hidden_size", _MAX_HIDDEN_SIZE)
        object.__setattr__(self, "vectors", self._checked_vectors())

    @cached_property
    def digest(self) -> str:
        """SHA-256 (64 hex digits) over form, architecture, dimensions, layers and float32 values.

        Always computed from the content. Two sets of equal digest steer identically.
        """
        head = [self.form, self.architecture, self.num_layers, self.hidden_size, [*self.vectors]]
        content = hashlib.sha256(json.dumps(head, separators=(",", ":")).encode("ascii"))
        for vector in self.vectors.values():
            content.update(vector.astype("<f4").tobytes())
        return content.hexdigest()

    def packed(self) -> Packed:
        """What workers get of it."""
        layers = np.array([*self.vectors], dtype=np.int32)
        values = np.stack([*self.vectors.values()])
        return Packed("vector", self.digest, layers.tobytes(), values.tobytes())

    def summary(self) -> str:
        """A few lines for people: model, form, layers, norms, origin, digest, notes."""
        norms = sorted(float(np.linalg.norm(vector)) for vector in self.vectors.values())
        everywhere = len(norms) == self.num_layers
        layers = f"all {self.num_layers}" if everywhere else ", ".join(map(str, self.vectors))
        counts = ", ".join(f"{n} {name}" for name, n in self.prompts.items() if is_int(n))
        return self._summary(
            [
                f"model   {self.model!r} ({self.architecture}, "
                f"{_dimensions(self.num_layers, self.hidden_size)})",
                f"form    {self.form}",
                f"layers  {layers}",
                f"norms   {norms[0]:.3g} to {norms[-1]:.3g}",
            ],
            [f"prompts {counts}"] if counts else [],
        )

    def check_model(self, model: str, architecture: str, num_layers: int, hidden_size: int) -> None:
        """Raises VectorError, naming both models, unless the vectors fit; for the form
        ``residual`` also where the architecture does not pass MLP outputs on as they are."""
        mine = _dimensions(self.num_layers, self.hidden_size)
        self._check_fit(mine, model, architecture, _dimensions(num_layers, hidden_size))
        if self.form == "residual":
            check_residual(architecture)

    def to_bytes(self) -> bytes:
        """The content of the file that `save` writes: safetensors with JSON metadata."""
        tensors = {f"layer.{layer}": vector for layer, vector in self.vectors.items()}
        metadata = json.dumps(self._fields(), allow_nan=False)
        return safetensors.numpy.save(tensors, metadata={_METADATA: metadata})

    @classmethod
    def from_bytes(cls, raw: bytes) -> VectorSet:
        """Reads what `to_bytes` wrote. Raises VectorError for anything else."""
        try:
            tensors = safetensors.numpy.load(raw)
            # Validated above: eight bytes of length, then the header.
            header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
        except (safetensors.SafetensorError, ValueError, KeyError, TypeError) as error:
            reason = " ".join(str(error).split())
            raise VectorError(f"is not a safetensors file: {reason}") from error
        text = (header.get("__metadata__") or {}).get(_METADATA)
        if text is None:
            raise VectorError(f"is not a file of vectors: its metadata has no {_METADATA!r}")
        try:
            data = parse_json(text.encode("utf-8"))
        except FileError as error:
            raise VectorError(f"the metadata {_METADATA!r} {error}") from error
        vectors = {}
        for name, tensor in tensors.items():
            digits = name.removeprefix("layer.")
            if name == digits or not digits.isascii() or not digits.isdigit() or len(digits) > 9:
                raise VectorError(f"the tensor {show(name)} is not named layer.N")
            vectors[int(digits)] = tensor
        return cls._of_fields(data if isinstance(data, dict) else {}, vectors=vectors)

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, max_bytes: int = MAX_FILE_BYTES) -> VectorSet:
        """Reads and validates a file of at most `max_bytes` bytes.

        Raises:
            VectorError: one line that starts with the file's name.
        """
        return cls._load(path, max_bytes, cls.from_bytes)

    def _checked_vectors(self) -> dict[int, NDArray[np.float32]]:
        if not isinstance(self.vectors, Mapping) or not self.vectors:
            raise VectorError("'vectors' must map at least one layer to a vector")
        checked = {}
        for layer in self.vectors:
            if not in_range(layer, 0, self.num_layers - 1):
                raise VectorError(
                    f"'vectors': a layer must be an integer from 0 to {self.num_layers - 1}, "
                    f"not {show(layer)}"
                )
        for layer in sorted(self.vectors):
            given = np.asarray(self.vectors[layer])
            if given.dtype.kind != "f" or given.shape != (self.hidden_size,):
                raise VectorError(
                    f"'vectors'[{layer}] must be {self.hidden_size} floating-point numbers, "
                    f"not {given.dtype} {list(given.shape)}"
                )
            with np.errstate(over="ignore"):
                vector = given.astype(np.float32) + np.float32(0.0)  # -0.0 and 0.0: one digest
            if not np.isfinite(vector).all():
                raise VectorError(f"'vectors'[{layer}] is not finite in float32")
            vector.setflags(write=False)
            checked[layer] = vector
        if self.form == "residual" and len(checked) != 1:
            raise VectorError(
                f"the form 'residual' has a vector for one layer, not for {len(checked)}"
            )
        return checked


def _dimensions(num_layers: int, hidden_size: int) -> str:
    return f"{num_layers} layers, hidden size {hidden_size}"


def check_residual(architecture: str) -> None:
    """Raises VectorError unless the residual form is known to be right for an architecture."""
    if architecture not in RESIDUAL_ARCHITECTURES:
        raise VectorError(
            f"the form 'residual' is not supported for {architecture}: its layers may norm or "
            "scale the MLP's output before the residual stream; use the form 'mlp', or one of "
            f"{', '.join(sorted(RESIDUAL_ARCHITECTURES))}"
        )
