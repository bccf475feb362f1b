# SPDX-License-Identifier: Apache-2.0
"""Host time of the prefix-cache keys of one long prompt, as vLLM's core makes them.

    python benchmarks/block_keys.py [--tokens 131072] [--block-size 16] [--rounds 40] [--record]

Needs no model. Cases: ``stock``, vLLM without the seam; ``plain``, with it, a request that is not
steered; ``last``, ``all`` and ``generated``, one that is, in that scope (of ``all`` every block has
a key of ours, which vLLM then hashes; of the others the last one or none). Interleaved; what a case
adds is the median over rounds of its difference to ``stock`` in the same round, in microseconds a
block, with quartiles. With --record a JSON row is appended to benchmarks/results/block_keys.jsonl.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

from provenance import provenance, record
from vllm import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core import kv_cache_utils
from vllm.v1.request import Request

from cna_vllm.serving.seams import engine_core
from cna_vllm.steering.request import RESOLVED_FIELD, SCOPES
from cna_vllm.steering.resolved import Steering

STOCK, PLAIN = "stock", "plain"
SEAM = "_gen_prompt_embeds_extra_hash_keys"


def request(tokens: int, scope: str) -> Request:
    """A new request; steered where ``scope`` is one."""
    params = SamplingParams(max_tokens=1)
    if scope in SCOPES:
        steering = Steering((("0" * 64, 0.5),), scope)
        params.extra_args = {RESOLVED_FIELD: steering.to_field()}
    return Request("r", [i % 50_000 for i in range(tokens)], params, None)


def measure(tokens: int, block_size: int, rounds: int) -> dict[str, list[float]]:
    """Microseconds a block, of each case in every round."""
    kv_cache_utils.init_none_hash(sha256)
    hasher = kv_cache_utils.get_request_block_hasher(block_size, sha256)
    original = getattr(kv_cache_utils, SEAM)
    engine_core.install()
    steered = getattr(kv_cache_utils, SEAM)
    taken: dict[str, list[float]] = {case: [] for case in (STOCK, PLAIN, *SCOPES)}
    cases = list(taken)
    for number in range(-2, rounds):
        for case in cases[number % len(cases) :] + cases[: number % len(cases)]:
            one = request(tokens, case)
            setattr(kv_cache_utils, SEAM, original if case == STOCK else steered)
            started = time.perf_counter()
            blocks = hasher(one)
            elapsed = (time.perf_counter() - started) * 1e6
            if number >= 0:
                taken[case].append(elapsed / len(blocks))
    return taken


def main() -> None:
    parser = argparse.ArgumentParser(description="Time the keys of a prompt's blocks.")
    parser.add_argument("--tokens", type=int, default=131_072)
    parser.add_argument("--block-size", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--record", action="store_true")
    options = parser.parse_args()
    taken = measure(options.tokens, options.block_size, options.rounds)
    cells: dict[str, Any] = {STOCK: {"us": statistics.median(taken[STOCK])}}
    print(f"{options.tokens} tokens in blocks of {options.block_size}")
    print(f"{STOCK}: {cells[STOCK]['us']:.2f} us a block")
    for case in (PLAIN, *SCOPES):
        added = [a - b for a, b in zip(taken[case], taken[STOCK], strict=True)]
        low, median, high = statistics.quantiles(added, n=4)
        cells[case] = {"added_us": median, "quartiles": [low, high]}
        print(f"{case}: {median:+.3f} us a block ({low:+.3f}, {high:+.3f})")
    if options.record:
        row = {"tokens": options.tokens, "block_size": options.block_size, "rounds": options.rounds}
        record("block_keys", {**provenance(), **row, "cases": cells})


if __name__ == "__main__":
    main()
