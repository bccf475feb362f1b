# SPDX-License-Identifier: Apache-2.0
"""The method's parameters: presets, what overrides them, and what is refused."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from cna_vllm.discovery.contrast import SIGNS, Sign, circuit_size
from cna_vllm.discovery.prefill import DiscoveryError, as_prompts, chosen_layers
from cna_vllm.discovery.universal import UniversalRule, diverse_prompts
from cna_vllm.steering.layout import Layout
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
    """Every parameter of ``discover``, checked, the preset's where none was given.

    Attributes:
        k: how many neurons to select, of a model of this size.
        prompts: of the universal-neuron filter, from ``source``; empty for no filter.

    Raises:
        DiscoveryError: a parameter is out of range.
    """

    layout: Layout
    preset: Preset
    fraction: float | None
    top_k: int | None
    sign: Sign
    layers: Collection[int] | None
    universal: Universal | None
    rule: UniversalRule
    raw: bool
    system: str | None
    holdout: float
    bootstrap: int
    seed: int
    k: int = field(init=False)
    prompts: tuple[Prompt, ...] = field(init=False)
    source: str = field(init=False)

    def __post_init__(self) -> None:
        if self.preset not in PRESETS:
            raise DiscoveryError(f"preset must be one of {', '.join(PRESETS)}, got {self.preset!r}")
        base = PRESETS[self.preset]
        fraction, top_k, layers = self.fraction, self.top_k, self.layers
        if fraction is not None and top_k is not None:
            raise DiscoveryError("give fraction or top_k, not both")
        if fraction is None and top_k is None:
            fraction, top_k = base.fraction, base.top_k
        for name, share in (
            ("fraction", fraction),
            ("universal fraction", self.rule.fraction),
            ("universal threshold", self.rule.threshold),
        ):
            if share is not None and not 0 < share <= 1:
                raise DiscoveryError(f"{name} must be above 0 and at most 1, got {share}")
        for name, count, least in (
            ("top_k", top_k, 1),
            ("bootstrap", self.bootstrap, 0),
            ("seed", self.seed, 0),
        ):
            if count is not None and count < least:
                raise DiscoveryError(f"{name} must be at least {least}, got {count}")
        if self.sign not in SIGNS:
            raise DiscoveryError(f"sign must be one of {', '.join(SIGNS)}, got {self.sign!r}")
        if not 0 <= self.holdout < 1:
            raise DiscoveryError(f"holdout must be at least 0 and below 1, got {self.holdout}")
        if layers is None and base.skipped_layers:
            layers = range(base.skipped_layers, self.layout.num_layers)
        if layers is not None:
            layers = tuple(chosen_layers(self.layout, layers))
            if not layers:
                raise DiscoveryError("no layer is left to select from")
        if top_k is None:
            assert fraction is not None
            top_k = circuit_size(self.layout.size, fraction)
        universal = base.universal if self.universal is None else self.universal
        prompts, source = _universal(universal)
        for name, value in (
            ("fraction", fraction),
            ("layers", layers),
            ("k", top_k),
            ("prompts", prompts),
            ("source", source),
        ):
            object.__setattr__(self, name, value)

    def describe(self, chat_template: bool | str) -> dict[str, Any]:
        """The circuit's provenance, JSON types only; results are added by ``discover``.

        chat_template: whether it was applied; see ``chat_template_used``.
        """
        differs = PRESETS[self.preset].differs
        return {
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
            **({"differs": differs} if differs else {}),
        }


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
