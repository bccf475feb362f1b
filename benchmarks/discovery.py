# SPDX-License-Identifier: Apache-2.0
"""What discovery costs: its time as a ratio to plain vLLM prefilling the same prompts.

    python benchmarks/discovery.py [--model M] [--rounds 5] [--prompts 200] [--record]

Variants: ``stock``, vLLM with no plugin loaded, renders and prefills the two sets with
``max_tokens=1``; ``discover``, the whole of ``discover()`` on the same engine settings, without
the universal filter; ``filtered``, the same with the packaged diverse prompts, against ``stock``
prefilling those too (``stock+``); ``hooks``, a batch-1 Hugging Face loop with hooks, float64 sums
and as many threads as vLLM uses. Each variant has a process that keeps its model; rounds run all
variants once, in rotated order, one at a time. A ratio is the median over rounds of the quotient
within a round, printed with its quartiles; CPU ratios compare the process's CPU time, which other
load on the machine disturbs less. Memory: what the recorder holds on the device, and the growth
of the process's peak resident memory from 50 to 500 prompts, beside that of stock vLLM (whose
batches grow too). With --record a JSON row is appended to benchmarks/results/discovery.jsonl.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from provenance import provenance, record

from cna_vllm.checkpoints.models import resolve_model
from cna_vllm.text.prompts import Prompt

RATIOS = {
    "discover / stock": ("discover", "stock"),
    "filtered / stock+": ("filtered", "stock+"),
    "discover / hooks": ("discover", "hooks"),
}
TOPICS = ("sea", "bread", "cats", "music", "trains", "rain", "books", "bees", "bridges", "snow")


def contrast(count: int) -> tuple[list[Prompt], list[Prompt]]:
    """``count`` prompts in two sets that differ in the language asked for."""
    topics = [f"{TOPICS[i % len(TOPICS)]} in {1900 + i}" for i in range(count // 2)]
    return (
        [Prompt(text=f"Write a sentence in French about this topic: {t}.") for t in topics],
        [Prompt(text=f"Write a sentence in English about this topic: {t}.") for t in topics],
    )


def engine_jobs(args: argparse.Namespace, recording: bool) -> dict[str, Callable[[], Any]]:
    """The variants that one engine runs; timed by the caller."""
    from vllm import LLM, SamplingParams, TokensPrompt

    from cna_vllm.discovery import discover, diverse_prompts
    from cna_vllm.text.prompts import render

    llm = LLM(
        model=args.model,
        dtype="auto" if _cuda() else "float32",
        enforce_eager=not args.compiled,
        max_model_len=512,
        enable_prefix_caching=False,
        additional_config={"cna": {"record": True}} if recording else {},
    )
    positive, negative = contrast(args.prompts)

    def prefill(prompts: list[Prompt]) -> None:
        tokenizer = llm.get_tokenizer()
        params = SamplingParams(max_tokens=1, temperature=0.0, detokenize=False)
        ids = [TokensPrompt(prompt_token_ids=render(tokenizer, p)) for p in prompts]
        llm.generate(ids, params, use_tqdm=True)

    def held(count: int) -> dict[str, int]:
        """Memory while a recording of short prompts is under way, before it is fetched.

        In the stock engine, that of the same prompts without a recording.
        """
        if recording:
            plan = {"top": {"universal": 46}, "top_prompts": 40}
            llm.collective_rpc("cna_start_recording", args=(plan,))
        fields = {"cna_record": "g"} if recording else None
        params = SamplingParams(max_tokens=1, detokenize=False, extra_args=fields)
        # The last step's rows wait for the next step: one more prompt, so that they are summed.
        for prompts in (count, 1):
            ids = [TokensPrompt(prompt_token_ids=[5, 6, 7, 8])] * prompts
            llm.generate(ids, params, use_tqdm=False)
        found = 0
        if recording:
            found = llm.collective_rpc("cna_status")[0]["recorder_bytes"]
            llm.collective_rpc("cna_take_recording")
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        return {"recorder": found, "peak_rss": peak, "device_peak": _device_peak()}

    memory = {"memory": lambda: {str(n): held(n) for n in (50, 500)}}
    if not recording:
        return {
            **memory,
            "stock": lambda: prefill([*positive, *negative]),
            "stock+": lambda: prefill([*positive, *negative, *diverse_prompts()]),
        }
    return {
        **memory,
        "discover": lambda: discover(llm, positive, negative, universal="none") and None,
        "filtered": lambda: discover(llm, positive, negative) and None,
    }


def hook_jobs(args: argparse.Namespace) -> dict[str, Callable[[], Any]]:
    """A loop over the prompts, one at a time, through Hugging Face with hooks."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from cna_vllm.text.prompts import render

    torch.set_num_threads(args.threads)
    device = "cuda" if _cuda() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(
        args.model, dtype="auto" if _cuda() else torch.float32
    ).to(device)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    layers = model.get_decoder().layers

    @torch.inference_mode()
    def loop() -> None:
        sums: dict[str, list[Any]] = {}
        for name, prompts in zip(("positive", "negative"), contrast(args.prompts), strict=True):
            total = sums[name] = [0] * len(layers)

            def hook(at: int, total: list[Any], _module: Any, inputs: Any) -> None:
                total[at] = total[at] + inputs[0][0, -1].double()

            handles = [
                layer.mlp.down_proj.register_forward_pre_hook(partial(hook, at, total))
                for at, layer in enumerate(layers)
            ]
            for prompt in prompts:
                model(torch.tensor([render(tokenizer, prompt)], device=device), logits_to_keep=1)
            for handle in handles:
                handle.remove()
        delta = torch.stack(sums["positive"]) - torch.stack(sums["negative"])
        delta.abs().flatten().topk(46).indices.tolist()

    return {"hooks": loop}


def serve(args: argparse.Namespace) -> None:
    """The worker: one model, one measured job for each line on standard input."""
    import torch

    if args.worker == "hooks":
        jobs = hook_jobs(args)
    else:
        jobs = engine_jobs(args, recording=args.worker == "discover")
    print(json.dumps({"threads": torch.get_num_threads()}), flush=True)
    for line in sys.stdin:
        wall, cpu = time.perf_counter(), time.process_time()
        result = jobs[json.loads(line)]()
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        print(json.dumps({"wall": wall, "cpu": cpu, "result": result}), flush=True)


def _cuda() -> bool:
    import torch

    return torch.cuda.is_available()


def _device_peak() -> int:
    import torch

    return torch.cuda.max_memory_allocated() if _cuda() else 0


class Worker:
    """A process that holds one model."""

    def __init__(self, kind: str, args: argparse.Namespace, threads: int = 1) -> None:
        env = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "ERROR"}
        env.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
        if kind == "stock":
            env["VLLM_PLUGINS"] = ""
        command = [sys.executable, __file__, "--worker", kind, "--model", args.model]
        command += ["--prompts", str(args.prompts), "--threads", str(threads)]
        command += ["--compiled"] if args.compiled else []
        self.process = subprocess.Popen(
            command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.threads = int(self._answer()["threads"])

    def run(self, job: str) -> dict[str, Any]:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        return self._answer()

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(timeout=60)

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        while line := self.process.stdout.readline():
            if line.startswith("{"):
                return json.loads(line)
        raise RuntimeError(f"the worker's process ended with {self.process.wait()}")


def quartiles(values: list[float]) -> list[float]:
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return [round(v, 4) for v in (low, middle, high)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default=None, help="default: SmolLM2-135M-Instruct")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--prompts", type=int, default=200, help="in both sets together")
    parser.add_argument("--compiled", action="store_true", help="torch.compile instead of eager")
    parser.add_argument("--record", action="store_true")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--threads", type=int, default=1, help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.model = resolve_model(args.model)
    if args.worker is not None:
        serve(args)
        return
    stock = Worker("stock", args)
    cna = Worker("discover", args)
    hooks = Worker("hooks", args, stock.threads)
    workers = {"stock": stock, "discover": cna, "stock+": stock, "filtered": cna, "hooks": hooks}
    memory = {
        kind: worker.run("memory")["result"]
        for kind, worker in (("stock", stock), ("discover", cna))
    }
    for variant in ("stock", "discover"):
        workers[variant].run(variant)  # warm-up
    rounds: list[dict[str, dict[str, float]]] = []
    for number in range(args.rounds):
        order = list(workers)
        order = order[number % len(order) :] + order[: number % len(order)]
        rounds.append({variant: workers[variant].run(variant) for variant in order})
        print(f"round {number + 1} of {args.rounds}", file=sys.stderr)
    for worker in (stock, cna, hooks):
        worker.close()
    ratios = {
        f"{name} ({clock})": quartiles([r[above][clock] / r[below][clock] for r in rounds])
        for name, (above, below) in RATIOS.items()
        for clock in ("wall", "cpu")
    }
    seconds = {v: round(statistics.median(r[v]["wall"] for r in rounds), 2) for v in workers}
    print(f"{'ratio of time':28} {'lower':>8} {'median':>8} {'upper':>8}")
    for name, (low, middle, high) in ratios.items():
        print(f"{name:28} {low:8.3f} {middle:8.3f} {high:8.3f}")
    print(f"median seconds: {seconds}; threads: {stock.threads}")
    print(f"recorder bytes: { ({n: m['recorder'] for n, m in memory['discover'].items()}) }")
    for kind, peaks in memory.items():
        growth = (peaks["500"]["peak_rss"] - peaks["50"]["peak_rss"]) / 2**20
        print(f"growth of peak resident memory from 50 to 500 prompts, {kind}: {growth:.1f} MiB")
    row = {
        "benchmark": "discovery",
        "model": Path(args.model).name,
        "prompts": args.prompts,
        "rounds": args.rounds,
        "compiled": args.compiled,
        "threads_of_engine_and_loop": stock.threads,
        "seconds": seconds,
        "ratios": ratios,
        "memory": memory,
        **provenance(),
    }
    if args.record:
        record("discovery", row)


if __name__ == "__main__":
    main()
