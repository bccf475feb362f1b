# SPDX-License-Identifier: Apache-2.0
"""Finding the MLP of every decoder layer by structure, and proving that it is hooked.

No module names are assumed: a gated MLP is the module that directly owns one fused
activation-and-multiply and one row-parallel linear, whose input is then the vector of neurons.
How its weights are stored is no part of that. Merged gate and up projections are what the
activation reads anyway; tied embeddings and heads lie outside the decoder layers; a quantized
linear keeps its class, and steering happens before its input is quantized. Where vLLM may fuse that
quantization with the activation, ``GatedMlp.fuses_quantization`` says so.

In a mixture of experts the MLP of a layer is its one dense or shared one, which sees every token
row in the order of the step. Routed experts are none: see ``experts``; those beside an MLP are
named in ``GatedMlp.routed_experts``.

A layer without one may have an MLP without a fused gate: see ``plain_mlp``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from cna_vllm.serving.worker.plain_mlp import ablated_layer_matches, hooked_without_adapter

if TYPE_CHECKING:
    from cna_vllm.serving.worker.state import SteeringState
    from cna_vllm.serving.worker.table import CircuitTable


class UnsupportedModelError(ValueError):
    """Steering is configured for a model in which it could not act; the message says why."""


@dataclass(frozen=True)
class LayerVocabulary:
    """How to read one framework's modules; the only thing the search knows about vLLM.

    activation: name of the fused activation ("silu", ...), or None for any other module.
    unknown_activation: whether a module is a fused activation that no kernel here covers.
    down_projection: whether a module is a row-parallel linear.
    without_adapter: the layer that a LoRA wrapper is around; any other module itself.
    routed_experts: whether a module runs fused routed experts.
    fuses_quantization: whether the activation before a linear may be fused with the quantization
        of that linear's input.
    plain_activation: name of an activation without a gate, or None for any other module.
    """

    activation: Callable[[nn.Module], str | None]
    unknown_activation: Callable[[nn.Module], bool]
    down_projection: Callable[[nn.Module], bool]
    without_adapter: Callable[[nn.Module], nn.Module]
    routed_experts: Callable[[nn.Module], bool]
    fuses_quantization: Callable[[nn.Module], bool] = lambda linear: False
    plain_activation: Callable[[nn.Module], str | None] = lambda module: None


@dataclass(frozen=True)
class GatedMlp:
    """One gated MLP on this rank: neurons [offset, offset + width) of ``layer``.

    down_proj: the linear itself, in a LoRA wrapper or not.
    decoder: the decoder layer that it is in.
    routed_experts: paths of the routed experts beside it.
    adapted: children of ``module`` in LoRA wrappers -> the layers themselves.
    fuses_quantization: whether the engine may fuse the activation with what quantizes its result.
    steered_input: where there is no fused gate, the child of ``module`` whose input is scaled.
    """

    layer: int
    path: str
    module: nn.Module
    attribute: str
    activation: str
    down_proj: nn.Module
    width: int
    offset: int
    total_width: int
    routed_experts: tuple[str, ...] = ()
    adapted: Mapping[str, nn.Module] = field(default_factory=dict)
    decoder: nn.Module | None = None
    fuses_quantization: bool = False
    steered_input: str = ""


def find_gated_mlps(
    layers: Mapping[int, tuple[str, nn.Module]], vocabulary: LayerVocabulary
) -> list[GatedMlp]:
    """The gated MLP of each decoder layer of this rank that has one, in layer order.

    layers: global layer index -> (module path, decoder layer); layers of other pipeline stages
    are left out by the caller. That a layer without one has none is the caller's to check: see
    ``structure``. Raises UnsupportedModelError, naming the layer, when one has more than one MLP.
    """
    found = [
        mlp
        for index, (path, layer) in sorted(layers.items())
        if (mlp := _gated_mlp(index, path, layer, vocabulary)) is not None
    ]
    if len({id(mlp.module) for mlp in found}) < len(found):
        raise UnsupportedModelError(
            "decoder layers share one MLP module; their neurons could not be told apart"
        )
    return found


def _gated_mlp(
    index: int, path: str, layer: nn.Module, vocabulary: LayerVocabulary
) -> GatedMlp | None:
    found: list[GatedMlp] = []
    plain: list[GatedMlp] = []
    routed = tuple(n for n, m in layer.named_modules(prefix=path) if vocabulary.routed_experts(m))
    for name, module in layer.named_modules(prefix=path):
        activations = [
            (attribute, kind)
            for attribute, child in module.named_children()
            if (kind := vocabulary.activation(child)) is not None
        ]
        if any(vocabulary.unknown_activation(child) for child in module.children()):
            raise UnsupportedModelError(
                f"layer {index}: {name} uses a fused activation that no kernel covers "
                f"({', '.join(type(c).__name__ for c in module.children())}); covered: silu, gelu"
            )
        layers = {key: vocabulary.without_adapter(c) for key, c in module.named_children()}
        downs = [key for key, linear in layers.items() if vocabulary.down_projection(linear)]
        gated = bool(activations)
        activations = activations or [
            (attribute, kind)
            for attribute, child in module.named_children()
            if (kind := vocabulary.plain_activation(child)) is not None
        ]
        if len(activations) == 1 and len(downs) == 1:
            attribute, kind = activations[0]
            down: Any = layers[downs[0]]
            total = int(down.input_size)
            width = int(getattr(down, "input_size_per_partition", total))
            (found if gated else plain).append(
                GatedMlp(
                    layer=index,
                    path=name,
                    module=module,
                    attribute=attribute,
                    activation=kind,
                    down_proj=down,
                    width=width,
                    offset=int(down.tp_rank) * width,
                    total_width=total,
                    routed_experts=routed,
                    adapted={k: v for k, v in layers.items() if v is not getattr(module, k)},
                    decoder=layer,
                    fuses_quantization=vocabulary.fuses_quantization(down),
                    steered_input="" if gated else downs[0],
                )
            )
    found = found or plain
    if len(found) > 1:
        paths = ", ".join(mlp.path for mlp in found)
        raise UnsupportedModelError(
            f"layer {index} ({path}): found {len(found)} MLPs ({paths}); "
            "steering needs at most one module that owns an activation and a row-parallel down "
            "projection in every layer"
        )
    return found[0] if found else None


def prove_hooks(
    mlps: Sequence[GatedMlp],
    state: SteeringState,
    table: CircuitTable,
    hidden_size: int,
    dtype: torch.dtype,
) -> None:
    """Ablates every channel of a probe row in every layer, through the model's own code.

    Raises UnsupportedModelError, naming the layers, for those that do not obey.
    """
    if not mlps:
        return
    masks = [table.layer_masks(mlp.layer) for mlp in mlps]
    for mask in masks:
        mask[0].fill_(0xFF)
    state.slot_circuits[0, 0] = 0
    state.slot_multipliers[0, 0] = 0.0
    state.row_slot[1] = 0
    try:
        deaf = [m for m in mlps if not ablated_output_matches(m, hidden_size, dtype)]
    finally:
        for mask in masks:
            mask[0].zero_()
        state.slot_circuits[0, 0] = -1
        state.slot_multipliers[0, 0] = 1.0
        state.row_slot[1] = -1
    if deaf:
        names = ", ".join(f"{m.layer} ({m.path})" for m in deaf[:4])
        raise UnsupportedModelError(
            f"{len(deaf)} of {len(mlps)} layers do not obey the steering hook: {names}; their "
            "forward pass goes around it, so this model would run unsteered; refusing to start"
        )


@torch.inference_mode()
def ablated_output_matches(mlp: GatedMlp, hidden_size: int, dtype: torch.dtype) -> bool:
    """Whether the MLP's own forward pass obeys its hook.

    The caller has marked row 1 as ablated in every channel and row 0 as plain; so row 1 must
    leave the MLP as what ``down_proj`` makes of zeros, whatever the weights are. This runs the
    model's real forward code, so a path that goes around the hook shows here. LoRA wrappers, which
    work only within a batch, are left out.
    """
    device = next(mlp.module.parameters()).device
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(2, hidden_size, generator=generator).to(device, dtype)
    if mlp.module is mlp.decoder and mlp.steered_input:
        with _without_adapters(mlp):
            return ablated_layer_matches(mlp, hidden)
    with _without_adapters(mlp):
        steered = mlp.module(hidden)
    zeros = torch.zeros(2, mlp.width, dtype=dtype, device=device)
    expected = mlp.down_proj(zeros)
    if isinstance(expected, tuple):
        expected = expected[0]
    if isinstance(steered, tuple):
        steered = steered[0]
    return bool(torch.equal(steered[1], expected[1]))


@contextmanager
def _without_adapters(mlp: GatedMlp) -> Iterator[None]:
    wrappers = {name: getattr(mlp.module, name) for name in mlp.adapted}
    for name, layer in mlp.adapted.items():
        setattr(mlp.module, name, layer)
    try:
        with hooked_without_adapter(mlp):
            yield
    finally:
        for name, wrapper in wrappers.items():
            setattr(mlp.module, name, wrapper)
