# SPDX-License-Identifier: Apache-2.0
"""Stock vLLM and ours side by side on one GPU, rounds interleaved: python -m gpu.engines 1b|8b.

Random weights of Llama-3.2-1B's or Llama-3.1-8B's shape, bfloat16, compiled, full CUDA graphs.
``stock`` is vLLM with no plugin loaded, run at both ends of a round: the mean of the two is what
ratios of tokens/s are to, and the second one's own ratio says how still the machine was. Two
processes of one program differ by some percent as long as they live, which no round averages out.
"""

from __future__ import annotations

import random
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from engine_throughput import random_circuit
from workers import Worker

from cna_vllm import steer
from gpu.engine import GiB, on, start_all
from gpu.parts import emit, finish, rehearsing


class Case(NamedTuple):
    name: str
    batch: int
    prompt: int
    tokens: int


class Sizes(NamedTuple):
    device: str
    shapes: Mapping[str, Mapping[str, Any]]
    cases: tuple[Case, ...]
    circuits: int
    seconds: float
    """A case gets rounds until so much is spent, but at least ``rounds``, at most 20."""
    rounds: int


_LLAMA = {"num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256}
_1B = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "head_dim": 64}
_8B = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "head_dim": 128}
_TINY = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": 512,
}
FULL = Sizes(
    "cuda",
    {
        "1b": {**_1B, **_LLAMA, "tie_word_embeddings": True},
        "8b": {**_8B, **_LLAMA, "tie_word_embeddings": False},
    },
    (
        Case("batch 1", 1, 16, 128),
        Case("batch 32", 32, 16, 128),
        Case("batch 256", 256, 16, 64),
        Case("prefill", 32, 1024, 1),
    ),
    256,
    12.0,
    3,
)
REHEARSAL = Sizes(
    "cpu",
    {"1b": _TINY, "8b": {**_TINY, "num_hidden_layers": 3}},
    (Case("batch 1", 1, 4, 3), Case("batch 4", 4, 4, 2), Case("prefill", 2, 8, 1)),
    4,
    0.0,
    2,
)
STOCK, AGAIN, IDLE = "stock", "stock again", "idle"
VARIANTS = (STOCK, IDLE, "one arm", "distinct arms", "three circuits", AGAIN)


def steering(variant: str, request: int, circuits: int) -> dict[str, Any] | None:
    """``extra_args`` of one request of a batch."""
    match variant:
        case "one arm":
            return steer("c0", 1.5)
        case "distinct arms":
            return steer(f"c{request % circuits}", 1.5 + request / 1000)
        case "three circuits":
            names = [f"c{(request + 31 * slot) % circuits}" for slot in range(3)]
            return steer([(name, 1.2 + slot) for slot, name in enumerate(names)])
    return None


def run(worker: Worker, case: Case, variant: str, sizes: Sizes, vocabulary: int) -> float:
    """Seconds of one batch; the same prompts for every variant."""
    rng = random.Random(1)
    requests = []
    for request in range(case.batch):
        params = {
            "max_tokens": case.tokens,
            "ignore_eos": True,
            "detokenize": False,
            "extra_args": steering(variant, request, sizes.circuits),
        }
        prompt = [rng.randrange(3, vocabulary) for _ in range(case.prompt)]
        requests.append({"prompt": prompt, "params": params})
    seconds: float = worker.ask({"requests": requests, "outputs": False})["seconds"]
    return seconds


def measure(workers: Mapping[str, Worker], case: Case, sizes: Sizes, vocabulary: int) -> None:
    def once(variant: str) -> float:
        return run(workers[variant], case, variant, sizes, vocabulary)

    for variant in (STOCK, IDLE, "distinct arms"):
        once(variant)
    taken: dict[str, list[float]] = {variant: [] for variant in VARIANTS}
    begin = time.perf_counter()
    for number in range(20):
        for variant in VARIANTS if number % 2 else VARIANTS[::-1]:
            taken[variant].append(once(variant))
        if number + 1 >= sizes.rounds and time.perf_counter() - begin > sizes.seconds:
            break
    base = [(a + b) / 2 for a, b in zip(taken[STOCK], taken[AGAIN], strict=True)]
    results = {}
    for variant, seconds in taken.items():
        ratios = [b / s for b, s in zip(base, seconds, strict=True)]
        spread = (min(ratios), statistics.median(ratios), max(ratios))
        results[variant] = {
            "steps_per_second": round(case.tokens / statistics.median(seconds), 2),
            "ratio": [round(ratio, 4) for ratio in spread],
        }
    emit({**case._asdict(), "rounds": len(base), "variants": results})


def main() -> None:
    from transformers import LlamaConfig

    sizes = REHEARSAL if rehearsing() else FULL
    shape = sizes.shapes[sys.argv[1]]
    folder = Path(tempfile.mkdtemp(prefix="shape-"))
    LlamaConfig(
        **shape,
        architectures=["LlamaForCausalLM"],
        max_position_embeddings=8192,
        bos_token_id=1,
        eos_token_id=2,
    ).save_pretrained(folder)
    circuits = {}
    for number in range(sizes.circuits):
        circuits[f"c{number}"] = str(folder / f"c{number}.circuit.json")
        random_circuit(str(folder), 0.001, number).save(circuits[f"c{number}"])
    graphs = {
        "cudagraph_mode": "FULL_AND_PIECEWISE",
        "cudagraph_capture_sizes": [1, 2, 4, 8, 16, 32, 64, 128, 256],
    }
    of_device, environment = on(
        sizes.device,
        dtype="bfloat16",
        compilation_config=graphs,
        kv_cache_memory_bytes=6 * GiB,
        gpu_memory_utilization=0.3,
    )
    options = {
        "model": str(folder),
        "load_format": "dummy",
        "skip_tokenizer_init": True,
        "max_model_len": 2048,
        "max_num_seqs": 256,
        "enable_prefix_caching": False,
        **of_device,
    }
    config = {"cna": {"circuits": circuits, "max_circuits": sizes.circuits + 8}}
    starts = start_all(
        {
            STOCK: (options, environment, ""),
            IDLE: ({**options, "additional_config": config}, environment, None),
        }
    )
    engines = {name: started.result() for name, started in starts.items()}
    status = engines[IDLE].hello["status"]
    emit(
        {
            "start_seconds": {n: round(w.hello["seconds"], 1) for n, w in engines.items()},
            **{key: status[key] for key in ("runner", "kernel")},
            "graphs": graphs if sizes.device == "cuda" else None,
        }
    )
    workers = {v: engines[STOCK if v in (STOCK, AGAIN) else IDLE] for v in VARIANTS}
    for case in sizes.cases:
        measure(workers, case, sizes, shape["vocab_size"])
    finish()


if __name__ == "__main__":
    main()
