# SPDX-License-Identifier: Apache-2.0
"""How many neurons each layer of a model has, read from its configuration: what vLLM builds of it.

The rules go by the names of fields, since families share these, and were read from the model files
of vLLM 0.32 and 0.33. Workers count the neurons of the modules that they find, and an engine does
not start where the two differ.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any, Literal

from cna_vllm.steering.shape import Shape

NO_SHAPE = "does not say in a known way how many neurons each layer has; it is not supported"
NO_NEURONS = "has no MLP in any layer, so nothing that circuits could be of"

Kind = Literal["dense", "sparse", "both", "none"]
"""What a layer has: an MLP, routed experts (with shared ones), an MLP beside them, or neither."""

_WIDTHS = ("intermediate_size", "ffn_dim", "ffn_hidden_size", "n_inner")
# Of dense layers, where experts have the field above.
_DENSE_WIDTHS = ("intermediate_size_mlp", "prefix_dense_intermediate_size")
# Of these, a configuration that names no width means four times the hidden size.
_FOURFOLD = frozenset(("bloom", "falcon", "gpt2", "gpt_bigcode", "gptj"))
# All layers are state-space blocks, whose width has the name of an MLP's.
_NO_MLPS = frozenset(("mamba", "mamba2", "falcon_mamba"))
# Every sparse layer has one shared expert, as wide as a routed one, and no field says so.
_ONE_SHARED = frozenset(("llama4_text", "hunyuan_v1_moe"))

# Layers with configurations of their own (Puzzle), with two MLPs (LongCat), or with one MLP that
# several layers share (Zamba).
_UNKNOWN = ("block_configs", "zero_expert_num", "num_mem_blocks")

_EXPERTS = ("n_routed_experts", "num_local_experts", "num_experts", "moe_num_experts")
_EXPERT_WIDTHS = ("moe_intermediate_size", "expert_intermediate_size", "expert_hidden_dim")
_SHARED_WIDTHS = ("shared_expert_intermediate_size", "shared_intermediate_size", "share_expert_dim")
_SHARED_COUNTS = ("n_shared_experts", "num_shared_experts", "moe_num_shared_experts")


def model_shape(config: Any, num_layers: int) -> Shape | None:
    """Neurons of every decoder layer; None where the rules do not know the model.

    config: of the text model.
    """
    if any(getattr(config, name, None) is not None for name in _UNKNOWN):
        return None
    try:
        return _shape(_Fields(config), num_layers)
    except (TypeError, ValueError, IndexError):  # a field of another type, or too few elements
        return None


class _Fields:
    """A configuration, whose fields may be missing or None."""

    def __init__(self, config: Any) -> None:
        self._config = config

    def __call__(self, *names: str) -> Any:
        """The first field that is there."""
        values = (getattr(self._config, name, None) for name in names)
        return next((value for value in values if value is not None), None)


def _shape(field: _Fields, layers: int) -> Shape | None:
    of_experts = _Fields(field("ffn_config")) if field("ffn_config") is not None else field  # DBRX
    counts = _each(of_experts(*_EXPERTS) or 0, layers)
    kinds = _kinds(field, counts)
    expert_width = of_experts(*_EXPERT_WIDTHS, *_WIDTHS) if any(counts) else 0
    expert_widths = _each(expert_width, layers)
    dense, shared = _dense_widths(field, kinds, counts), _shared_widths(field, expert_widths)
    if dense is None:
        return None
    widths = {"dense": dense, "both": dense, "sparse": shared, "none": [0] * layers}
    routed = [kind in ("sparse", "both") for kind in kinds]
    return Shape(
        tuple(widths[kind][layer] for layer, kind in enumerate(kinds)),
        tuple(count if r else 0 for r, count in zip(routed, counts, strict=True)),
        tuple(width if r else 0 for r, width in zip(routed, expert_widths, strict=True)),
    )


def _kinds(field: _Fields, counts: Sequence[int]) -> list[Kind]:
    layers = range(len(counts))
    model_type = field("model_type") or ""
    if model_type in _NO_MLPS:
        return ["none" for _ in layers]
    if pattern := field("hybrid_override_pattern"):  # Nemotron-H: a layer is one block
        of_sign: dict[str, Kind] = {"-": "dense", "E": "sparse"}
        return [of_sign.get(pattern[layer], "none") for layer in layers]
    if model_type.startswith("gemma4"):
        return ["both" if count else "dense" for count in counts]
    sparse = _is_sparse(field, layers)
    return ["sparse" if counts[layer] and sparse(layer) else "dense" for layer in layers]


def _is_sparse(field: _Fields, layers: range) -> Callable[[int], bool]:
    """Which layers have routed experts, in a model that has any."""
    if (types := field("mlp_layer_types")) is not None:
        return lambda layer: types[layer] != "dense"
    if (numbers := field("layers_num_experts")) is not None:  # Jamba
        return lambda layer: numbers[layer] > 1
    if (step := field("decoder_sparse_step")) is not None:
        dense = field("mlp_only_layers") or ()
        return lambda layer: layer not in dense and (layer + 1) % step == 0
    if (step := field("interleave_moe_layer_step")) is not None:
        return lambda layer: step > 0 and (layer + 1) % step == 0
    if (step := field("moe_layer_interval")) is not None:
        first, last = field("moe_layer_start_index") or 0, field("moe_layer_end_index")
        end = layers.stop if last is None else last + 1
        return lambda layer: (layer + 1) % step == 0 and first <= layer < end
    if field("share_expert_dim") is not None:  # Step 3
        listed = field("moe_layers_enum")
        chosen = layers[1:] if listed is None else [int(layer) for layer in listed.split(",")]
        return lambda layer: layer in chosen
    first = field("first_k_dense_replace", "num_dense_layers") or 0
    period = field("moe_layer_freq") or 1
    if isinstance(period, list | tuple):
        return lambda layer: layer >= first and bool(period[layer])
    return lambda layer: layer >= first and layer % period == 0


def _dense_widths(
    field: _Fields, kinds: Sequence[Kind], counts: Sequence[int]
) -> Sequence[int] | None:
    """Of the layers that are not sparse; None where no width is named."""
    # Granite without experts keeps the MLP that would be beside them.
    width = field(*(_DENSE_WIDTHS if any(counts) else ("shared_intermediate_size",)), *_WIDTHS)
    if not any(kind in ("dense", "both") for kind in kinds):
        return [0] * len(kinds)
    if width is None and field("model_type") in _FOURFOLD:
        width = 4 * field("hidden_size")
    if width is None:
        return None
    if isinstance(width, list | tuple) and field("hybrid_override_pattern"):  # of dense layers only
        places = accumulate(kind == "dense" for kind in kinds)
        return [width[max(place - 1, 0) if len(width) > 1 else 0] for place in places]
    if field("block_auto_adjust_ff_dim"):  # LFM2
        width = int((field("block_ffn_dim_multiplier") or 1) * int(2 * width / 3))
        multiple = field("block_multiple_of")
        width = multiple * -(-width // multiple)
    widths = _each(width, len(kinds))
    if field("use_double_wide_mlp"):  # Gemma 4: in layers that share keys and values
        first = len(kinds) - (field("num_kv_shared_layers") or 0)
        widths = [w * (2 if layer >= first > 0 else 1) for layer, w in enumerate(widths)]
    return widths


def _shared_widths(field: _Fields, expert_widths: Sequence[int]) -> Sequence[int]:
    if (width := field(*_SHARED_WIDTHS)) is not None:
        return [width] * len(expert_widths)
    count = 1 if field("model_type") in _ONE_SHARED else field(*_SHARED_COUNTS) or 0
    each = field("moe_shared_expert_intermediate_size")
    return [count * (width if each is None else each) for width in expert_widths]


def _each(value: Any, layers: int) -> list[int]:
    """A field of all layers, or of each."""
    if not isinstance(value, list | tuple):
        return [value] * layers
    if len(value) != layers:
        raise ValueError("another number of layers")
    return [*value]
