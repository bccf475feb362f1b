# SPDX-License-Identifier: Apache-2.0
"""What a sweep of arms costs: its tokens/s as a ratio to plain vLLM's on as many requests.

    python benchmarks/sweep.py [--model M] [--arms 8] [--prompts 64] [--restarts 3] [--record]

Variants: ``stock``, vLLM with no plugin loaded, answers every prompt as often as there are arms;
``control``, the same in a second process, whose ratio to ``stock`` is 1 but for noise; ``sweep``,
every prompt plain and under all other multipliers in one call of ``LLM.generate``; ``written``,
the same requests through the batch runner of ``cna-vllm generate``, which writes each row to a
file as it finishes, against the same ``stock``.

The comparison is as strict as it can be made: stock vLLM has its prefix cache too, and its
requests are copies of each other, neighbours as arms are, so every full block of a prompt but its
first copy's is a hit. Arms of scope ``last`` and ``generated`` have to reach the same number of
cached tokens, which is shown for both; arms of scope ``all`` share no block with each other, and
with ``--scope all`` the ratio says what that costs. All requests write the same number of tokens,
and the cache is emptied before each run.

A restart starts all processes anew, in rotated order, and warms them up; rounds run all variants
once, in rotated order, one at a time. A ratio is the median over restarts of the median over
rounds of the quotient within a round, printed with its lowest and highest restart: a difference
smaller than the control's spread says nothing. CPU ratios compare tokens per second of the
process's CPU time, which other load on the machine disturbs less. With --record a JSON row is
appended to benchmarks/results/sweep.jsonl.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine_throughput import random_circuit
from provenance import provenance, record
from workers import Worker

from cna_vllm.checkpoints.models import resolve_model
from cna_vllm.steering.arms import Arm, steering_arm
from cna_vllm.text.prompts import Prompt

if TYPE_CHECKING:
    from vllm import LLM, RequestOutput

STOCK, CONTROL, SWEEP, WRITTEN = "stock", "control", "sweep", "written"
VARIANTS = (STOCK, CONTROL, SWEEP, WRITTEN)
WARM_UP = 4  # prompts
WORDS = "the sea and some bread with cats in rain on old books about bees over bridges"


def arms_of(count: int, scope: str) -> list[Arm]:
    """The plain arm, and multipliers from 0 on in steps of 1/4, without 1."""
    doses = [i / 4 for i in range(count) if i != 4][: count - 1]
    return [Arm("plain"), *(steering_arm([("c", dose)], scope) for dose in doses)]


def prompts_of(count: int, words: int) -> list[Prompt]:
    """Prompts of about as many tokens as words, and the chat template's."""
    rng = random.Random(0)
    return [Prompt(text=" ".join(rng.choices(WORDS.split(), k=words))) for _ in range(count)]


def generated(
    llm: LLM, prompts: Sequence[Prompt], arms: Sequence[Arm], sampling: dict[str, Any]
) -> int:
    """Answers every prompt in every arm; returns the number of prompt tokens that were cached."""
    from vllm import SamplingParams, TokensPrompt

    from cna_vllm.text.prompts import render

    tokenizer = llm.get_tokenizer()
    ids = [render(tokenizer, prompt) for prompt in prompts]
    outputs: list[RequestOutput] = llm.generate(
        [TokensPrompt(prompt_token_ids=one) for one in ids for _ in arms],
        [SamplingParams(**sampling, extra_args=arm.extra_args()) for _ in ids for arm in arms],
        use_tqdm=False,
    )
    return sum(output.num_cached_tokens or 0 for output in outputs)


def written(
    llm: LLM, prompts: Sequence[Prompt], arms: Sequence[Arm], sampling: dict[str, Any]
) -> None:
    from cna_vllm.batch.plan import plan
    from cna_vllm.batch.runner import run_batch

    with tempfile.TemporaryDirectory() as folder:
        rows = plan(prompts, arms, sampling)
        run_batch(llm, rows, Path(folder) / "rows.jsonl", identity={}, progress=False)


def serve(args: argparse.Namespace) -> None:
    """The worker: one engine, one measured run for each line on standard input."""
    import torch
    from vllm import LLM

    llm = LLM(
        model=args.model,
        dtype="auto" if torch.cuda.is_available() else "float32",
        enforce_eager=not args.compiled,
        max_model_len=512,
        max_num_seqs=args.batch,
        block_size=args.block,
        enable_prefix_caching=True,
        additional_config=json.loads(args.worker),
    )
    sampling = {"temperature": 0.0, "max_tokens": args.tokens, "ignore_eos": True}
    print(json.dumps({"threads": torch.get_num_threads()}), flush=True)
    for line in sys.stdin:
        job = json.loads(line)
        prompts = prompts_of(args.prompts, args.words)[: job["prompts"]]
        arms = arms_of(args.arms, args.scope)
        if job["variant"] in (STOCK, CONTROL):
            arms = [Arm("plain")] * args.arms
        if not llm.reset_prefix_cache():
            raise RuntimeError("the prefix cache is in use")
        run = written if job["variant"] == WRITTEN else generated
        wall, cpu = time.perf_counter(), time.process_time()
        cached = run(llm, prompts, arms, sampling)
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        tokens = len(prompts) * len(arms) * args.tokens
        measured = {"wall": tokens / wall, "cpu": tokens / cpu, "cached": cached}
        print(json.dumps(measured), flush=True)


Round = dict[str, dict[str, float]]


def restart(number: int, config: dict[str, Any], args: argparse.Namespace) -> list[Round]:
    """Fresh processes, a warm-up, and the measured rounds."""
    kinds: list[tuple[str, dict[str, Any], str | None]] = [
        (STOCK, {}, ""),
        (CONTROL, {}, ""),
        (SWEEP, config, None),
    ]
    options = ["--model", args.model, "--scope", args.scope]
    for name in ("arms", "prompts", "words", "tokens", "batch", "block"):
        options += [f"--{name}", str(getattr(args, name))]
    options += ["--compiled"] if args.compiled else []
    workers: dict[str, Worker] = {}
    for i in range(len(kinds)):
        name, section, plugins = kinds[(number + i) % len(kinds)]
        workers[name] = Worker(__file__, [*options, "--worker", json.dumps(section)], plugins)
    workers[WRITTEN] = workers[SWEEP]

    def run(variant: str, prompts: int) -> dict[str, float]:
        return workers[variant].ask({"variant": variant, "prompts": prompts})

    for variant in VARIANTS:
        run(variant, WARM_UP)
    rounds = []
    for turn in range(args.rounds):
        at = number + turn
        order = [VARIANTS[(at + i) % len(VARIANTS)] for i in range(len(VARIANTS))]
        rounds.append({variant: run(variant, args.prompts) for variant in order})
    for worker in set(workers.values()):
        worker.close()
    return rounds


def ratios(restarts: list[list[Round]], clock: str) -> dict[str, list[float]]:
    """variant -> [lowest restart, median, highest restart] of the ratio of tokens per second."""
    result = {}
    for variant in VARIANTS[1:]:
        values = [
            statistics.median(r[variant][clock] / r[STOCK][clock] for r in rounds)
            for rounds in restarts
        ]
        figures = (min(values), statistics.median(values), max(values))
        result[f"{variant}/{STOCK}"] = [round(value, 4) for value in figures]
    return result


def cached_tokens(restarts: list[list[Round]]) -> dict[str, list[int]]:
    """variant -> the different numbers of cached prompt tokens that its runs had."""
    return {
        variant: sorted({int(r[variant]["cached"]) for rounds in restarts for r in rounds})
        for variant in VARIANTS
        if variant != WRITTEN  # its rows do not tell
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default=None, help="default: SmolLM2-135M-Instruct")
    parser.add_argument("--arms", type=int, default=8, help="plain included")
    parser.add_argument("--scope", choices=("last", "generated", "all"), default="last")
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--words", type=int, default=70, help="of a prompt")
    parser.add_argument("--tokens", type=int, default=12, help="of an answer")
    parser.add_argument("--restarts", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=1, help="after each restart")
    parser.add_argument("--batch", type=int, default=64, help="most requests in a step")
    parser.add_argument("--block", type=int, default=32, help="tokens in a block of the cache")
    parser.add_argument("--fraction", type=float, default=0.001, help="of all neurons")
    parser.add_argument("--compiled", action="store_true", help="torch.compile instead of eager")
    parser.add_argument("--record", action="store_true")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.model = resolve_model(args.model)
    if args.worker is not None:
        serve(args)
        return
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "circuit.json"
        circuit = random_circuit(args.model, args.fraction)
        circuit.save(file)
        config = {"cna": {"circuits": {"c": str(file)}}}
        restarts = []
        for number in range(args.restarts):
            restarts.append(restart(number, config, args))
            print(f"restart {number + 1} of {args.restarts}", file=sys.stderr)
    table = {clock: ratios(restarts, clock) for clock in ("wall", "cpu")}
    cached = cached_tokens(restarts)
    stock = round(statistics.median(r[STOCK]["wall"] for rounds in restarts for r in rounds), 1)
    print(f"{'ratio of tokens/s':28} {'lowest':>8} {'median':>8} {'highest':>8}")
    for clock, rows in table.items():
        for name, (low, middle, high) in rows.items():
            print(f"{name + ', ' + clock:28} {low:8.3f} {middle:8.3f} {high:8.3f}")
    print(f"tokens/s, {STOCK}: {stock:.1f}")
    for variant, counts in cached.items():
        print(f"cached prompt tokens, {variant}: {', '.join(f'{n:,}' for n in counts)}")
    row = {
        "benchmark": "sweep",
        "model": Path(args.model).name,
        "neurons": len(circuit),
        **{name: getattr(args, name) for name in ("arms", "scope", "prompts", "words", "tokens")},
        **{name: getattr(args, name) for name in ("restarts", "rounds", "batch", "block")},
        "compiled": args.compiled,
        "stock_tokens_per_second": stock,
        "cached_prompt_tokens": cached,
        "ratios": table,
        **provenance(),
    }
    if args.record:
        record("sweep", row)


if __name__ == "__main__":
    main()
