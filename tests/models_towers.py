# SPDX-License-Identifier: Apache-2.0
"""Where transformers has a model of an architecture, with towers beside its text model or without;
and small sizes for both."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

TOWER: Mapping[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "embed_dim": 64,
    "d_model": 64,
    "hidden_dim": 64,
    "output_dim": 64,
    "encoder_hidden_size": 64,
    "out_hidden_size": 64,
    "projector_input_dim": 64,
    "projector_output_dim": 64,
    "vision_output_dim": 64,
    "projection_dim": 64,
    "projection_intermediate_size": 96,
    "encoder_ffn_dim": 96,
    # Of another number than the text model's layers.
    "num_hidden_layers": 2,
    "depth": 2,
    "num_layers": 2,
    "encoder_layers": 2,
    "insert_layer_id": 1,
    "deepstack_visual_indexes": [0, 1],
    "fullatt_block_indexes": [1],
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "num_heads": 2,
    "encoder_attention_heads": 2,
    "head_dim": 32,
    "dim_head": 32,
}
"""What encoders of images and sounds have."""


def find(architecture: str) -> tuple[Any, Any] | None:
    """The configuration's class and the automatic class of the model, or None where transformers
    has no model of this name that writes text."""
    import transformers
    from transformers.models.auto import modeling_auto
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    for kind, auto in (
        ("CAUSAL_LM", "CausalLM"),
        ("IMAGE_TEXT_TO_TEXT", "ImageTextToText"),
        ("MULTIMODAL_LM", "MultimodalLM"),
    ):
        names = getattr(modeling_auto, f"MODEL_FOR_{kind}_MAPPING_NAMES")
        types = [
            key
            for key, held in names.items()
            if architecture in (held if isinstance(held, tuple | list) else (held,))
        ]
        if types:
            # The text model's own configuration, where there is one of a model with towers too.
            chosen = max(types, key=lambda key: key.endswith("_text"))
            return CONFIG_MAPPING[chosen], getattr(transformers, f"AutoModelFor{auto}")
    return None


def sized(kind: Any, small: Mapping[str, Any], changes: Mapping[str, Any]) -> Any:
    """A configuration with the sizes that it has made small, its text model's and its towers'.

    changes: of the text model, or of the part whose name holds an object; None takes a size away.
    """
    default = kind()
    text = default.get_text_config()
    parts = default.sub_configs if text is not default else {}
    own = {key: value for key, value in changes.items() if key not in parts}
    made = {**_sizes(default, small), **({} if parts else own)}
    for name in parts:
        part = getattr(default, name, None)
        if part is None:
            made |= {name: changes[name]} if name in changes else {}
        elif not isinstance(part, dict):
            sizes = {**_sizes(part, small), **own} if part is text else _sizes(part, TOWER)
            made[name] = {"model_type": part.model_type, **_given(sizes), **changes.get(name, {})}
    return kind(**_given(made))


def _sizes(config: Any, sizes: Mapping[str, Any]) -> dict[str, Any]:
    known = config.to_dict()
    return {k: v for k, v in sizes.items() if k in known or k in config.attribute_map}


def _given(sizes: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in sizes.items() if value is not None}
