# SPDX-License-Identifier: Apache-2.0
"""Steered text of a tiny Llama against Hugging Face hooks: both runners, compiled and eager.

float32 with TRITON_F32_DEFAULT=ieee: without it Triton's attention multiplies in TF32, where near
ties of the oracle fall either way. All engines start at once; the oracle runs on the CPU when they
are done.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from gpu.engine import GiB, on, start_all
from gpu.parts import emit, finish, rehearsing
from tests import tiny_models
from tests.integration.conftest import FEW_MULTIPLIERS, MULTIPLIERS, Subject, subject
from tests.oracles import Verdict

WIDTH = 320


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
    MULTIPLIERS,
    48,
)
REHEARSAL = Sizes("cpu", (("V2", "eager"), ("V1", "eager")), 2, 16, FEW_MULTIPLIERS, 6)
INTERPRETED = {"TRITON_INTERPRET": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}


def engine(
    subject: Subject, device: str, runner: str, mode: str
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
    return subject.config(max_num_seqs=128, **of_device), environment, None


def main() -> None:
    sizes = REHEARSAL if rehearsing() else FULL
    torch.set_num_threads(4)
    folder = Path(tempfile.mkdtemp(prefix="bench-gpu-tiny-"))
    model = tiny_models.llama(folder / "model", head_dim=64, intermediate_size=WIDTH)
    tiny = subject(
        str(model), folder, tiny_models.LAYERS, WIDTH, 40, {"skip_tokenizer_init": True}
    )
    requests, wanted = tiny.requests(
        tiny_models.prompts(sizes.prompts, longest=sizes.longest),
        tiny.matrix(sizes.multipliers),
        max_tokens=sizes.tokens,
        ignore_eos=True,
        detokenize=False,
    )
    starts = start_all({" ".join(way): engine(tiny, sizes.device, *way) for way in sizes.ways})
    known: dict[tuple[int, tuple[int, ...]], Verdict] = {}
    wrong = []
    for name, started in starts.items():
        runner, mode = name.split()
        try:
            worker = started.result()
            passes = {
                cache: worker.ask({"requests": requests, "outputs": True})["outputs"]
                for cache in ("cold", "warm")
            }
        except RuntimeError as error:  # one engine less; the log says why
            wrong.append(f"{name}: {error}")
            continue
        status = worker.hello["status"]
        if status["runner"] != runner:
            wrong.append(f"{name}: the engine runs on {status['runner']}")
        for cache, outputs in passes.items():
            verdicts = []
            for index, output in enumerate(outputs):
                key = (index, tuple(output["token_ids"][0]))
                if key not in known:
                    known[key] = tiny.verdicts([wanted[index]], [output])[0]
                verdicts.append(known[key])
            ties = sum(v.near_tie for v in verdicts)
            differ = [v for v in verdicts if not v.equal and not v.near_tie]
            emit(
                {
                    "runner": status["runner"],
                    "kernel": status["kernel"],
                    "mode": mode,
                    "cache": cache,
                    "rows": len(verdicts),
                    "near_ties": ties,
                    "wrong": len(differ),
                    "largest_gap": round(max((v.gap for v in differ), default=0.0), 6),
                    "texts": len({tuple(o["token_ids"][0]) for o in outputs}),
                }
            )
            if differ:
                wrong.append(f"{name}, {cache} cache: {len(differ)} of {len(verdicts)} differ")
    finish(wrong)


if __name__ == "__main__":
    main()
