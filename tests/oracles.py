# SPDX-License-Identifier: Apache-2.0
"""An independent oracle: Hugging Face forward passes with hooks, knowing nothing of the engine."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

# A differing token is excused only where the oracle itself cannot tell the two apart.
NEAR_TIE = 1e-4

Channels = Mapping[int, Sequence[int]]


@dataclass(frozen=True, eq=False)
class Vectors:
    """What is added per unit of coefficient, by layer: to MLP outputs or to the layers' own."""

    form: str
    by_layer: Mapping[int, torch.Tensor]


@dataclass(frozen=True)
class Arm:
    """What a request asks for, spelled out: (channels by layer, multiplier) and (vectors,
    coefficient) pairs, and a scope."""

    circuits: tuple[tuple[Channels, float], ...] = ()
    scope: str = "last"
    vectors: tuple[tuple[Vectors, float], ...] = ()

    def first_position(self, prompt_len: int) -> int:
        return {"last": prompt_len - 1, "all": 0, "generated": prompt_len}[self.scope]


@dataclass(frozen=True)
class Verdict:
    """Comparison of one output with the oracle's greedy choice."""

    equal: bool
    near_tie: bool
    position: int
    gap: float


class HookedModel:
    """A float32 Hugging Face model, steered by hooks: ``down_proj`` inputs are scaled, and vectors
    are added to the outputs of MLPs or of whole decoder layers."""

    def __init__(self, path: str | Path, auto: Any = AutoModelForCausalLM) -> None:
        self.model = auto.from_pretrained(
            path, dtype=torch.float32, attn_implementation="eager"
        ).eval()

    def down_projections(self) -> dict[int, torch.nn.Module]:
        """Of each decoder layer that has one, the linear that its neurons are the input of."""
        return {i: _down_proj(layer) for i, layer in enumerate(self.model.model.layers)}

    def inputs(self, prompt: Sequence[int], output: Sequence[int]) -> dict[str, Any]:
        """What the model takes for a prompt and the tokens after it."""
        return {"input_ids": torch.tensor([[*prompt, *output]])}

    @contextmanager
    def steered(self, arm: Arm, prompt_len: int) -> Iterator[None]:
        first = arm.first_position(prompt_len)
        handles = []
        for index, down in self.down_projections().items():
            hook = _scaling_hook(arm, index, first)
            handles.append(down.register_forward_pre_hook(hook))
        for index, layer in enumerate(self.model.model.layers if arm.vectors else ()):
            for vectors, coefficient in arm.vectors:
                if index in vectors.by_layer:
                    added = coefficient * vectors.by_layer[index]
                    module = layer.mlp if vectors.form == "mlp" else layer
                    handles.append(module.register_forward_hook(_adding_hook(added, first)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @torch.inference_mode()
    def check(self, prompt: Sequence[int], output: Sequence[int], arm: Arm) -> Verdict:
        """Whether every token of ``output`` is the greedy choice after all tokens before it.

        One pass over prompt and output together: by induction this is what greedy generation
        with the same hooks would have written.
        """
        with self.steered(arm, len(prompt)):
            logits = self.model(**self.inputs(prompt, output)).logits
        logits = logits[0, len(prompt) - 1 : -1].float()
        choice = logits.argmax(-1)
        wrong = (choice != torch.tensor(list(output))).nonzero()
        if not len(wrong):
            return Verdict(True, False, -1, 0.0)
        at = int(wrong[0])
        top = logits[at].topk(2).values
        gap = float(top[0] - top[1])
        return Verdict(False, gap < NEAR_TIE, at, gap)

    def down_proj_inputs(self, prompt: Sequence[int]) -> torch.Tensor:
        """float32 [layers, intermediate_size] at the last token of ``prompt``."""
        seen = self.dense_inputs(prompt)
        return torch.stack([seen[i] for i in sorted(seen)])

    @torch.inference_mode()
    def dense_inputs(self, prompt: Sequence[int]) -> dict[int, torch.Tensor]:
        """Of each layer with a down projection, its float32 input at the last token."""
        seen: dict[int, torch.Tensor] = {}
        handles = []
        for index, down in self.down_projections().items():

            def keep(_module: object, args: tuple[torch.Tensor], index: int = index) -> None:
                seen[index] = args[0].flatten(0, -2)[-1].clone()

            handles.append(down.register_forward_pre_hook(keep))
        try:
            self.model(torch.tensor([list(prompt)]))
        finally:
            for handle in handles:
                handle.remove()
        return seen

    @torch.inference_mode()
    def outputs(self, prompt: Sequence[int], form: str) -> torch.Tensor:
        """float32 [layers, hidden_size] at the last token: of each MLP, or of each layer."""
        seen: dict[int, torch.Tensor] = {}
        handles = []
        for index, layer in enumerate(self.model.model.layers):

            def keep(_module: object, _args: object, output: Any, index: int = index) -> None:
                hidden = output if isinstance(output, torch.Tensor) else output[0]
                seen[index] = hidden.flatten(0, -2)[-1].clone()

            module = layer.mlp if form == "mlp" else layer
            handles.append(module.register_forward_hook(keep))
        try:
            self.model(torch.tensor([list(prompt)]))
        finally:
            for handle in handles:
                handle.remove()
        return torch.stack([seen[i] for i in range(len(seen))])


def _down_proj(layer: Any) -> torch.nn.Module:
    """Where a decoder layer's neurons enter; in a mixture of experts, its shared expert's."""
    return getattr(layer.mlp, "shared_expert", layer.mlp).down_proj


def _scaling_hook(arm: Arm, layer: int, first: int):  # type: ignore[no-untyped-def]
    def scale(_module: object, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        hidden = args[0].clone()
        for channels, multiplier in arm.circuits:
            index = list(channels.get(layer, ()))
            if index:
                hidden[..., first:, index] *= multiplier
        return (hidden, *args[1:])

    return scale


def _adding_hook(added: torch.Tensor, first: int):  # type: ignore[no-untyped-def]
    def add(_module: object, _args: object, output: Any) -> Any:
        hidden = (output if isinstance(output, torch.Tensor) else output[0]).clone()
        hidden[..., first:, :] += added
        return hidden if isinstance(output, torch.Tensor) else (hidden, *output[1:])

    return add


def assert_token_exact(verdicts: Sequence[Verdict], what: str) -> None:
    """All equal, or excused by the oracle's own near tie; prints the count of both."""
    excused = [v for v in verdicts if not v.equal and v.near_tie]
    wrong = [(i, v) for i, v in enumerate(verdicts) if not v.equal and not v.near_tie]
    print(
        f"{what}: {len(verdicts)} outputs, {len(excused)} excused as near ties, {len(wrong)} wrong"
    )
    assert not wrong, f"{what}: {len(wrong)} of {len(verdicts)} outputs differ: {wrong[:5]}"
