# SPDX-License-Identifier: Apache-2.0
"""Mean activations of groups of prompts, recorded while the engine prefills them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from cna_vllm.discovery.prefill import Dimensions, columns, encode, prefill, require_all
from cna_vllm.text.prompts import PromptLike

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
    llm: LLM, groups: Mapping[str, Sequence[PromptLike]], *, raw: bool = False
) -> GroupMeans:
    """Prefills every prompt once and averages the ``down_proj`` inputs of its last token.

    llm: an engine with ``additional_config={"cna": {"record": True}}``; other requests of the
    same engine are not touched. raw: send text as it is, without the chat template. Memory on the
    device is 8 bytes a neuron and group, however many prompts.
    Raises DiscoveryError when a prompt does not fit, RuntimeError when the workers did not record
    every prompt and every neuron.
    """
    requests = [
        (ids, group)
        for group, members in groups.items()
        for ids in encode(llm, members, what=group, raw=raw)
    ]
    size = Dimensions.of(llm)
    counts = {group: len(members) for group, members in groups.items()}
    return assemble(prefill(llm, requests), counts, size.num_layers, size.intermediate_size)


def assemble(
    reports: Sequence[Mapping[str, Any]],
    expected: Mapping[str, int],
    num_layers: int,
    intermediate_size: int,
) -> GroupMeans:
    """Joins the shares of all ranks. Raises RuntimeError when one is missing or miscounted."""
    size = Dimensions(num_layers, intermediate_size)
    means: dict[str, NDArray[np.float64]] = {}
    for group, count in expected.items():
        mean = np.zeros((num_layers, intermediate_size))
        for report in reports:
            found = report["groups"].get(group)
            if found is None or found["count"] != count:
                raise RuntimeError(
                    f"{0 if found is None else found['count']} of {count} prompts of group "
                    f"{group!r} were recorded; the recording is not usable"
                )
            shape = (len(report["layers"]), report["width"])
            total = np.frombuffer(found["sum"], dtype=np.float64).reshape(shape)
            mean[report["layers"], columns(report)] = total / count
        require_all(reports, size, range(num_layers), f"group {group!r}")
        means[group] = mean
    return GroupMeans(counts=dict(expected), means=means)
