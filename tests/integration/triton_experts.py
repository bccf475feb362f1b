# SPDX-License-Identifier: Apache-2.0
"""vLLM's Triton experts under Triton's interpreter, hooked, against the sum over experts.

Run in a process of its own by test_experts_seams. Of vLLM's GPU build only what is not Triton is
replaced: the sorting of choices by expert and the sum over a token's choices.
"""

from __future__ import annotations

from typing import Any

import torch

from tests.engine_job import stand_in_driver

TOKENS, TOPK, EXPERTS, HIDDEN, WIDTH = 9, 2, 4, 32, 24


def align(
    topk_ids: torch.Tensor, block: int, experts: int, expert_map: Any = None, **_: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As ``moe_align_block_size``: indices of choices by expert, each expert's padded to blocks."""
    flat = topk_ids.reshape(-1)
    sorted_ids: list[int] = []
    blocks: list[int] = []
    for expert in range(experts):
        mine = (flat == expert).nonzero()[:, 0].tolist()
        mine += [flat.numel()] * (-len(mine) % block)
        sorted_ids += mine
        blocks += [expert] * (len(mine) // block)
    return (
        torch.tensor(sorted_ids, dtype=torch.int32),
        torch.tensor(blocks, dtype=torch.int32),
        torch.tensor([len(sorted_ids)], dtype=torch.int32),
    )


def main() -> None:
    stand_in_driver()

    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.model_executor.layers.fused_moe.activation import MoEActivation
    from vllm.model_executor.layers.fused_moe.config import (
        FUSED_MOE_UNQUANTIZED_CONFIG,
        FusedMoEConfig,
        FusedMoEParallelConfig,
        RoutingMethodType,
    )
    from vllm.model_executor.layers.fused_moe.experts import triton_moe

    from cna_kernels import backend
    from cna_vllm.serving.seams.experts import hook_activation
    from cna_vllm.serving.worker.activation import StepBuffers
    from cna_vllm.serving.worker.experts import ExpertTable, RoutedExperts, SteeredExperts

    assert backend(torch.device("cpu")) == "interpreter"
    module: Any = triton_moe
    module._prepare_expert_assignment = lambda ids, config, tokens, topk, experts, *rest, **more: (
        align(ids, config["BLOCK_SIZE_M"], experts)
    )
    module.try_get_optimal_moe_config = lambda *args, **kwargs: {
        "BLOCK_SIZE_M": 16,
        "BLOCK_SIZE_N": 16,
        "BLOCK_SIZE_K": 16,
        "GROUP_SIZE_M": 1,
        "SPLIT_K": 1,
    }
    with set_current_vllm_config(VllmConfig()):
        config = FusedMoEConfig(
            num_experts=EXPERTS,
            experts_per_token=TOPK,
            hidden_dim=HIDDEN,
            intermediate_size=WIDTH,
            num_local_experts=EXPERTS,
            num_logical_experts=EXPERTS,
            activation=MoEActivation.SILU,
            device="cpu",
            routing_method=RoutingMethodType.Renormalize,
            moe_parallel_config=FusedMoEParallelConfig.make_no_parallel(),
            in_dtype=torch.float32,
        )
        experts: Any = triton_moe.TritonExperts(config, FUSED_MOE_UNQUANTIZED_CONFIG)
    experts.moe_sum = lambda input, output, *rest: output.copy_(input.sum(1))

    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(TOKENS, HIDDEN, generator=g)
    w13 = torch.randn(EXPERTS, 2 * WIDTH, HIDDEN, generator=g) / 4
    w2 = torch.randn(EXPERTS, HIDDEN, WIDTH, generator=g) / 4
    ids = torch.stack([torch.randperm(EXPERTS, generator=g)[:TOPK] for _ in range(TOKENS)]).int()
    weights = torch.rand(TOKENS, TOPK, generator=g)

    def apply() -> torch.Tensor:
        output = torch.empty(TOKENS, HIDDEN)
        experts.apply(
            output=output,
            hidden_states=hidden,
            w1=w13,
            w2=w2,
            topk_weights=weights,
            topk_ids=ids,
            activation=MoEActivation.SILU,
            global_num_experts=EXPERTS,
            expert_map=None,
            a1q_scale=None,
            a2_scale=None,
            workspace13=torch.empty(TOKENS * TOPK * max(WIDTH, HIDDEN)),
            workspace2=torch.empty(TOKENS * TOPK * max(2 * WIDTH, HIDDEN)),
            expert_tokens_meta=None,
            apply_router_weight_on_input=False,
        )
        return output

    plain = apply()

    row_slot = torch.full((TOKENS,), -1, dtype=torch.int32)
    row_slot[1::2] = 0
    # Tokens 4 and 5, the second of them steered, are recorded in slots 2 and 0.
    row_record = torch.tensor([-1, -1, -1, -1, 2, 0, -1, -1, -1], dtype=torch.int32)
    step = StepBuffers(
        row_slot, torch.zeros(1, 1, dtype=torch.int32), torch.tensor([[-1.5]]), row_record
    )
    stage = torch.zeros(3, TOPK * WIDTH), torch.full((3, TOPK), -1, dtype=torch.int32)
    refused: Any = None
    found = RoutedExperts(
        0, "", "", EXPERTS, range(EXPERTS), TOPK, HIDDEN, WIDTH, 0, WIDTH, refused, refused
    )
    table = ExpertTable([found], 1, 64, torch.device("cpu"))
    listed = torch.rand(EXPERTS, WIDTH, generator=g) < 0.4
    expert, channel = listed.nonzero().int().T.numpy()
    for rows, share in table.shares(0 * expert, expert, channel):
        rows[:, 0] = torch.from_numpy(share)
    hook = SteeredExperts(step, table.layer_offsets(0), table.neurons, stage)
    hook_activation(experts, hook)
    steered = apply()

    expected, inputs = torch.zeros(TOKENS, HIDDEN), torch.zeros(TOKENS, TOPK, WIDTH)
    for token in range(TOKENS):
        for choice, e in enumerate(ids[token].tolist()):
            gate, up = (w13[e] @ hidden[token]).chunk(2)
            neurons = torch.nn.functional.silu(gate) * up
            if row_slot[token] >= 0:
                neurons[listed[e]] *= -1.5
            inputs[token, choice] = neurons
            expected[token] += weights[token, choice] * (w2[e] @ neurons)
    assert torch.allclose(steered, expected, atol=1e-4), (steered - expected).abs().max()
    assert torch.equal(steered[::2], plain[::2]), "rows that are not steered"
    assert not torch.isclose(steered[1::2], plain[1::2]).all(dim=1).any(), "steered rows"
    acted, of = stage[0].view(3, TOPK, WIDTH), stage[1]
    assert torch.allclose(acted[[2, 0]], inputs[[4, 5]], atol=1e-5), "recorded tokens"
    assert torch.equal(of[[2, 0]], ids[[4, 5]]) and (of[1] == -1).all(), "and their experts"
    print("as expected")


if __name__ == "__main__":
    main()
