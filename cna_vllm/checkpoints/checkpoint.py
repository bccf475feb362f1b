# SPDX-License-Identifier: Apache-2.0
"""Where the tensors of a checkpoint lie, so that single ones can be read without the model.

Only safetensors files are read, through slices of single tensors. Quantized, GGUF and
pickle-only checkpoints are refused, and so is any layout in which a name could mean two tensors.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cna_vllm.checkpoints.down_proj import DownProj, Found, Mlp, find, neuron_axis
from cna_vllm.checkpoints.models import read_shape
from cna_vllm.files import FileError, read_json
from cna_vllm.steering.shape import Shape

if TYPE_CHECKING:
    import torch

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
FLOATS = ("BF16", "F16", "F32", "F64")
# Files that can hold weights: of another format, or of this one.
_PICKLES = {".bin", ".pt", ".pth", ".ckpt"}
WEIGHT_SUFFIXES = {".safetensors", ".gguf", ".h5", ".msgpack", ".npz", ".onnx"} | _PICKLES

_MAX_INDEX_BYTES = 64 * 2**20


class CheckpointError(ValueError):
    """A checkpoint that cannot be read tensor by tensor; one line with the reason."""


@dataclass(frozen=True)
class Checkpoint:
    """The tensors of one model, by name; `open_checkpoint` makes one.

    Attributes:
        model: the folder or hub id, as the user named it.
        architecture, shape: what `Circuit.check_model` takes.
        config: the whole configuration, and of it the part that describes the text model.
        files: tensor name -> name of the safetensors file that holds it.
        fetch: name of a file of the checkpoint -> its path on this machine.
    """

    model: str
    architecture: str
    shape: Shape
    config: Any
    files: Mapping[str, str]
    fetch: Callable[[str], Path]

    @property
    def text_config(self) -> Any:
        return self.config.get_text_config()

    @contextmanager
    def tensor(self, name: str) -> Iterator[Any]:
        """A `safetensors` slice of the tensor: `[rows, columns]` reads no more than that.

        Raises:
            CheckpointError: no such tensor, a damaged file, or a dtype that is not FLOATS.
        """
        if name not in self.files:
            raise CheckpointError(f"{self.model}: there is no tensor {name!r}")
        with _opened(self.fetch(self.files[name])) as handle:
            tensor = handle.get_slice(name)
            if tensor.get_dtype() not in FLOATS:
                raise CheckpointError(
                    f"{self.model}: {name} has dtype {tensor.get_dtype()}, a quantized or "
                    f"packed one; name the checkpoint in {', '.join(FLOATS)}"
                )
            yield tensor

    def vector(self, name: str) -> torch.Tensor:
        """A one-dimensional tensor, as float32."""
        with self.tensor(name) as tensor:
            vector: torch.Tensor = tensor[:].float()
            return vector

    def down_proj(self, mlps: Iterable[Mlp]) -> tuple[str, dict[Mlp, DownProj]]:
        """Prefix of the decoder, and where the down projections of some MLPs are.

        Raises:
            CheckpointError: an MLP has none of its size, or two decoders in the checkpoint have.
        """
        decoders = find(self.files)
        if len(decoders) > 1:
            prefixes = ", ".join(repr(f"{prefix}layers") for prefix in sorted(decoders))
            raise CheckpointError(
                f"{self.model}: ambiguous, since {prefixes} all hold down projections"
            )
        prefix, found = next(iter(decoders.items()), ("", {}))
        places = {}
        for layer, expert in mlps:
            together = None if expert is None else found.get((layer, -1))
            one = found.get((layer, expert)) or together
            if one is None:
                raise CheckpointError(f"{self.model}: {self._why_missing(layer, expert)}")
            axis = self._axis(one, layer, expert)
            places[layer, expert] = DownProj(one.name, expert if one.stacked else None, axis)
        return prefix, places

    def _axis(self, found: Found, layer: int, expert: int | None) -> int:
        config, width = self.text_config, self.shape.width(layer, expert)
        with self.tensor(found.name) as tensor:
            sizes: list[int] = tensor.get_shape()
        axis = neuron_axis(sizes, config.hidden_size, width, config.model_type)
        if axis is None or sizes[:-2] != [self.shape.experts[layer]] * found.stacked:
            of = f"{self.shape.experts[layer]}, " if found.stacked else ""
            raise CheckpointError(
                f"{self.model}: {found.name} has shape {sizes}, not [{of}{config.hidden_size}, "
                f"{width}] as is known of {config.model_type}"
            )
        return axis

    def _why_missing(self, layer: int, expert: int | None) -> str:
        own = [name for name in self.files if re.search(rf"(^|\.)layers\.{layer}\.", name)]
        of = "mlp" if expert is None else f"mlp.experts.{expert}"
        text = f"there is no tensor layers.{layer}.{of}.down_proj.weight, nor one of a like name"
        if packed := [name for name in own if ".down_proj." in name]:
            return f"{text}, only {packed[0]}; name the unquantized checkpoint"
        return text


def open_checkpoint(model: str) -> Checkpoint:
    """Finds the tensors of a folder or hub id; of the latter, fetches only what is read.

    Raises:
        CheckpointError: no safetensors weights, several sets of them, or quantized ones.
        ModelError: the configuration cannot be read or is not of a gated MLP.
    """
    fetch, files = _fetcher(model)
    names = _weight_files(model, fetch, files)
    architecture, shape = read_shape(model)

    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(model)
    for part in (config, config.get_text_config()):
        if quantization := getattr(part, "quantization_config", None):
            fields = quantization if isinstance(quantization, dict) else vars(quantization)
            method = fields.get("quant_method", "by an unnamed method")
            raise CheckpointError(
                f"{model}: its weights are quantized ({method}), so that a neuron is no plain "
                "column; name the unquantized checkpoint"
            )
    return Checkpoint(model, architecture, shape, config, names, fetch)


def _fetcher(model: str) -> tuple[Callable[[str], Path], list[str] | None]:
    """How to get a file by its name, and the names there are where that is known."""
    folder = Path(model)
    if folder.is_dir():
        return folder.joinpath, sorted(entry.name for entry in folder.iterdir())
    if folder.is_file():
        raise CheckpointError(
            f"{model}: is a file; name a folder with safetensors weights and a config.json"
        )

    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    def fetch(name: str) -> Path:
        try:
            return Path(hf_hub_download(model, name))
        except (OSError, ValueError, EntryNotFoundError) as error:
            reason = " ".join(str(error).split())
            raise CheckpointError(f"cannot get {name} of {model!r}: {reason}") from error

    return fetch, None


def _weight_files(
    model: str, fetch: Callable[[str], Path], files: list[str] | None
) -> dict[str, str]:
    """Tensor name -> file name; `files` are those of a folder, None for a hub id."""
    if files is None:
        try:
            index = fetch(INDEX)
        except CheckpointError:  # of one file then; or the same reason hits that one
            return _single(fetch(SINGLE))
        return _from_index(model, index)
    if INDEX in files:
        names = _from_index(model, fetch(INDEX))
        if SINGLE in files and SINGLE not in names.values():
            raise CheckpointError(
                f"{model}: holds {SINGLE} and an index of other files; remove the one not meant"
            )
        if lost := sorted(set(names.values()) - set(files)):
            raise CheckpointError(f"{model}: {INDEX} names {lost[0]}, which is not there")
        return names
    if SINGLE in files:
        return _single(fetch(SINGLE))
    shards = [name for name in files if name.endswith(".safetensors")]
    if len(shards) == 1 and not shards[0].startswith("adapter_"):
        return _single(fetch(shards[0]))
    if shards:
        raise CheckpointError(
            f"{model}: holds {', '.join(shards[:3])}, but neither {SINGLE} nor {INDEX}"
        )
    others = sorted({Path(name).suffix for name in files} & WEIGHT_SUFFIXES)
    found = f"only {' and '.join(others)} files" if others else "no weights"
    raise CheckpointError(f"{model}: holds {found}; only safetensors weights can be read")


def _from_index(model: str, path: Path) -> dict[str, str]:
    try:
        index = read_json(path, _MAX_INDEX_BYTES)
    except FileError as error:
        raise CheckpointError(f"{model}: {INDEX} {error}") from error
    names = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(names, dict) or not names:
        raise CheckpointError(f"{model}: {INDEX} has no usable 'weight_map'")
    for file in names.values():
        # A plain name: nothing is read or written outside of the folder.
        if not isinstance(file, str) or os.path.basename(file) != file or file in ("", ".", ".."):
            raise CheckpointError(f"{model}: {INDEX} names {file!r}, which is not a file name")
    return names


def _single(path: Path) -> dict[str, str]:
    with _opened(path) as handle:
        return dict.fromkeys(handle.keys(), path.name)


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as handle:
            yield handle
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: {' '.join(str(error).split())}") from error
