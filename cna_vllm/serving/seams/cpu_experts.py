# SPDX-License-Identifier: Apache-2.0
"""Routed experts on a CPU, where vLLM computes them in one kernel that shows no activation.

That kernel runs for all tokens, so that plain ones have its bits. Then the tokens whose experts
have a neuron to scale are computed again, here, expert by expert in float32, with the activation
rounded to the model's dtype before it is scaled, and written over the kernel's. Recorded tokens are
computed again too, but their output stays the kernel's; what is recorded is the kernel's activation
to rounding. The kernel wants its weights in an order of its own: the original ones are kept for
that, a second copy of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

import torch
import torch.nn.functional as F

from cna_vllm.serving.seams.wrapping import Original, adding
from cna_vllm.serving.worker.experts import SteeredExperts

_MODULE = "vllm.model_executor.layers.fused_moe.experts.cpu_moe"
BACKENDS: Final = tuple(
    f"{_MODULE}.{prefix}CPUUnquantizedExperts" for prefix in ("", "X86", "Arm", "Power")
)
WEIGHTS: Final = "cna_weights"


def _silu(x: torch.Tensor) -> torch.Tensor:
    gate, up = x.chunk(2, -1)
    return F.silu(gate) * up


def _gelu(x: torch.Tensor) -> torch.Tensor:
    gate, up = x.chunk(2, -1)
    return F.gelu(gate) * up


def _gelu_tanh(x: torch.Tensor) -> torch.Tensor:
    gate, up = x.chunk(2, -1)
    return F.gelu(gate, approximate="tanh") * up


def _swigluoai(x: torch.Tensor) -> torch.Tensor:
    """Of gpt-oss: gate and up alternate, and are clamped."""
    gate, up = x[..., ::2].clamp(max=7.0), x[..., 1::2].clamp(-7.0, 7.0)
    return gate * torch.sigmoid(1.702 * gate) * (up + 1)


ACTIVATIONS: Final[Mapping[str, Callable[[torch.Tensor], torch.Tensor]]] = {
    "silu": _silu,
    "gelu": _gelu,
    "gelu_tanh": _gelu_tanh,
    "swigluoai": _swigluoai,
}


def name_of(experts: type) -> str:
    """Of a backend's class, with its module."""
    return f"{experts.__module__}.{experts.__qualname__}"


def is_one(experts: Any) -> bool:
    """Whether an experts instance is of a CPU's backend."""
    return name_of(type(experts)) in BACKENDS


@adding
def keep_weights(
    original: Original, self: Any, layer: Any, w13: torch.Tensor, w2: torch.Tensor
) -> None:
    """The layer keeps the weights that are about to be put into the kernel's order, and new ones
    when they are loaded again; then it must be proved again."""
    from cna_vllm.serving.seams.experts import steers_experts

    steered = getattr(layer, "cna_experts", None)
    on_cpu = self.experts_cls is not None and name_of(self.experts_cls) in BACKENDS
    if on_cpu and (steered is not None or steers_experts()):
        biases = (getattr(layer, name, None) for name in ("w13_bias", "w2_bias"))
        # Copies: vLLM 0.33 writes the new order over the old.
        kept = [None if w is None else w.data.clone() for w in (w13, w2, *biases)]
        setattr(layer, WEIGHTS, kept)
        if steered is not None:
            steered.proved_in = None
    original(self, layer, w13, w2)


def hook(experts: Any, layer: Any, steered: SteeredExperts) -> None:
    """Computes changed tokens again after the kernel, and recorded ones only to record them."""
    apply = experts.apply

    def applied(**call: Any) -> None:
        apply(**call)
        ids, weights = call["topk_ids"], getattr(layer, WEIGHTS)
        changed = steered.changed_tokens(ids)
        if changed.numel():
            call["output"][changed] = _again(weights, steered, changed, **call)
        # One by one, so that what is recorded of a token has the same bits in every batch.
        for token in steered.recorded_tokens(len(ids)):
            _again(weights, steered, token[None], **call)

    experts.apply = applied


def _again(
    weights: list[torch.Tensor],
    steered: SteeredExperts,
    tokens: torch.Tensor,
    *,
    output: torch.Tensor,
    hidden_states: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    activation: Any,
    apply_router_weight_on_input: bool,
    **_: Any,
) -> torch.Tensor:
    """The outputs of some tokens, [tokens, hidden_size], of the dtype of ``output``."""
    w13, w2, bias13, bias2 = weights
    act = ACTIVATIONS[activation.value]
    ids = topk_ids[tokens].contiguous()
    topk = ids.shape[1]
    hidden = hidden_states[tokens].float()
    # Rows of each expert, as places in [tokens * topk].
    rows = {e: (ids.reshape(-1) == e).nonzero()[:, 0] for e in ids.unique().tolist()}
    acted = hidden_states.new_zeros(ids.numel(), w2.shape[2])
    for expert, at in rows.items():
        gate_up = F.linear(hidden[at // topk], w13[expert].float(), _bias(bias13, expert))
        acted[at] = act(gate_up).to(acted.dtype)
    steered.scale(acted, ids, steered.row_slot[tokens])
    if steered.row_record is not None:
        steered.record(acted, ids, steered.row_record[tokens])
    shares = topk_weights[tokens].reshape(-1, 1).float()
    total = torch.zeros_like(hidden)
    for expert, at in rows.items():
        down = F.linear(acted[at].float(), w2[expert].float(), _bias(bias2, expert))
        if not apply_router_weight_on_input:
            down *= shares[at]
        total.index_add_(0, at // topk, down)
    return total.to(output.dtype)


def _bias(biases: torch.Tensor | None, expert: int) -> torch.Tensor | None:
    return None if biases is None else biases[expert].float()
