# SPDX-License-Identifier: Apache-2.0
"""Tiny random vision-language models with real image processors, and their oracle."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForImageTextToText, PretrainedConfig, PreTrainedTokenizerFast

from tests.oracles import HookedModel
from tests.tiny_models import LAYERS, VOCABULARY, WIDTH

HIDDEN, PATCH, IMAGE = 64, 4, 16
"""Of the text tower; pixels a patch and an image have on a side."""

BEGIN, SOFT, END = 4, 5, 6
"""Tokens before an image, of its features, and after it (or between its rows)."""

NEWLINES, WORDS = 8, 12
"""Gemma's newlines, one to four of them, are the tokens from the first on; words those from the
second on."""

CHAT_TEMPLATE = (
    "{% for message in messages %}{% for part in message.content %}"
    "{% if part.type == 'text' %}{{ part.text }}{% else %}IMAGE{% endif %} "
    "{% endfor %}{% endfor %}"
)

_TEXT: Mapping[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "max_position_embeddings": 512,
    "initializer_range": 0.25,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# Not as many layers as the text tower, and an MLP as wide: neurons there would be taken for others.
_TOWER: Mapping[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "initializer_range": 0.25,
    "image_size": IMAGE,
    "patch_size": PATCH,
}
_QWEN_TOWER: Mapping[str, Any] = {
    "depth": 2,
    "hidden_size": 32,
    "intermediate_size": WIDTH,
    "num_heads": 2,
    "patch_size": PATCH,
    "out_hidden_size": HIDDEN,
    "initializer_range": 0.25,
}
_QWEN_TOKENS: Mapping[str, Any] = {
    "image_token_id": SOFT,
    "video_token_id": 7,
    "vision_start_token_id": BEGIN,
    "vision_end_token_id": END,
}
_QWEN_PREPARATION: Mapping[str, Any] = {
    "patch_size": PATCH,
    "merge_size": 2,
    "temporal_patch_size": 2,
    "size": {"shortest_edge": 64, "longest_edge": 1024},
}
_QWEN_NAMES: Mapping[int, str] = {
    BEGIN: "<|vision_start|>",
    SOFT: "<|image_pad|>",
    END: "<|vision_end|>",
    7: "<|video_pad|>",
}
_QWEN2_TEXT: Mapping[str, Any] = {k: v for k, v in _TEXT.items() if k != "head_dim"}
_MEAN: Mapping[str, Any] = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}


def _qwen_image(height: int, width: int) -> list[int]:
    return [BEGIN, *[SOFT] * (height * width // (2 * PATCH) ** 2), END]


def _pixtral_image(height: int, width: int) -> list[int]:
    rows, columns = height // (2 * PATCH), width // (2 * PATCH)
    return [*([SOFT] * columns + [BEGIN]) * (rows - 1), *[SOFT] * columns, END]


@dataclass(frozen=True)
class Family:
    """One family of vision-language models.

    config: its class, in transformers. parts: the configuration. processor: of images, a class of
    transformers that needs Pillow alone. preparation: its options. more: what the processor of
    prompts wants to know. tokens: names of special tokens, by id; named: attributes of the
    tokenizer that are such names. written: the tokens of an image in a prompt; expanded: what they
    become, of an image's height and width. kinds: what transformers calls its input that says
    which tokens are of images. published: the name that published checkpoints have before the parts
    of the tower, which transformers leaves out when it saves. windowed: whether layers see a
    window, of which vLLM may keep less than the other layers'.
    """

    architecture: str
    config: str
    parts: Mapping[str, Any]
    processor: str
    preparation: Mapping[str, Any]
    tokens: Mapping[int, str]
    written: Sequence[int]
    expanded: Callable[[int, int], list[int]]
    more: Mapping[str, Any] = field(default_factory=dict)
    named: Mapping[str, str] = field(default_factory=dict)
    kinds: str = ""
    published: str = ""
    embedding_scale: float = 1.0
    windowed: bool = False


FAMILIES: Mapping[str, Family] = {
    "llava": Family(
        "LlavaForConditionalGeneration",
        "llava.LlavaConfig",
        {
            "text_config": {"model_type": "llama", **_TEXT},
            "vision_config": {"model_type": "clip_vision_model", **_TOWER},
            "image_token_index": SOFT,
            "vision_feature_layer": -2,
        },
        "clip.image_processing_pil_clip.CLIPImageProcessorPil",
        {
            "size": {"height": IMAGE, "width": IMAGE},
            "crop_size": {"height": IMAGE, "width": IMAGE},
            **_MEAN,
        },
        {SOFT: "<image>"},
        [SOFT],
        lambda height, width: [SOFT] * (IMAGE // PATCH) ** 2,
        {
            "processor_class": "LlavaProcessor",
            "patch_size": PATCH,
            "vision_feature_select_strategy": "default",
            "num_additional_image_tokens": 1,
            "image_token": "<image>",
        },
        published="vision_tower.vision_model",
    ),
    "qwen2_5_vl": Family(
        "Qwen2_5_VLForConditionalGeneration",
        "qwen2_5_vl.Qwen2_5_VLConfig",
        {
            "text_config": {
                **_QWEN2_TEXT,
                "rope_parameters": {
                    "rope_type": "default",
                    "rope_theta": 10000.0,
                    "mrope_section": [4, 6, 6],
                },
            },
            "vision_config": {**_QWEN_TOWER, "window_size": 16, "fullatt_block_indexes": [1]},
            **_QWEN_TOKENS,
        },
        "qwen2_vl.image_processing_pil_qwen2_vl.Qwen2VLImageProcessorPil",
        _QWEN_PREPARATION,
        _QWEN_NAMES,
        [BEGIN, SOFT, END],
        _qwen_image,
        {"processor_class": "Qwen2_5_VLProcessor"},
        kinds="mm_token_type_ids",
    ),
    "qwen3_vl": Family(
        "Qwen3VLForConditionalGeneration",
        "qwen3_vl.Qwen3VLConfig",
        {
            "text_config": {
                **_TEXT,
                "rope_parameters": {
                    "rope_type": "default",
                    "rope_theta": 10000.0,
                    "mrope_section": [6, 5, 5],
                    "mrope_interleaved": True,
                },
            },
            "vision_config": {
                **_QWEN_TOWER,
                "deepstack_visual_indexes": [0, 1],
                "num_position_embeddings": 16,
            },
            **_QWEN_TOKENS,
        },
        "qwen2_vl.image_processing_pil_qwen2_vl.Qwen2VLImageProcessorPil",
        _QWEN_PREPARATION,
        _QWEN_NAMES,
        [BEGIN, SOFT, END],
        _qwen_image,
        {"processor_class": "Qwen3VLProcessor"},
        kinds="mm_token_type_ids",
    ),
    "gemma3": Family(
        "Gemma3ForConditionalGeneration",
        "gemma3.Gemma3Config",
        {
            "text_config": {
                **_TEXT,
                "tie_word_embeddings": True,
                "query_pre_attn_scalar": 32,
                "sliding_window": 24,
                "layer_types": ["sliding_attention", "full_attention"] * (LAYERS // 2),
            },
            "vision_config": {"model_type": "siglip_vision_model", **_TOWER},
            "mm_tokens_per_image": 4,
            "boi_token_index": BEGIN,
            "eoi_token_index": END,
            "image_token_index": SOFT,
            "tie_word_embeddings": True,
        },
        "gemma3.image_processing_pil_gemma3.Gemma3ImageProcessorPil",
        {"size": {"height": IMAGE, "width": IMAGE}, **_MEAN},
        {
            BEGIN: "<start_of_image>",
            SOFT: "<image_soft_token>",
            END: "<end_of_image>",
            **{NEWLINES + i: "\n" * (i + 1) for i in range(4)},
        },
        [BEGIN],
        lambda height, width: [NEWLINES + 1, BEGIN, *[SOFT] * 4, END, NEWLINES + 1],
        {"processor_class": "Gemma3Processor", "image_seq_length": 4},
        {
            "boi_token": "<start_of_image>",
            "eoi_token": "<end_of_image>",
            "image_token": "<image_soft_token>",
        },
        published="vision_tower.vision_model",
        embedding_scale=0.1,
        windowed=True,
    ),
    "mistral3": Family(
        "Mistral3ForConditionalGeneration",
        "mistral3.Mistral3Config",
        {
            "text_config": {"model_type": "mistral", **_TEXT},
            "vision_config": {"model_type": "pixtral", **_TOWER, "head_dim": 16, "image_size": 64},
            "image_token_index": SOFT,
            "spatial_merge_size": 2,
            "tie_word_embeddings": False,
        },
        "pixtral.image_processing_pil_pixtral.PixtralImageProcessorPil",
        {
            "patch_size": {"height": PATCH, "width": PATCH},
            "size": {"longest_edge": 64},
            **_MEAN,
        },
        {BEGIN: "[IMG_BREAK]", SOFT: "[IMG]", END: "[IMG_END]"},
        [SOFT],
        _pixtral_image,
        {
            "processor_class": "PixtralProcessor",
            "patch_size": PATCH,
            "spatial_merge_size": 2,
        },
    ),
    "internvl": Family(
        "InternVLForConditionalGeneration",
        "internvl.InternVLConfig",
        {
            "text_config": {"model_type": "qwen2", **_QWEN2_TEXT},
            "vision_config": {
                **_TOWER,
                "image_size": [IMAGE, IMAGE],
                "patch_size": [PATCH, PATCH],
            },
            "image_token_id": SOFT,
            "image_seq_length": 4,
            "tie_word_embeddings": False,
        },
        "got_ocr2.image_processing_pil_got_ocr2.GotOcr2ImageProcessorPil",
        {"size": {"height": IMAGE, "width": IMAGE}, "max_patches": 1, **_MEAN},
        {BEGIN: "<img>", SOFT: "<IMG_CONTEXT>", END: "</img>", 7: "<video>"},
        [SOFT],
        lambda height, width: [BEGIN, *[SOFT] * 4, END],
        {"processor_class": "InternVLProcessor", "image_seq_length": 4},
        {
            "start_image_token": "<img>",
            "end_image_token": "</img>",
            "context_image_token": "<IMG_CONTEXT>",
            "video_token": "<video>",
        },
    ),
}


def save(family: Family, folder: Path) -> Path:
    """Saves a random model whose greedy text depends on every layer and on images, its tokenizer
    and its processor; returns ``folder``."""
    config: PretrainedConfig = _named(family.config)(**family.parts)
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
    for parameter in model.parameters():
        if parameter.dim() == 1 or not parameter.any():  # what starts as all ones or all zeros
            parameter.data += 0.2 * torch.randn(parameter.shape)
    model.get_input_embeddings().weight.data *= family.embedding_scale
    model.save_pretrained(folder)
    if family.published:
        file = folder / "model.safetensors"
        tower, _, _ = family.published.partition(".")
        tensors = load_file(file)
        for name in [name for name in tensors if name.startswith(tower)]:
            tensors[family.published + name.removeprefix(tower)] = tensors.pop(name)
        save_file(tensors, file, metadata={"format": "pt"})
    names = {0: "<unk>", 1: "<s>", 2: "</s>", **family.tokens}
    words = {names.get(i, f"w{i}"): i for i in range(VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(list(family.tokens.values()))
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="</s>",
        extra_special_tokens=dict(family.named),
    )
    image = " ".join(family.tokens[token] for token in family.written)
    fast.chat_template = CHAT_TEMPLATE.replace("IMAGE", image)
    fast.save_pretrained(folder)
    image_processor(family).save_pretrained(folder)
    (folder / "processor_config.json").write_text(json.dumps(family.more))
    return folder


def image_processor(family: Family) -> Any:
    return _named(family.processor)(**family.preparation)


def draw(file: Path, seed: int, height: int = IMAGE, width: int = IMAGE) -> str:
    """Saves a picture of noise; returns its path."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file)
    return str(file)


@dataclass(frozen=True)
class Look:
    """A prompt with an image in it or none, as the model sees it: ``ids`` after expansion."""

    before: tuple[int, ...]
    after: tuple[int, ...] = ()
    image: str = ""
    family: Family = FAMILIES["llava"]

    @property
    def written(self) -> list[int]:
        """As a client sends it."""
        return [*self.before, *(self.family.written if self.image else ()), *self.after]

    @property
    def ids(self) -> list[int]:
        size = Image.open(self.image).size[::-1] if self.image else None
        return [*self.before, *(self.family.expanded(*size) if size else ()), *self.after]

    def __len__(self) -> int:
        return len(self.ids)

    def __iter__(self) -> Iterator[int]:
        return iter(self.ids)


class VisionModel(HookedModel):
    """Hooks on the text tower of a vision-language model; prompts are of class ``Look``."""

    def __init__(self, path: str | Path, family: Family) -> None:
        super().__init__(path, AutoModelForImageTextToText)
        self.family = family

    def down_projections(self) -> dict[int, torch.nn.Module]:
        layers = self.model.model.language_model.layers
        return {i: layer.mlp.down_proj for i, layer in enumerate(layers)}

    def inputs(self, prompt: Sequence[int], output: Sequence[int]) -> dict[str, Any]:
        inputs = super().inputs(prompt, output)
        assert isinstance(prompt, Look)
        if not prompt.image:
            return inputs
        seen = image_processor(self.family)(Image.open(prompt.image), return_tensors="pt")
        seen.pop("num_patches", None)
        seen.pop("num_crops", None)
        if self.family.kinds:
            inputs[self.family.kinds] = (inputs["input_ids"] == SOFT).int()
        return {**inputs, **seen}


def _named(path: str) -> Any:
    module, _, name = path.rpartition(".")
    return getattr(import_module(f"transformers.models.{module}"), name)
