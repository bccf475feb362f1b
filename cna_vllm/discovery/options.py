# SPDX-License-Identifier: Apache-2.0
"""The method's parameters: presets, what overrides them, and what is refused."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from cna_vllm.discovery.contrast import SIGNS, Sign, circuit_size
from cna_vllm.discovery.prefill import Dimensions, DiscoveryError, as_prompts
from cna_vllm.discovery.universal import UniversalRule, diverse_prompts
from cna_vllm.text.prompts import Prompt, PromptLike

Preset = Literal["paper", "reference"]
Universal = Sequence[PromptLike] | Literal["default", "none"]


@dataclass(frozen=True)
class _Preset:
    """fraction or top_k, how many of the first layers are left out, and the universal filter."""

    fraction: float | None
    top_k: int | None
    skipped_layers: int
    universal: Literal["default", "none"]
    differs: str


PRESETS: Mapping[str, _Preset] = {
    "paper": _Preset(0.001, None, 0, "default", ""),
    # What the published code does; it takes means in bfloat16, which would only add noise.
    "reference": _Preset(
        None, 200, 2, "none", "means are accumulated in float64, the reference's in bfloat16"
    ),
}


@dataclass(frozen=True)
class Method:
    """Every parameter, resolved and in range for one model.

    universal: prompts of the universal-neuron filter, empty for no filter.
    """

    preset: Preset
    fraction: float | None
    k: int
    sign: Sign
    layers: tuple[int, ...] | None
    universal: tuple[Prompt, ...]
    rule: UniversalRule
    universal_source: str
    raw: bool
    system: str | None
    holdout: float
    bootstrap: int
    seed: int

    def describe(self, chat_template: bool | str) -> dict[str, Any]:
        """The circuit's provenance, JSON types only; results are added by ``discover``.

        chat_template: whether it was applied; see ``chat_template_used``.
        """
        described: dict[str, Any] = {
            "name": "cna",
            "preset": self.preset,
            "fraction": self.fraction,
            "k": self.k,
            "sign": self.sign,
            "layers": None if self.layers is None else list(self.layers),
            "chat_template": chat_template,
            "system": self.system,
            "position": "last prompt token",
            "means": "float64",
            "universal": None,
        }
        if PRESETS[self.preset].differs:
            described["differs"] = PRESETS[self.preset].differs
        return described


def resolve(
    size: Dimensions,
    *,
    preset: Preset,
    fraction: float | None,
    top_k: int | None,
    sign: Sign,
    layers: Collection[int] | None,
    universal: Universal | None,
    rule: UniversalRule,
    raw: bool,
    system: str | None,
    holdout: float,
    bootstrap: int,
    seed: int,
) -> Method:
    """The preset with what was given explicitly in its place. Raises DiscoveryError."""
    if preset not in PRESETS:
        raise DiscoveryError(f"preset must be one of {', '.join(PRESETS)}, got {preset!r}")
    base = PRESETS[preset]
    if fraction is not None and top_k is not None:
        raise DiscoveryError("give fraction or top_k, not both")
    if fraction is None and top_k is None:
        fraction, top_k = base.fraction, base.top_k
    for name, share in (
        ("fraction", fraction),
        ("universal fraction", rule.fraction),
        ("universal threshold", rule.threshold),
    ):
        if share is not None and not 0 < share <= 1:
            raise DiscoveryError(f"{name} must be above 0 and at most 1, got {share}")
    if top_k is not None and top_k < 1:
        raise DiscoveryError(f"top_k must be at least 1, got {top_k}")
    if sign not in SIGNS:
        raise DiscoveryError(f"sign must be one of {', '.join(SIGNS)}, got {sign!r}")
    if not 0 <= holdout < 1:
        raise DiscoveryError(f"holdout must be at least 0 and below 1, got {holdout}")
    if bootstrap < 0:
        raise DiscoveryError(f"bootstrap must be at least 0, got {bootstrap}")
    if seed < 0:
        raise DiscoveryError(f"seed must be at least 0, got {seed}")
    if layers is None and base.skipped_layers:
        layers = range(base.skipped_layers, size.num_layers)
    if layers is not None:
        layers = tuple(sorted(set(layers)))
        outside = [layer for layer in layers if not 0 <= layer < size.num_layers]
        if outside:
            raise DiscoveryError(f"layers {outside} are not in 0..{size.num_layers - 1}")
        if not layers:
            raise DiscoveryError("no layer is left to select from")
    if universal is None:
        universal = base.universal
    prompts, source = _universal(universal)
    k = top_k
    if k is None:
        assert fraction is not None
        k = circuit_size(size.num_layers, size.intermediate_size, fraction)
    return Method(
        preset=preset,
        fraction=fraction,
        k=k,
        sign=sign,
        layers=layers,
        universal=prompts,
        rule=rule,
        universal_source=source,
        raw=raw,
        system=system,
        holdout=holdout,
        bootstrap=bootstrap,
        seed=seed,
    )


def _universal(universal: Universal) -> tuple[tuple[Prompt, ...], str]:
    if universal == "none":
        return (), "none"
    if universal == "default":
        return tuple(diverse_prompts()), "packaged"
    if isinstance(universal, str):
        raise DiscoveryError(f"universal must be prompts, 'default' or 'none', got {universal!r}")
    if not universal:
        raise DiscoveryError("the universal filter needs at least one prompt; or turn it off")
    return tuple(as_prompts(universal, "universal")), "given"
