# SPDX-License-Identifier: Apache-2.0
"""Whether what was found in a model's layers is what its configuration says they have."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from cna_vllm.serving.worker.experts import RoutedExperts
from cna_vllm.serving.worker.gated_mlp import GatedMlp, UnsupportedModelError
from cna_vllm.steering.shape import Shape


def check_structure(
    paths: Mapping[int, str],
    mlps: Sequence[GatedMlp],
    experts: Sequence[RoutedExperts] | None,
    shape: Shape,
) -> None:
    """Holds each layer of this rank to the model's shape, so that none is left out unnoticed.

    paths: global layer index -> module path, of all layers of this pipeline stage. experts: None
    where routed experts are not steered. Raises UnsupportedModelError, naming the layer and both
    numbers.
    """
    if experts is None and not any(shape.widths):
        raise UnsupportedModelError(
            "the neurons of this model are all of routed experts, which cna.max_expert_neurons = 0 "
            "leaves as they are; raise it, or remove the cna key to serve this model unsteered"
        )
    dense = {mlp.layer: mlp for mlp in mlps}
    routed = {found.layer: found for found in experts or ()}
    for layer, path in sorted(paths.items()):
        mlp, width = dense.get(layer), shape.widths[layer]
        if (mlp.total_width if mlp else 0) != width:
            raise _differs(
                f"layer {layer} ({mlp.path if mlp else path})",
                f"found an MLP of {mlp.total_width} neurons" if mlp else "found no MLP",
                f"one of {width}" if width else "none",
                "a module that owns an activation and a row-parallel down projection",
            )
        found = routed.get(layer)
        said = (shape.experts[layer], shape.expert_widths[layer])
        if experts is not None and said != (
            (found.experts, found.total_width) if found else (0, 0)
        ):
            raise _differs(
                f"layer {layer} ({found.path if found else path})",
                f"found {found.experts} routed experts of {found.total_width} neurons"
                if found
                else "found no routed experts",
                f"{said[0]} of {said[1]}" if said[0] else "none",
                "vLLM's fused experts; cna.max_expert_neurons = 0 leaves them as they are",
            )


def _differs(where: str, found: str, said: str, sought: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"{where}: {found}, but the model's configuration says {said}, so neurons could be missed; "
        f"what steering looks for is {sought}; remove the cna key to serve this model unsteered"
    )
