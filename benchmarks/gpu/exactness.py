# SPDX-License-Identifier: Apache-2.0
"""Steered text of a tiny Llama against Hugging Face hooks: both runners, compiled and eager.

float32 with TRITON_F32_DEFAULT=ieee: without it Triton's attention multiplies in TF32, where near
ties of the oracle fall either way. All engines start at once; the oracle runs on the CPU when they
are done.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from cna_vllm import steer
from gpu.engine import GiB, on, start_all
from gpu.parts import emit, finish, rehearsing
from tests import tiny_models
from tests.oracles import Arm, HookedModel, Verdict

WIDTH = 320
SCOPES = ("last", "all", "generated")
INTERPRETED = {"TRITON_INTERPRET": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}


class Sizes(NamedTuple):
    device: str
    ways: tuple[tuple[str, str], ...]
    """(runner, "compiled" or "eager")."""
    prompts: int
    longest: int
    multipliers: Sequence[float]
    tokens: int


FULL = Sizes(
    "cuda",
    (("V2", "compiled"), ("V2", "eager"), ("V1", "compiled"), ("V1", "eager")),
    8,
    60,
    (0.0, 0.5, 2.0, -1.0),
    48,
)
REHEARSAL = Sizes("cpu", (("V2", "eager"), ("V1", "eager")), 2, 16, (0.0, 2.0), 6)


class Asked(NamedTuple):
    """One row: what the engine is asked, and what the oracle is."""

    prompt: list[int]
    arm: Arm
    extra_args: dict[str, Any] | None


def rows(circuits: Mapping[str, Mapping[int, tuple[int, ...]]], sizes: Sizes) -> list[Asked]:
    """Every prompt plain, in every multiplier and scope, and under two circuits at once."""
    one, two = circuits["one"], circuits["two"]
    arms: list[tuple[Arm, dict[str, Any] | None]] = [(Arm(), None)]
    for multiplier in sizes.multipliers:
        for scope in SCOPES:
            arm = Arm(((one, multiplier),), scope)
            arms.append((arm, steer("one", multiplier, scope=scope)))
    both = Arm(((one, 0.5), (two, -1.0)), "all")
    arms.append((both, steer([("one", 0.5), ("two", -1.0)], scope="all")))
    prompts = tiny_models.prompts(sizes.prompts, longest=sizes.longest)
    return [Asked(prompt, *arm) for prompt in prompts for arm in arms]


def engine(
    options: Mapping[str, Any], device: str, runner: str, mode: str
) -> tuple[dict[str, Any], dict[str, str], None]:
    of_device, environment = on(
        device,
        enforce_eager=mode == "eager",
        attention_config={"backend": "TRITON_ATTN"},
        kv_cache_memory_bytes=GiB // 4,
        gpu_memory_utilization=0.05,
    )
    environment |= {
        "VLLM_USE_V2_MODEL_RUNNER": "1" if runner == "V2" else "0",
        "TRITON_F32_DEFAULT": "ieee",
    }
    if device == "cpu" and runner == "V2":
        environment |= INTERPRETED
    return {**options, **of_device}, environment, None


class Oracle:
    """Verdicts, each reached once: the engines mostly say the same."""

    def __init__(self, model: Path, asked: Sequence[Asked]) -> None:
        self._model, self._asked = HookedModel(model), asked
        self._known: dict[tuple[int, ...], Verdict] = {}

    def check(self, row: int, tokens: Sequence[int]) -> Verdict:
        key = (row, *tokens)
        if key not in self._known:
            asked = self._asked[row]
            self._known[key] = self._model.check(asked.prompt, tokens, asked.arm)
        return self._known[key]


def main() -> None:
    sizes = REHEARSAL if rehearsing() else FULL
    torch.set_num_threads(4)
    folder = Path(tempfile.mkdtemp(prefix="exactness-"))
    model = tiny_models.llama(folder / "model", head_dim=64, intermediate_size=WIDTH)
    circuits, files = {}, {}
    for seed, name in enumerate(("one", "two"), 1):
        circuits[name] = tiny_models.channels(tiny_models.LAYERS, WIDTH, 40, seed)
        file = folder / f"{name}.json"
        file.write_text(json.dumps(tiny_models.circuit_object(circuits[name], width=WIDTH)))
        files[name] = str(file)
    options = {
        "model": str(model),
        "dtype": "float32",
        "skip_tokenizer_init": True,
        "max_model_len": 512,
        "max_num_seqs": 128,
        "additional_config": {"cna": {"circuits": files, "max_circuits": 8}},
    }
    asked = rows(circuits, sizes)
    same = {"max_tokens": sizes.tokens, "ignore_eos": True, "detokenize": False}
    requests = [
        {"prompt": row.prompt, "params": dict(same, extra_args=row.extra_args)} for row in asked
    ]
    oracle = Oracle(model, asked)
    starts = start_all({" ".join(way): engine(options, sizes.device, *way) for way in sizes.ways})
    wrong = []
    for name, started in starts.items():
        try:
            worker = started.result()
            passes = {
                cache: worker.ask({"requests": requests, "outputs": True})["outputs"]
                for cache in ("cold", "warm")
            }
        except RuntimeError as error:  # one engine less; the log says why
            wrong.append(f"{name}: {error}")
            continue
        runner, mode = name.split()
        status = worker.hello["status"]
        if status["runner"] != runner:
            wrong.append(f"{name}: the engine runs on {status['runner']}")
        for cache, outputs in passes.items():
            texts = [tuple(output["token_ids"][0]) for output in outputs]
            verdicts = [oracle.check(row, text) for row, text in enumerate(texts)]
            differ = [v for v in verdicts if not v.equal and not v.near_tie]
            emit(
                {
                    "runner": status["runner"],
                    "kernel": status["kernel"],
                    "mode": mode,
                    "cache": cache,
                    "cached_tokens": sum(output["cached"] for output in outputs),
                    "rows": len(verdicts),
                    "texts": len(set(texts)),
                    "near_ties": sum(v.near_tie for v in verdicts),
                    "wrong": len(differ),
                    "largest_gap": round(max((v.gap for v in differ), default=0.0), 6),
                }
            )
            if differ:
                wrong.append(f"{name}, {cache} cache: {len(differ)} of {len(verdicts)} differ")
    finish(wrong)


if __name__ == "__main__":
    main()
