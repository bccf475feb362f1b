# SPDX-License-Identifier: Apache-2.0
"""An engine in a process of its own, which generates what it is told to on standard input.

Nothing here may ask torch about CUDA: the engine's own process could not use it any more then.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from workers import Worker

GiB = 1 << 30


def start(
    options: Mapping[str, Any], environment: Mapping[str, str], plugins: str | None = None
) -> Worker:
    """``LLM(**options)``; its hello has the seconds of the start and, with circuits, the status.

    It has a cache of its own: others that start would write what it compiles at the same time.
    """
    cache = tempfile.mkdtemp(prefix="vllm-cache-")
    own = {"VLLM_CACHE_ROOT": cache, "VLLM_LOGGING_LEVEL": "WARNING"}
    return Worker("-m", ["gpu.engine", json.dumps(options)], plugins, {**own, **environment})


def start_all(
    engines: Mapping[str, tuple[Mapping[str, Any], Mapping[str, str], str | None]],
) -> dict[str, Future[Worker]]:
    """Several at once, since a start is minutes of one core; each may fail by itself."""
    with ThreadPoolExecutor(len(engines)) as pool:
        return {name: pool.submit(start, *how) for name, how in engines.items()}


def on(device: str, **gpu: Any) -> tuple[dict[str, Any], dict[str, str]]:
    """Engine options and environment of a device: the engine core is a process of its own on a
    GPU, as users have it; ``gpu`` are options for that device only."""
    if device == "cpu":
        return {"enforce_eager": True, "dtype": "float32"}, {}
    return gpu, {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"}


def main() -> None:
    options = json.loads(sys.argv[1])
    if os.environ.get("TRITON_INTERPRET") == "1":
        from tests.engine_job import stand_in_driver

        stand_in_driver()
    from vllm import LLM, SamplingParams, TokensPrompt

    from cna_vllm.serving.control import status

    begin = time.perf_counter()
    llm = LLM(**options)
    seconds = time.perf_counter() - begin
    steered = "additional_config" in options
    hello = {"seconds": seconds, "status": status(llm)[0] if steered else None}
    print(json.dumps(hello), flush=True)

    def generate(requests: Sequence[Mapping[str, Any]], outputs: bool) -> dict[str, Any]:
        prompts = [TokensPrompt(prompt_token_ids=request["prompt"]) for request in requests]
        params = [SamplingParams(temperature=0.0, **request["params"]) for request in requests]
        begin = time.perf_counter()
        done = llm.generate(prompts, params, use_tqdm=False)
        answer: dict[str, Any] = {"seconds": time.perf_counter() - begin}
        if outputs:
            answer["outputs"] = [
                {
                    "token_ids": [list(one.token_ids) for one in output.outputs],
                    "cached": output.num_cached_tokens or 0,
                }
                for output in done
            ]
        return answer

    for job in sys.stdin:
        print(json.dumps(generate(**json.loads(job))), flush=True)
    os._exit(0)


if __name__ == "__main__":
    main()
