# SPDX-License-Identifier: Apache-2.0
"""A checkpoint with scaled `down_proj` columns: a circuit in effect where there is no plugin.

Scaling column j of `down_proj` by m is scope `all` steering with multiplier m:

    baked[:, j] = round(m * down_proj[:, j])    for every neuron j of the circuit in that MLP

with the product in float32 (float64 for float64 weights) and `round` to the checkpoint's dtype;
m = 0 writes exactly +0. Steering rounds m * activation instead, so that both agree to the last
bit where m is 0 or a power of two, and to one rounding of the dtype otherwise.

A file that holds a touched tensor is copied with a longer header (provenance in its metadata; the
safetensors format keeps offsets relative to the header's end), and the tensor's rows are then
overwritten in place. Dtypes and shapes do not change, so no other byte does. The library's own
writer would need a whole file in memory; this one needs two blocks of 32 MiB, whatever the model.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

import cna_vllm
from cna_vllm.checkpoints.checkpoint import (
    INDEX,
    WEIGHT_SUFFIXES,
    Checkpoint,
    CheckpointError,
    open_checkpoint,
)
from cna_vllm.checkpoints.down_proj import DownProj
from cna_vllm.checkpoints.models import DEFAULT_MODEL, resolve_model
from cna_vllm.files import read_json, write_atomic
from cna_vllm.steering.circuit import Circuit
from cna_vllm.steering.request import FLOAT32_MAX

if TYPE_CHECKING:
    import torch

RECORD = "cna_bake.json"
_BLOCK = 32 * 2**20
_MAX_RECORD_BYTES = 2**20


class BakeError(ValueError):
    """A bake that cannot be made; one line with the reason, and nothing written."""


@dataclass(frozen=True)
class Baked:
    """What was written: the record in `cna_bake.json`, the files rewritten and those kept."""

    record: Mapping[str, Any]
    rewritten: tuple[str, ...]
    kept: tuple[str, ...]


def bake(model: str, circuit: Circuit, multiplier: float, out: str | os.PathLike[str]) -> Baked:
    """Writes the folder `out`: `model` with the circuit's neurons scaled by `multiplier`.

    Weight files without a touched tensor are hard links to the source where the file system
    allows, so do not edit them in place; all other files are copied. Other copies of the weights
    (`.bin`, `consolidated.safetensors`, ...) are left out: an engine that preferred them would
    run unscaled. `out` appears whole or not at all.

    Args:
        model: a folder or hub id in safetensors, or `smollm2`.
        circuit: a circuit of that model.
        multiplier: any finite number in the range of float32; 1 keeps every tensor as it is.
        out: a folder that does not exist yet, in one that does.

    Raises:
        BakeError: a bad multiplier, `out` exists, or a product is not finite.
        CircuitError: the circuit is of another model.
        CheckpointError: the checkpoint is quantized, not safetensors, or lacks a tensor.
        OSError: a file cannot be read or written.
    """
    if not abs(multiplier) <= FLOAT32_MAX:
        raise BakeError(f"the multiplier must be finite and in float32's range, not {multiplier!r}")
    target = Path(out)
    if os.path.lexists(target):
        raise BakeError(f"{out}: exists; name a folder that does not")
    if not target.absolute().parent.is_dir():
        raise BakeError(f"{out}: the folder {str(target.parent)!r} does not exist")
    checkpoint = open_checkpoint(resolve_model(model))
    circuit.check_model(model, checkpoint.architecture, checkpoint.shape)
    mlps = circuit.by_mlp()
    _, places = checkpoint.down_proj(mlps)
    source = _whole_folder(checkpoint)
    belonging, left_out = _files(source, checkpoint)
    of_hub = model != DEFAULT_MODEL and not Path(model).is_dir()
    record: dict[str, Any] = {
        "format": "cna-bake",
        "version": 1,
        "source": {"model": model, "revision": source.name if of_hub else None},
        "circuit": {
            "file": f"cna_circuit_{circuit.digest[:12]}.json",
            "digest": circuit.digest,
            "model": circuit.model,
            "neurons": len(circuit),
        },
        "multiplier": multiplier,
        "scope": "all",
        "tensors": {at.name: checkpoint.files[at.name] for at in places.values()},
        "left_out": left_out,
        "tools": {
            "cna_vllm": cna_vllm.__version__,
            **{name: version(name) for name in ("safetensors", "torch", "transformers")},
        },
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "earlier": _earlier(source),
    }
    rewritten = tuple(sorted(set(record["tensors"].values())))
    kept = tuple(name for name in belonging if name not in (*rewritten, RECORD))

    work = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.absolute().parent))
    try:
        for name in kept:
            (work / name).parent.mkdir(parents=True, exist_ok=True)
            if Path(name).suffix not in WEIGHT_SUFFIXES or not _linked(source / name, work / name):
                shutil.copyfile(source / name, work / name)
        for file in tqdm(rewritten, desc="baking", unit="file", disable=None):
            neurons = [
                (at, mlps[mlp]) for mlp, at in places.items() if checkpoint.files[at.name] == file
            ]
            _rewrite(source / file, work / file, neurons, record)
        circuit.save(work / record["circuit"]["file"])
        write_atomic(work / RECORD, [json.dumps(record, indent=1, allow_nan=False), "\n"])
        work.chmod(0o755)  # mkdtemp's folders are private to the user
        os.rename(work, target)
    except BaseException:
        shutil.rmtree(work)
        raise
    return Baked(record, rewritten, kept)


def _whole_folder(checkpoint: Checkpoint) -> Path:
    """The folder with all files; a hub model's are fetched now, its weights in use only."""
    if (folder := Path(checkpoint.model)).is_dir():
        return folder

    from huggingface_hub import snapshot_download

    unused = [f"*{suffix}" for suffix in sorted(WEIGHT_SUFFIXES)]
    try:
        snapshot = Path(snapshot_download(checkpoint.model, ignore_patterns=unused))
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"cannot get the files of {checkpoint.model!r}: {reason}") from error
    for file in sorted(set(checkpoint.files.values())):
        if checkpoint.fetch(file).parent != snapshot:
            raise CheckpointError(f"{checkpoint.model!r} changed on the hub meanwhile; start again")
    return snapshot


def _earlier(source: Path) -> list[Any]:
    """The records of the bakes that the source has already had, the first of them first."""
    path = source / RECORD
    if not path.exists():
        return []
    try:
        last = read_json(path, _MAX_RECORD_BYTES)
        return [*last.pop("earlier"), last]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise BakeError(f"{path}: is not the record of an earlier bake: {error}") from error


def _files(source: Path, checkpoint: Checkpoint) -> tuple[list[str], list[str]]:
    """Files that belong to the model, and other copies of its weights or indices of such; hidden
    ones, and those in hidden folders, are neither."""
    belonging: list[str] = []
    left_out: list[str] = []
    for path in sorted(source.rglob("*")):
        place = path.relative_to(source)
        if not path.is_file() or any(part.startswith(".") for part in place.parts):
            continue
        name = place.as_posix()
        if path.suffix in WEIGHT_SUFFIXES:
            ours = name in checkpoint.files.values()
        else:
            ours = name == INDEX or not name.endswith(".index.json")
        (belonging if ours else left_out).append(name)
    return belonging, sorted(left_out)


def _linked(path: Path, target: Path) -> bool:
    try:
        os.link(path.resolve(), target)
    except OSError:  # another file system, one without links, or another user's file
        return False
    return True


def _rewrite(
    path: Path,
    target: Path,
    neurons: Iterable[tuple[DownProj, Sequence[int]]],
    record: Mapping[str, Any],
) -> None:
    """Copies a safetensors file with the neurons of each down projection scaled, and a part of the
    record in its metadata, which takes strings only."""
    import torch
    from safetensors import safe_open

    with safe_open(path, "pt") as tensors, open(path, "rb") as old, open(target, "wb") as new:
        header = json.loads(old.read(int.from_bytes(old.read(8), "little")))
        header["__metadata__"] = {
            **header.get("__metadata__", {}),
            "cna_circuit_digest": record["circuit"]["digest"],
            "cna_multiplier": repr(record["multiplier"]),
            "cna_source_model": record["source"]["model"],
            "cna_vllm_version": record["tools"]["cna_vllm"],
        }
        encoded = json.dumps(header, separators=(",", ":")).encode("utf-8")
        encoded += b" " * (-len(encoded) % 8)  # tensors stay aligned, as the format wants
        new.write(len(encoded).to_bytes(8, "little") + encoded)
        shutil.copyfileobj(old, new, _BLOCK)
        for at, indices in neurons:
            tensor, part = tensors.get_slice(at.name), at.part
            *_, height, _ = sizes = tensor.get_shape()
            first, last = header[at.name]["data_offsets"]
            row_bytes = (last - first) // math.prod(sizes[:-1])
            first += (part or 0) * height * row_bytes
            step = max(1, _BLOCK // row_bytes)
            for row in range(0, height, step):
                end = min(row + step, height)
                rows = tensor[row:end] if part is None else tensor[part, row:end]
                chosen = indices
                if at.axis == 0:
                    rows, chosen = rows.T, [i - row for i in indices if row <= i < end]
                scaled = _scaled(rows, chosen, record["multiplier"], at.name)
                new.seek(8 + len(encoded) + first + row * row_bytes)
                straight = (scaled if at.axis else scaled.T).contiguous()
                new.write(straight.view(torch.uint8).numpy().data)
        new.flush()
        os.fsync(new.fileno())


def _scaled(
    rows: torch.Tensor, indices: Sequence[int], multiplier: float, name: str
) -> torch.Tensor:
    """A contiguous copy of the rows in which the columns `indices` are multiplied and rounded."""
    import torch

    rows = rows.clone(memory_format=torch.contiguous_format)
    chosen = rows[:, list(indices)]
    if multiplier == 0:
        rows[:, list(indices)] = 0  # +0, and no nan where a weight is not finite
        return rows
    wide = chosen.to(torch.promote_types(chosen.dtype, torch.float32))
    product = (wide * multiplier).to(chosen.dtype)
    if bool((chosen.isfinite() & ~product.isfinite()).any()):
        raise BakeError(
            f"{name}: a weight times {multiplier:g} is out of the range of {chosen.dtype}; "
            "use a smaller multiplier"
        )
    rows[:, list(indices)] = product
    return rows
