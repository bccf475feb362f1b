# SPDX-License-Identifier: Apache-2.0
"""Perplexity of an answer under the unsteered model: how unlike itself the steered model wrote."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from cna_vllm.evaluation.metrics import (
    Answer,
    Better,
    EngineContext,
    Kind,
    MetricError,
    Score,
    check_choices,
)
from cna_vllm.evaluation.metrics.text import token_ids


@dataclass(frozen=True)
class Perplexity:
    """exp of the mean negative log-likelihood (nats) per generated token, given the prompt.

    All generated tokens count, an end-of-sequence token among `token_ids` included. None for an
    answer without tokens, and where the unsteered model gives one of them probability 0. With
    `scale=nll` the mean itself, which outliers sway less.
    """

    scale: Literal["perplexity", "nll"] = "perplexity"
    kind: ClassVar[Kind] = "continuous"
    better: ClassVar[Better] = "lower"

    def __post_init__(self) -> None:
        check_choices("perplexity", type(self), vars(self))

    @property
    def name(self) -> str:
        return self.scale

    @property
    def description(self) -> str:
        mean = "mean negative log-likelihood per generated token, under the unsteered model"
        return f"exp({mean})." if self.scale == "perplexity" else f"{mean.capitalize()}, in nats."

    def score_with(self, engine: EngineContext, answers: Sequence[Answer]) -> list[Score]:
        asked = [i for i, answer in enumerate(answers) if token_ids(self.name, i, answer)]
        for index in asked:
            if not answers[index].prompt_token_ids:
                raise MetricError(
                    f"metric {self.name}: answer {index} has no prompt_token_ids; give them"
                )
        sequences = [[*answers[i].prompt_token_ids, *answers[i].token_ids] for i in asked]
        scores: list[Score] = [None] * len(answers)
        replies = engine.prompt_logprobs(sequences) if sequences else []
        for index, sequence, logprobs in zip(asked, sequences, replies, strict=True):
            if len(logprobs) != len(sequence) - 1:
                raise MetricError(
                    f"metric {self.name}: the engine gave {len(logprobs)} log-probabilities for "
                    f"{len(sequence)} tokens; one a token but the first is needed"
                )
            scores[index] = self._value(logprobs[-len(answers[index].token_ids) :])
        return scores

    def _value(self, logprobs: Sequence[float]) -> Score:
        nll = -math.fsum(logprobs) / len(logprobs)
        if not math.isfinite(nll):
            return None
        if self.scale == "nll":
            return nll
        # float64 ends at exp(709.8); nothing a model can be said to have written comes near it.
        return math.exp(nll) if nll < 700 else None
