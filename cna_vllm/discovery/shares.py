# SPDX-License-Identifier: Apache-2.0
"""What the recorders of all ranks kept, put together: nothing with a hole in it leaves here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cna_vllm.steering.layout import Ints, Layout, Places

Report = Mapping[str, Any]
"""Of one rank: see ``worker.recording.Recorder.take``."""


@dataclass(frozen=True)
class Mean:
    """What a group's prompts recorded.

    A routed neuron's activation at a token is its down projection's input where the token was
    routed to its expert, and 0 where it was not, since it then adds nothing.

    Attributes:
        mean: float64 [neurons], over all prompts of the group.
        prompts: how many these are.
        routed: int64 [MLPs]: how many of them were routed there; all of them for dense and shared
            MLPs.
    """

    mean: NDArray[np.float64]
    prompts: int
    routed: Ints

    def over_routed(self, layout: Layout, neurons: Ints) -> NDArray[np.float64]:
        """Of some neurons, the mean over those prompts that were routed to them; NaN for none."""
        counts = self.routed[layout.mlp_of(neurons)]
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.where(counts > 0, self.mean[neurons] * (self.prompts / counts), np.nan)


def assemble(
    reports: Sequence[Report], expected: Mapping[str, int], layout: Layout
) -> dict[str, Mean]:
    """Group -> mean over its ``expected`` prompts, of all ranks.

    Raises RuntimeError when a share is missing or miscounted.
    """
    places = [Places.of(report["parts"], layout) for report in reports]
    means: dict[str, Mean] = {}
    for group, count in expected.items():
        mean, routed = np.zeros(layout.size), np.zeros(layout.mlps, dtype=np.int64)
        for report, place in zip(reports, places, strict=True):
            found = report["groups"].get(group, {"count": 0})
            if found["count"] != count:
                raise RuntimeError(
                    f"{found['count']} of {count} prompts of group {group!r} were recorded; the "
                    "recording is not usable"
                )
            mean[place.neurons] = np.frombuffer(found["sum"], dtype=np.float64) / count
            routed[place.mlps] = np.frombuffer(found["reached"], dtype=np.int64)
        require_all(places, layout, range(layout.num_layers), f"group {group!r}")
        require_routed(routed, count, layout, range(layout.num_layers), f"group {group!r}")
        means[group] = Mean(mean, count, routed)
    return means


def require_all(places: Sequence[Places], layout: Layout, layers: Sequence[int], what: str) -> None:
    """Raises RuntimeError unless the ranks' shares cover every neuron of ``layers``."""
    covered = np.zeros(layout.size, dtype=bool)
    for place in places:
        covered[place.neurons] = True
    wanted, found = layout.width(layers), sum(covered[layout.layer(x)].sum() for x in layers)
    if found != wanted:
        raise RuntimeError(
            f"only {found} of {wanted} neurons were recorded for {what}; a worker's share is "
            "missing"
        )


def require_routed(
    routed: Ints, prompts: int, layout: Layout, layers: Sequence[int], what: str
) -> None:
    """Raises RuntimeError for a layer of whose routed experts prompts reached none.

    routed: int64 [MLPs], of how many prompts each was reached.
    """
    experts = layout.mlp_experts >= 0
    reached = np.bincount(layout.mlp_layers[experts], routed[experts], minlength=layout.num_layers)
    for layer in layers:
        if layout.shape.experts[layer] and reached[layer] < prompts:
            raise RuntimeError(
                f"layer {layer} recorded {int(reached[layer])} routed experts for {prompts} "
                f"prompts of {what}; the recording is not usable"
            )
