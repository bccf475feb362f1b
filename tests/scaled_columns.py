# SPDX-License-Identifier: Apache-2.0
"""An oracle for engines whose roundings nothing else has: a neuron scaled by m is a column of
``down_proj`` scaled by m.

The other side is stock vLLM without the plugin, on a checkpoint with such columns: the same text,
token by token, whatever its kernels round.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tests import tiny_models
from tests.engine_job import V1_HERE, run_engine
from tests.tiny_models import LAYERS, WIDTH

Parts = Mapping[float, range]
"""Neurons of each layer, by their multiplier."""

# Powers of two, so that no rounding differs.
PARTS: Parts = {0.0: range(0, 20), -1.0: range(20, 40), 2.0: range(40, 55), 0.5: range(55, 70)}


def same_as_scaled_columns(
    save: Callable[[Path, Parts], Path],
    parts: Parts,
    folder: Path,
    architecture: str = "LlamaForCausalLM",
    **engine: Any,
) -> None:
    """One circuit for each of ``parts``, all in one request of scope ``all``, are what ``save``
    with ``parts`` makes of stock vLLM; plain requests between steered ones get another text."""
    circuits = {}
    for number, neurons in enumerate(parts.values()):
        file = folder / f"{number}.json"
        by_layer = {layer: tuple(neurons) for layer in range(LAYERS)}
        made = tiny_models.circuit_object(by_layer, architecture=architecture, width=WIDTH)
        file.write_text(json.dumps(made))
        circuits[f"part-{number}"] = str(file)
    fields = {"cna_circuit": [*circuits], "cna_multiplier": [*parts], "cna_scope": "all"}
    params = {"max_tokens": 16, "ignore_eos": True}
    prompts = tiny_models.prompts(6)
    plain = [{"prompt": prompt, "params": params} for prompt in prompts]
    ours = [{"prompt": p, "params": {**params, "extra_args": fields}} for p in prompts]
    mixed = [request for pair in zip(plain, ours, strict=True) for request in pair]
    options = {
        "skip_tokenizer_init": True,
        "dtype": "bfloat16",
        "enforce_eager": True,
        "max_model_len": 128,
        **engine,
    }
    config = {"cna": {"circuits": circuits}}
    (found,) = run_engine(
        {**options, "model": str(save(folder / "base", {})), "additional_config": config},
        [{"op": "generate", "requests": mixed}],
    )
    (wanted,) = run_engine(
        {**options, "model": str(save(folder / "scaled", parts))},
        [{"op": "generate", "requests": plain}],
        env={**V1_HERE, "VLLM_PLUGINS": ""},
    )
    texts = [[o["token_ids"] for o in outputs] for outputs in (found[::2], found[1::2], wanted)]
    assert texts[1] == texts[2]
    assert texts[0] != texts[2], "the multipliers must change the text for this to prove anything"
