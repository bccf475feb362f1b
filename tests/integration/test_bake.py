# SPDX-License-Identifier: Apache-2.0
"""A baked checkpoint in engines without the plugin: what scope ``all`` steering writes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from cna_vllm import Circuit
from cna_vllm.checkpoints.bake import bake
from tests import tiny_models
from tests.engine_job import V1_HERE, run_engine
from tests.integration.conftest import PLAIN, Subject
from tests.oracles import HookedModel, assert_token_exact

pytestmark = pytest.mark.engine

# Zero and powers of two: scaling weights and scaling activations then round alike.
MULTIPLIERS = (0.0, 0.5, 2.0)


def test_scope_all_equals_the_baked_checkpoint(tiny: Subject, tmp_path: Path) -> None:
    """One steered engine for all multipliers; plain vLLM for each baked folder.

    The baked weights are compared with columns scaled by hand, and both engines' text with the
    baked folder in transformers, and with hooks on the original.
    """
    prompts = tiny_models.prompts(8)
    sampling = {"max_tokens": 32, "ignore_eos": True}
    arms = {m: tiny.arm(("one", m), scope="all") for m in MULTIPLIERS}
    steered = {m: tiny.requests(prompts, [arm], **sampling) for m, arm in arms.items()}
    # A batch for each multiplier, of the shape that the plain engines see.
    steps = [{"op": "generate", "requests": requests} for requests, _ in steered.values()]
    ours = run_engine(tiny.config(), steps)

    plain, _ = tiny.requests(prompts, [PLAIN], **sampling)
    original = load_file(Path(tiny.path) / "model.safetensors")
    for (multiplier, (_, wanted)), mine in zip(steered.items(), ours, strict=True):
        folder = tmp_path / f"baked-{multiplier:g}"
        bake(tiny.path, Circuit.load(tiny.files["one"]), multiplier, folder)

        by_hand = {name: tensor.clone() for name, tensor in original.items()}
        for layer, indices in tiny.circuits["one"].items():
            by_hand[f"model.layers.{layer}.mlp.down_proj.weight"][:, list(indices)] *= multiplier
        found = load_file(folder / "model.safetensors")
        assert found.keys() == by_hand.keys()
        assert all(torch.equal(found[name], by_hand[name]) for name in found)

        stock = {**tiny.config(model=str(folder)), "additional_config": {}}
        (theirs,) = run_engine(
            stock, [{"op": "generate", "requests": plain}], env={**V1_HERE, "VLLM_PLUGINS": ""}
        )
        assert [o["token_ids"] for o in mine] == [o["token_ids"] for o in theirs]

        assert_token_exact(tiny.verdicts(wanted, mine), f"hooks, m = {multiplier:g}")
        baked = HookedModel(folder)
        assert_token_exact(
            [
                baked.check(prompt, output["token_ids"][0], PLAIN)
                for prompt, output in zip(prompts, theirs, strict=True)
            ],
            f"transformers, baked, m = {multiplier:g}",
        )
    texts = [str(output["token_ids"]) for outputs in ours for output in outputs]
    assert len(set(texts)) > len(prompts) * 2, "the multipliers must change the text"
