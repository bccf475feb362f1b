# SPDX-License-Identifier: Apache-2.0
"""Mean activations of groups of prompts, recorded while the engine prefills them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from cna_vllm.prompts import Prompt
from cna_vllm.rendering import render
from cna_vllm.request import FIELD_RECORD

if TYPE_CHECKING:
    from vllm import LLM


@dataclass(frozen=True)
class GroupMeans:
    """Per group of prompts: how many, and the mean activation at the last prompt token.

    means: group -> float64 [layers, intermediate_size].
    """

    counts: Mapping[str, int]
    means: Mapping[str, NDArray[np.float64]]


def record_means(
    llm: LLM, groups: Mapping[str, Sequence[Prompt]], *, raw: bool = False
) -> GroupMeans:
    """Prefills every prompt once and averages the ``down_proj`` inputs of its last token.

    llm: an engine with ``additional_config={"cna": {"record": True}}``; other requests of the
    same engine are not touched. raw: send text as it is, without the chat template.
    Raises RuntimeError when the workers did not record every prompt and every neuron.
    """
    from vllm import SamplingParams, TokensPrompt

    tokenizer = llm.get_tokenizer()
    prompts, params = [], []
    for group, members in groups.items():
        for member in members:
            ids = render(tokenizer, member, raw=raw)
            prompts.append(TokensPrompt(prompt_token_ids=ids))
            # One token is the least that the engine generates.
            params.append(
                SamplingParams(
                    max_tokens=1,
                    temperature=0.0,
                    detokenize=False,
                    extra_args={FIELD_RECORD: group},
                )
            )
    llm.collective_rpc("cna_take_recording")
    llm.generate(prompts, params, use_tqdm=True)
    config = llm.llm_engine.model_config
    return assemble(
        llm.collective_rpc("cna_take_recording"),
        {group: len(members) for group, members in groups.items()},
        config.get_total_num_hidden_layers(),
        config.hf_text_config.intermediate_size,
    )


def assemble(
    reports: Sequence[Mapping[str, Any]],
    expected: Mapping[str, int],
    num_layers: int,
    intermediate_size: int,
) -> GroupMeans:
    """Joins the shares of all ranks. Raises RuntimeError when one is missing or miscounted."""
    means: dict[str, NDArray[np.float64]] = {}
    for group, count in expected.items():
        mean = np.zeros((num_layers, intermediate_size))
        covered = np.zeros((num_layers, intermediate_size), dtype=bool)
        for report in reports:
            found = report["groups"].get(group)
            if found is None or found["count"] != count:
                raise RuntimeError(
                    f"{0 if found is None else found['count']} of {count} prompts of group "
                    f"{group!r} were recorded; the recording is not usable"
                )
            shape = (len(report["layers"]), report["width"])
            total = np.frombuffer(found["sum"], dtype=np.float64).reshape(shape)
            columns = slice(report["offset"], report["offset"] + report["width"])
            mean[report["layers"], columns] = total / count
            covered[report["layers"], columns] = True
        if not covered.all():
            raise RuntimeError(
                f"only {covered.sum()} of {covered.size} neurons were recorded for group "
                f"{group!r}; a worker's share is missing"
            )
        means[group] = mean
    return GroupMeans(counts=dict(expected), means=means)
