# SPDX-License-Identifier: Apache-2.0
"""A client of an engine core that is no front end of ours: it admits nothing.

Requests go to the core as they are written, through vLLM's own client and its msgpack, as those of
a front end in another language do.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.engine_forks import forks
from tests.engine_job import V1, environment


def answers(
    engine: Mapping[str, Any], requests: Sequence[Mapping[str, Any]], more: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """What a core of its own process answers to ``requests``, sent one after another.

    requests: {"prompt": ids, "extra_args": ..., "admit": fields}; the last, if there, are admitted
    and sealed as a front end does. more: other parameters of sampling.
    Returns {"token_ids", "error"} each; "error" is what the core says of a refused request.
    """
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        ended = forks(False).run(
            "tests.core_client:run",
            [dict(engine), list(requests), dict(more), str(result)],
            environment(**V1),
            600,
        )
        assert ended.status == 0, ended.output[-8000:]
        found: list[dict[str, Any]] = json.loads(result.read_text())
        return found


def run(
    engine: Mapping[str, Any],
    requests: Sequence[Mapping[str, Any]],
    more: Mapping[str, Any],
    result: str,
) -> None:
    from vllm import LLM, SamplingParams
    from vllm.v1.engine import EngineCoreRequest, FinishReason

    llm = LLM(**engine)
    client = llm.llm_engine.engine_core
    found = []
    for number, request in enumerate(requests):
        extra_args = request.get("extra_args")
        if "admit" in request:
            gate = llm.llm_engine.input_processor.cna_admission
            extra_args = {**gate.admit(request["admit"]), **(extra_args or {})}
        client.add_request(
            EngineCoreRequest(
                request_id=f"r{number}",
                prompt_token_ids=list(request["prompt"]),
                mm_features=None,
                sampling_params=SamplingParams(temperature=0.0, extra_args=extra_args, **more),
                pooling_params=None,
                arrival_time=time.time(),
                lora_request=None,
                cache_salt=None,
                data_parallel_rank=None,
            )
        )
        tokens: list[int] = []
        finished = None
        while finished is None:
            for output in client.get_output().outputs:
                tokens += output.new_token_ids
                finished = output.finish_reason
                said = getattr(output, "error", None)
                error = output.stop_reason if said is None else said.message
        found.append(
            {"token_ids": tokens, "error": error if finished == FinishReason.ERROR else None}
        )
    Path(result).write_text(json.dumps(found))
