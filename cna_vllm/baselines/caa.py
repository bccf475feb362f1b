# SPDX-License-Identifier: Apache-2.0
"""Contrastive activation addition (arXiv 2312.06681): mean differences as steering vectors.

Two forms: the MLP output of every layer, as the reference code of CNA compares itself with, and
the residual stream after one layer, as CAA was published.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from cna_vllm.discovery.prefill import (
    NEGATIVE,
    POSITIVE,
    DiscoveryError,
    TokenIds,
    as_prompts,
    check_sets,
    chosen_layers,
    encode,
    layout_of,
    origin,
    prefill,
    templated,
)
from cna_vllm.discovery.shares import assemble
from cna_vllm.serving.seams.offline import engine_of, gate_of_llm
from cna_vllm.steering.layout import Layout
from cna_vllm.steering.shape import Shape
from cna_vllm.steering.vectors import FORMS, Form, VectorError, VectorSet, check_residual
from cna_vllm.text.prompts import PromptLike

if TYPE_CHECKING:
    from vllm import LLM


def discover_vectors(
    llm: LLM,
    positive: Sequence[PromptLike],
    negative: Sequence[PromptLike],
    *,
    form: Form = "mlp",
    layers: Collection[int] | None = None,
    raw: bool = False,
    system: str | None = None,
) -> VectorSet:
    """The mean over ``positive`` minus the mean over ``negative`` at the last prompt token.

    A prompt that is written twice counts twice. Vectors are not normalized: the coefficient 1
    adds the whole difference.

    llm: an engine with ``additional_config={"cna": {"record": True, "max_vectors": 1}}``, or more.
    positive, negative: strings, lists of chat messages, lists of token ids, or ``Prompt``s.
    form: ``mlp``: of the MLP outputs of ``layers`` (default: all); ``residual``: of the residual
        stream after the one layer in ``layers``.
    raw: send text as it is, without the chat template. system: a system message before every
        prompt.

    Raises DiscoveryError, before the engine runs, when a set is empty, both are the same, a prompt
    does not fit into the context, or the layers do not fit the form; VectorError when the model's
    architecture does not allow the form.
    """
    layout = _layout(llm, form)
    if form == "residual" and (layers is None or len(set(layers)) != 1):
        raise DiscoveryError(
            "the form 'residual' is of one layer; name it: layers=[L], often one near the middle"
        )
    chosen = chosen_layers(layout, layers)
    if not chosen:
        raise DiscoveryError("no layer is left to find vectors of")
    positive, negative = as_prompts(positive, POSITIVE), as_prompts(negative, NEGATIVE)
    above = encode(llm, positive, what=POSITIVE, raw=raw, system=system)
    below = encode(llm, negative, what=NEGATIVE, raw=raw, system=system)
    difference = mean_difference(llm, above, below, form=form)
    return VectorSet(
        form=form,
        num_layers=layout.num_layers,
        hidden_size=difference.shape[1],
        vectors={layer: difference[layer] for layer in chosen},
        method={
            "name": "caa",
            "form": form,
            "layers": chosen,
            "chat_template": templated(llm, [*positive, *negative], raw=raw, system=system),
            "system": system,
            "position": "last prompt token",
            "means": "float64",
        },
        **origin(llm, [*positive, *negative], len(positive)),
    )


def mean_difference(
    llm: LLM,
    positive: Sequence[TokenIds],
    negative: Sequence[TokenIds],
    *,
    form: Form = "mlp",
) -> NDArray[np.float64]:
    """``discover_vectors`` of token ids, for all layers: float64 [num_layers, hidden_size].

    Raises DiscoveryError when a set is empty, both are the same, or the engine does not record
    outputs; VectorError as ``discover_vectors`` does.
    """
    num_layers = _layout(llm, form).num_layers
    check_sets("CAA", positive, negative)
    requests = [(ids, POSITIVE) for ids in positive] + [(ids, NEGATIVE) for ids in negative]
    counts = {POSITIVE: len(positive), NEGATIVE: len(negative)}
    reports = prefill(llm, requests, {"what": form})
    # What is recorded of a layer is one vector of the hidden size.
    means = assemble(reports, counts, Layout(Shape.of(num_layers, engine_of(llm).hidden_size)))
    difference: NDArray[np.float64] = means[POSITIVE].mean - means[NEGATIVE].mean
    difference = difference.reshape(num_layers, -1)
    if not np.isfinite(difference).all():
        raise DiscoveryError("activations are not finite; try --dtype float32 or bfloat16")
    return difference


def _layout(llm: LLM, form: Form) -> Layout:
    """Of the model; or the reason why an engine does not record what ``form`` needs."""
    if form not in FORMS:
        raise VectorError(f"form must be one of {', '.join(FORMS)}, not {form!r}")
    layout = layout_of(llm)
    gate = gate_of_llm(llm)
    if gate is None or not gate.config.max_vectors:
        raise DiscoveryError(
            "this engine does not record outputs; start it with "
            "additional_config={'cna': {'record': True, 'max_vectors': 1}}"
        )
    if form == "residual":
        check_residual(engine_of(llm).architecture)
    return layout
