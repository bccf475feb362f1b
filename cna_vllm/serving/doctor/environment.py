# SPDX-License-Identifier: Apache-2.0
"""What this machine has, and whether steering can work on it: no model, no engine, seconds."""

from __future__ import annotations

import importlib
import os
import platform
from collections.abc import Mapping
from importlib import metadata
from typing import Any

import torch
from packaging.requirements import Requirement

from cna_kernels import DTYPES, EAGER, act_and_mul_scaled, backend, scale_reference
from cna_kernels.activations import ACCURATE
from cna_vllm.serving import seams
from cna_vllm.serving.doctor import Check
from cna_vllm.serving.seams.platform import device_name, device_type

DISTRIBUTION = "cna-vllm"
ENGINE_PLUGINS, ENDPOINT_PLUGINS = "vllm.general_plugins", "vllm.endpoint_plugins"
PLUGIN = "cna"
MAX_ULP = 4


def versions() -> dict[str, str]:
    """What runs here; a package that cannot be imported has the reason in place of a version."""
    found = {"python": platform.python_version()}
    for name in ("vllm", "torch", "triton", "transformers"):
        try:
            # By import: the distribution of vLLM for CPUs has another name.
            found[name] = str(importlib.import_module(name).__version__)
        except Exception as error:  # a broken package may raise anything
            found[name] = f"cannot be imported: {_line(error)}"
    return found


def device() -> dict[str, str]:
    """Where an engine would run, and the kernel's backend there; needs vLLM."""
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    name = device_name() if kind == "cuda" else platform.processor()
    facts = {
        "device": f"{device_type()}: {name or platform.machine()}",
        "kernel": backend(torch.device(kind)),
    }
    if kind == "cpu":
        built = torch.version.cuda or torch.version.hip
        facts["no GPU"] = (
            f"this torch ({torch.__version__}) is built for the CPU"
            if built is None
            else f"this torch is built for {built}, but sees no device"
        )
    return facts


def extras() -> dict[str, str]:
    """Optional parts of the package -> "installed", or what is missing and the command."""
    found = {}
    requirements = [Requirement(text) for text in metadata.requires(DISTRIBUTION) or ()]
    for extra in ("demo", "eval"):
        marked = [r for r in requirements if r.marker and r.marker.evaluate({"extra": extra})]
        missing = [r.name for r in marked if r.marker and not _installed(r.name)]
        found[extra] = (
            f"{', '.join(missing)} missing: pip install '{DISTRIBUTION}[{extra}]'"
            if missing
            else "installed"
        )
    return found


def environment_checks(found: Mapping[str, str]) -> list[Check]:
    """Everything an engine needs before it sees a model. found: what ``versions`` returned."""
    version = found["vllm"]
    supported = version.startswith(tuple(f"{prefix}." for prefix in seams.SUPPORTED))
    checks = [
        Check(
            f"vLLM is one of {', '.join(seams.SUPPORTED)}",
            version if supported else f"{version}; install one of these",
            supported,
        ),
        _entry_points(),
        plugins_allowed(os.environ.get("VLLM_PLUGINS")),
    ]
    return [*checks, _seams(), kernel_check()] if supported else checks


def plugins_allowed(allowed: str | None) -> Check:
    """Whether ``VLLM_PLUGINS`` lets vLLM load the plugin. allowed: the variable's value."""
    claim = "VLLM_PLUGINS lets vLLM load the plugin"
    if allowed is None:
        return Check(claim, "not set; `cna-vllm serve` sets it, for the HTTP routes", True)
    holds = PLUGIN in allowed.split(",")
    seen = f"{allowed!r}" if holds else f"{allowed!r} does not name {PLUGIN}; add it or unset it"
    return Check(claim, seen, holds)


def kernel_check() -> Check:
    """The kernel on this device against its definition, in every dtype and activation."""
    place = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    worst, wrong = 0, []
    for dtype in DTYPES:
        for activation in sorted(EAGER):
            exact, distance = _kernel_case(dtype, activation, place)
            worst = max(worst, distance)
            if not exact or distance > MAX_ULP:
                wrong.append(f"{activation} in {str(dtype).removeprefix('torch.')}")
    return Check(
        f"the kernel scales exactly, and activates within {MAX_ULP} units in the last place",
        f"wrong: {', '.join(wrong)}"
        if wrong
        else f"{len(DTYPES) * len(EAGER)} of {len(DTYPES) * len(EAGER)} cases, at most {worst} "
        f"units, backend {backend(place)}",
        not wrong,
    )


def _kernel_case(dtype: torch.dtype, activation: str, place: torch.device) -> tuple[bool, int]:
    """(steered rows are exact products, units in the last place of unsteered ones)."""
    rows, width = 6, 200
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, 2 * width, generator=generator).to(place, dtype)
    masks = torch.randint(0, 256, (2, width // 8), generator=generator, dtype=torch.uint8).to(place)
    circuits = torch.tensor([[0, -1], [1, -1], [0, 1]], dtype=torch.int32, device=place)
    factors = torch.tensor([[0.0, 1.0], [-1.5, 1.0], [2.0, 0.3]], device=place)
    arms = torch.tensor([-1, 0, 1, 2, -1, 0], dtype=torch.int32, device=place)
    none = torch.full_like(arms, -1)
    plain = act_and_mul_scaled(x, none, circuits, factors, masks, activation)
    steered = act_and_mul_scaled(x, arms, circuits, factors, masks, activation)
    exact = torch.equal(steered, scale_reference(plain, arms, circuits, factors, masks))
    gate, up = x.cpu().chunk(2, 1)
    accurate = ACCURATE[activation](gate.double()).to(dtype) * up
    # Torch's own GELU cancels for negative gates; the CPU path is torch's own.
    eager = EAGER[activation](gate) * up
    apart = [(_ordinal(plain.cpu()) - _ordinal(right)).abs() for right in (accurate, eager)]
    return exact, int(torch.minimum(*apart).max())


def _ordinal(values: torch.Tensor) -> torch.Tensor:
    """Consecutive integers for consecutive floats, 0 for both zeros."""
    kind = torch.int32 if values.dtype == torch.float32 else torch.int16
    bits = values.view(kind).long()
    lowest = torch.iinfo(kind).min
    return torch.where(bits < 0, lowest - bits, bits)


def _entry_points() -> Check:
    found: dict[str, list[Any]] = {
        group: [e for e in metadata.entry_points(group=group) if e.name == PLUGIN]
        for group in (ENGINE_PLUGINS, ENDPOINT_PLUGINS)
    }
    wrong = [f"{len(points)} in {group}" for group, points in found.items() if len(points) != 1]
    return Check(
        "vLLM finds the plugin's entry points",
        f"{', '.join(wrong)} named {PLUGIN}, 1 is right; install {DISTRIBUTION} again"
        if wrong
        else ", ".join(points[0].value for points in found.values()),
        not wrong,
    )


def _seams() -> Check:
    claim = "the seams fit this vLLM"
    try:
        seams.install()
    except (ImportError, AttributeError) as error:
        return Check(claim, f"{_line(error)}; use vLLM {' or '.join(seams.SUPPORTED)}", False)
    return Check(claim, "installed", True)


def _installed(distribution: str) -> bool:
    try:
        metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return False
    return True


def _line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
