# SPDX-License-Identifier: Apache-2.0
"""Answers the rows of a batch in one engine, and writes each of them as soon as it is finished.

The engine's own queue is kept a little longer than what it can run at once: it is never idle, it
always sees the arms of a prompt together, and memory does not grow with the batch.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cna_vllm.batch.partial import BatchError, PartialFile, partial_path
from cna_vllm.batch.plan import Request, digests
from cna_vllm.batch.sampling import check_requests, check_seeds, one_line, sampling_params
from cna_vllm.serving.seams.offline import Stream, engine_of
from cna_vllm.text.prompts import PromptError, render

if TYPE_CHECKING:
    from vllm import LLM, RequestOutput

QUEUED_PER_SLOT = 2  # requests in the engine for each that it can run at once
_ANSWERED = ("stop", "length", "repetition")


def run_batch(
    llm: LLM,
    rows: Sequence[Request],
    path: Path,
    *,
    identity: Mapping[str, Any],
    progress: bool = True,
) -> None:
    """Answers what is not yet there, then writes all rows to `path`, in the order of the plan.

    While it runs, finished rows are in `path` + `.partial`, one JSON line each. Called again with
    equal rows and an equal identity, after whatever ended the first call, it goes on from there.
    Answers are then those of an uninterrupted run, as far as the engine's do not depend on which
    requests share a step. A `path` that is there is replaced at the end.

    Args:
        llm: any offline engine with nothing else to do.
        identity: what else the answers depend on (model, circuits' digests, versions); JSON types.
        progress: show a bar on stderr, with tokens/s and the time left.

    Raises:
        PromptError: a prompt that cannot be rendered or is too long, or sampling that the engine
            refuses; told before anything is generated.
        BatchError: the partial file is of another run or in use, or the engine failed a request.
        KeyboardInterrupt: with a message on how to go on.
        OSError: the folder cannot be written.
    """
    with PartialFile(path, {**identity, **digests(rows)}, len(rows)) as partial:
        todo = [position for position in range(len(rows)) if position not in partial.done]
        if partial.dropped:
            print(f"{partial.path}: dropped a torn end of {partial.dropped} bytes", file=sys.stderr)
        if todo:
            try:
                _answer(llm, rows, todo, partial, progress)
            except KeyboardInterrupt:
                raise KeyboardInterrupt(
                    f"{len(partial.done)} of {len(rows)} rows are kept in {partial.path}; "
                    "run the same command again to go on"
                ) from None
        partial.finish()


def rows_done(rows: Sequence[Request], path: Path, identity: Mapping[str, Any]) -> int:
    """How many rows an earlier `run_batch` of the same run left; raises BatchError if the partial
    file is of another run, or in use."""
    if not partial_path(path).exists():
        return 0
    with PartialFile(path, {**identity, **digests(rows)}, len(rows)) as partial:
        return len(partial.done)


def _answer(
    llm: LLM, rows: Sequence[Request], todo: Sequence[int], partial: PartialFile, progress: bool
) -> None:
    from tqdm import tqdm

    wanted = [rows[position] for position in todo]
    check_requests(wanted, llm)
    check_seeds(wanted, llm)
    prompts = _rendered(llm, wanted)
    tokens = 0
    shown = tqdm(
        total=len(rows),
        initial=len(rows) - len(todo),
        unit="row",
        dynamic_ncols=True,
        disable=not progress,
        file=sys.stderr,
    )
    finished = _finished(llm, ((p, rows[p]) for p in todo), prompts)
    with shown as bar, closing(finished) as outputs:
        for position, output in outputs:
            answer = _answered(rows[position], output)
            partial.append(position, answer)
            tokens += len(answer["token_ids"])
            if progress and (elapsed := bar.format_dict["elapsed"]) > 0:
                bar.set_postfix_str(f"{tokens / elapsed:.0f} tokens/s", refresh=False)
            bar.update()


def _rendered(llm: LLM, requests: Iterable[Request]) -> dict[tuple[int, bool], list[int]]:
    """Token ids of prompts, each rendered and checked once, by identity and whether it is raw."""
    tokenizer, limit = llm.get_tokenizer(), engine_of(llm).max_model_len
    found: dict[tuple[int, bool], list[int]] = {}
    for request in requests:
        key = id(request.prompt), request.raw
        if key in found:
            continue
        try:
            found[key] = ids = render(tokenizer, request.prompt, raw=request.raw)
        except ValueError as error:
            raise PromptError(f"{request.source}: {one_line(error)}") from error
        if not 0 < len(ids) < limit:
            raise PromptError(
                f"{request.source}: the prompt has {len(ids)} tokens; the engine takes 1 to "
                f"{limit - 1} (--max-model-len is {limit})"
            )
    return found


def _finished(
    llm: LLM,
    requests: Iterator[tuple[int, Request]],
    prompts: Mapping[tuple[int, bool], list[int]],
) -> Generator[tuple[int, RequestOutput], None, None]:
    """Plan positions and outputs, in the order in which the engine finishes them."""
    try:
        stream = Stream(llm)
    except RuntimeError as error:
        raise BatchError(str(error)) from error
    slots = QUEUED_PER_SLOT * engine_of(llm).max_num_seqs
    try:
        while True:
            for position, request in islice(requests, slots - len(stream)):
                try:
                    params = sampling_params(request.sampling, request.arm)
                    ids = prompts[id(request.prompt), request.raw]
                    stream.add(str(position), ids, params)
                except ValueError as error:
                    raise BatchError(f"{request.source}: {one_line(error)}") from error
            if not len(stream):
                return
            for output in stream.step():
                yield int(output.request_id), output
    except (ValueError, OSError, GeneratorExit):  # the engine itself is well: leave it idle
        stream.abort()
        raise


def _answered(request: Request, output: RequestOutput) -> dict[str, Any]:
    (completion,) = output.outputs
    if completion.finish_reason not in _ANSWERED:
        why = completion.stop_reason or "its log says why"
        raise BatchError(
            f"{request.source}: the engine ended arm {request.arm.name!r} with "
            f"{completion.finish_reason!r}: {why}"
        )
    row = {
        **request.to_dict(),
        "text": completion.text,
        "token_ids": list(completion.token_ids),
        "finish_reason": completion.finish_reason,
    }
    if completion.logprobs is not None:
        row["logprobs"] = [_logprobs(step) for step in completion.logprobs]
    if output.prompt_logprobs is not None:
        row["prompt_logprobs"] = [_logprobs(step) for step in output.prompt_logprobs]
    return row


def _logprobs(step: Mapping[int, Any] | None) -> dict[str, float | None] | None:
    """Token id -> log probability; JSON has no infinities, so those are null."""
    if step is None:
        return None
    values = ((str(token), value.logprob) for token, value in step.items())
    return {token: value if math.isfinite(value) else None for token, value in values}
