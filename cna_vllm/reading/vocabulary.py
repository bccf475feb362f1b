# SPDX-License-Identifier: Apache-2.0
"""What a neuron writes: the vocabulary items that its `down_proj` column raises and lowers.

The logit lens on weights (Geva et al. 2022, arXiv 2203.14680): column j of `down_proj` is what
neuron j adds to the residual stream per unit of activation. Read through the final norm and the
unembedding, it is a score for every vocabulary item:

    score = W_U @ (g * (p * sign(delta) * down_proj[:, j]))

- g: gain of the final norm; its weight, or 1 + its weight in models that store it so (Gemma,
  Qwen3-Next). A LayerNorm also centres the vector first. The division by the stream's norm, and
  logit scales and caps, are one positive factor or monotone: they change no order and are left
  out, so that scores compare within a neuron, not across layers.
- p: gain of the norm on the MLP's output in models that have one (Gemma 2 and 3, OLMo 2), else 1.
- W_U: `lm_head`, or the embeddings where the configuration ties them.
- sign(delta): scores are those of the change from the negative to the positive prompts, so
  "promotes" means: raised where the behaviour is. A neuron of delta 0 is read as it is.

Rows of W_U that the tokenizer has no item for (padding) are left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cna_vllm.checkpoints.checkpoint import Checkpoint, CheckpointError
from cna_vllm.checkpoints.down_proj import DownProj
from cna_vllm.reading.tokens import token_text
from cna_vllm.steering.circuit import Neuron

if TYPE_CHECKING:
    import torch

# Rows of the unembedding in memory at a time: 8192 x 8192 in float32 are 256 MiB.
_ROWS = 8192
_MLP_OUTPUT_NORMS = ("post_feedforward_layernorm", "post_mlp_layernorm")
# Models whose norms multiply by 1 + weight (transformers 5.19, `modeling_*.py`).
_GAIN_ABOVE_ONE = {"gemma", "gemma2", "gemma3", "gemma3_text", "vaultgemma", "recurrent_gemma"}
_GAIN_ABOVE_ONE |= {"qwen3_next", "qwen3_5", "qwen3_5_text"}


@dataclass(frozen=True)
class Item:
    """A vocabulary item, its text, and its score in logits per unit of activation."""

    token: int
    text: str
    score: float


@dataclass(frozen=True)
class Reading:
    """A neuron with the items of highest and of lowest score, the most extreme first."""

    neuron: Neuron
    promotes: tuple[Item, ...]
    suppresses: tuple[Item, ...]


def load_tokenizer(model: str) -> Any:
    """The tokenizer of a folder or hub id; raises CheckpointError if none can be read."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(model)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"cannot read the tokenizer of {model!r}: {reason}") from error


def read_neurons(
    checkpoint: Checkpoint, tokenizer: Any, neurons: Sequence[Neuron], count: int = 5
) -> list[Reading]:
    """The `count` vocabulary items that each neuron promotes and suppresses most; see above.

    Reads the neurons' columns, the norms, and the unembedding in blocks of 8192 rows.

    Raises:
        CheckpointError: a tensor is missing or quantized, or there is no unembedding.
    """
    import torch

    prefix, places = checkpoint.down_proj((neuron.layer, neuron.expert) for neuron in neurons)
    if not neurons:
        return []
    columns = torch.stack(
        [
            _written(checkpoint, prefix, places[neuron.layer, neuron.expert], neuron)
            for neuron in neurons
        ]
    )
    if not hasattr(checkpoint.text_config, "rms_norm_eps"):  # a LayerNorm
        columns = columns - columns.mean(1, keepdim=True)
    if (norm := f"{prefix}norm.weight") in checkpoint.files:
        columns = columns * _gain(checkpoint, norm)
    unembedding = _unembedding(checkpoint, prefix)
    known = torch.tensor(sorted(set(tokenizer.get_vocab().values())))
    ids, scores = _extremes(checkpoint, unembedding, torch.cat([columns, -columns]), known, count)
    scores[len(neurons) :] *= -1
    items = [_items(tokenizer, *each) for each in zip(ids, scores, strict=True)]
    return [
        Reading(*each)
        for each in zip(neurons, items[: len(neurons)], items[len(neurons) :], strict=True)
    ]


def _written(checkpoint: Checkpoint, prefix: str, at: DownProj, neuron: Neuron) -> torch.Tensor:
    """float32 [hidden_size]: p * sign(delta) * down_proj[:, index]."""
    width = checkpoint.shape.width(neuron.layer, neuron.expert)
    if neuron.index >= width:
        raise CheckpointError(
            f"{checkpoint.model}: {at.name} has {width} columns, none for neuron {neuron.index}"
        )
    one, every = slice(neuron.index, neuron.index + 1), slice(None)
    matrix = (every, one) if at.axis else (one, every)
    with checkpoint.tensor(at.name) as tensor:
        part = tensor[matrix] if at.part is None else tensor[(at.part, *matrix)]
    column: torch.Tensor = part.flatten().float()
    for norm in _MLP_OUTPUT_NORMS:
        gain = f"{prefix}layers.{neuron.layer}.{norm}.weight"
        if gain in checkpoint.files:
            column = column * _gain(checkpoint, gain)
    return -column if neuron.delta < 0 else column


def _gain(checkpoint: Checkpoint, name: str) -> torch.Tensor:
    above_one = checkpoint.text_config.model_type in _GAIN_ABOVE_ONE
    weight = checkpoint.vector(name)
    return 1.0 + weight if above_one else weight


def _unembedding(checkpoint: Checkpoint, prefix: str) -> str:
    """Name of W_U: the embeddings where they are tied, as every engine then uses them."""
    if getattr(checkpoint.text_config, "tie_word_embeddings", False):
        names = [f"{prefix}embed_tokens.weight"]
    else:
        names = [name for name in checkpoint.files if name.split(".")[-2:] == ["lm_head", "weight"]]
    if len(names) != 1:
        found = "no" if not names else "more than one"
        raise CheckpointError(
            f"{checkpoint.model}: {found} lm_head.weight, and the embeddings are not tied to it"
        )
    return names[0]


def _extremes(
    checkpoint: Checkpoint, name: str, columns: torch.Tensor, known: torch.Tensor, count: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The rows of W_U with the highest scores, and these, descending.

    Both are [columns, count], with fewer columns where the vocabulary is smaller.
    """
    import torch

    best = torch.empty(len(columns), 0)
    ids = best.long()
    with checkpoint.tensor(name) as tensor:
        total = tensor.get_shape()[0]
        for start in range(0, total, _ROWS):
            stop = min(start + _ROWS, total)
            rows = known[(known >= start) & (known < stop)]
            scores = columns @ tensor[start:stop].float()[rows - start].T
            best = torch.cat([best, scores], 1)
            best, order = best.topk(min(count, best.shape[1]), 1)
            ids = torch.cat([ids, rows.expand(len(columns), -1)], 1).gather(1, order)
    return ids, best


def _items(tokenizer: Any, ids: torch.Tensor, scores: torch.Tensor) -> tuple[Item, ...]:
    return tuple(
        Item(token, token_text(tokenizer, token), score)
        for token, score in zip(ids.tolist(), scores.tolist(), strict=True)
    )
