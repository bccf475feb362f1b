# SPDX-License-Identifier: Apache-2.0
"""Contrastive activation addition (arXiv 2312.06681): mean differences as steering vectors.

Two forms: the MLP output of every layer, as the reference code of CNA compares itself with, and
the residual stream after one layer, as CAA was published.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

import cna_vllm
from cna_vllm.discovery.prefill import (
    Dimensions,
    DiscoveryError,
    TokenIds,
    as_prompts,
    encode,
    prefill,
    templated,
)
from cna_vllm.discovery.record import assemble
from cna_vllm.serving.seams.offline import engine_of, gate_of_llm
from cna_vllm.steering.vectors import FORMS, Form, VectorError, VectorSet, check_residual
from cna_vllm.text.prompts import PromptLike, prompts_digest

if TYPE_CHECKING:
    from vllm import LLM

POSITIVE, NEGATIVE = "positive", "negative"


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
    size = _dimensions(llm, form)
    chosen = _checked_layers(form, layers, size.num_layers)
    positive, negative = as_prompts(positive, POSITIVE), as_prompts(negative, NEGATIVE)
    above = encode(llm, positive, what=POSITIVE, raw=raw, system=system)
    below = encode(llm, negative, what=NEGATIVE, raw=raw, system=system)
    difference = mean_difference(llm, above, below, form=form)
    import torch
    import transformers
    import vllm

    engine = engine_of(llm)
    return VectorSet(
        form=form,
        # Of a folder only its name, so that no file tells where it was made.
        model=Path(engine.model).resolve().name if Path(engine.model).is_dir() else engine.model,
        architecture=engine.architecture,
        num_layers=size.num_layers,
        hidden_size=engine.hidden_size,
        vectors={layer: difference[layer] for layer in chosen},
        dtype=engine.dtype,
        method={
            "name": "caa",
            "form": form,
            "layers": chosen,
            "chat_template": templated(llm, [*positive, *negative], raw=raw, system=system),
            "system": system,
            "position": "last prompt token",
            "means": "float64",
        },
        prompts={
            "positive": len(positive),
            "negative": len(negative),
            "digest": prompts_digest([*positive, *negative]),
        },
        tools={
            "cna_vllm": cna_vllm.__version__,
            "vllm": vllm.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        created=datetime.now(UTC).isoformat(timespec="seconds"),
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
    size = _dimensions(llm, form)
    if not positive or not negative:
        raise DiscoveryError(
            f"CAA needs at least one positive and one negative prompt, got {len(positive)} and "
            f"{len(negative)}"
        )
    if sorted(positive) == sorted(negative):
        raise DiscoveryError(
            "the positive and the negative prompts are the same; give two sets that differ in the "
            "behaviour"
        )
    requests = [(ids, POSITIVE) for ids in positive] + [(ids, NEGATIVE) for ids in negative]
    counts = {POSITIVE: len(positive), NEGATIVE: len(negative)}
    reports = prefill(llm, requests, {"what": form})
    hidden_size = engine_of(llm).hidden_size
    means = assemble(reports, counts, size.num_layers, hidden_size).means
    difference: NDArray[np.float64] = means[POSITIVE] - means[NEGATIVE]
    if not np.isfinite(difference).all():
        raise DiscoveryError("activations are not finite; try --dtype float32 or bfloat16")
    return difference


def _dimensions(llm: LLM, form: Form) -> Dimensions:
    """Of the model; or the reason why an engine does not record what ``form`` needs."""
    if form not in FORMS:
        raise VectorError(f"form must be one of {', '.join(FORMS)}, not {form!r}")
    size = Dimensions.of(llm)
    gate = gate_of_llm(llm)
    if gate is None or not gate.config.max_vectors:
        raise DiscoveryError(
            "this engine does not record outputs; start it with "
            "additional_config={'cna': {'record': True, 'max_vectors': 1}}"
        )
    if form == "residual":
        check_residual(engine_of(llm).architecture)
    return size


def _checked_layers(form: Form, layers: Collection[int] | None, num_layers: int) -> list[int]:
    chosen = list(range(num_layers)) if layers is None else sorted(set(layers))
    if form == "residual" and (layers is None or len(chosen) != 1):
        raise DiscoveryError(
            "the form 'residual' is of one layer; name it: layers=[L], often one near the middle"
        )
    if not chosen or not all(0 <= layer < num_layers for layer in chosen):
        raise DiscoveryError(f"layers {chosen} are not in 0..{num_layers - 1}")
    return chosen
