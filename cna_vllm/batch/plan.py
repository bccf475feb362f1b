# SPDX-License-Identifier: Apache-2.0
"""The rows of a batch in the order of its output: prompts, their samples, and arms innermost.

Arms of one prompt are neighbours, so that an engine which takes rows in order computes the
prefix that they share once.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cna_vllm.batch.reading import BatchPrompt
from cna_vllm.steering.arms import Arm
from cna_vllm.steering.content import is_int, show
from cna_vllm.text.prompts import Prompt, PromptError, PromptLike, prompts_of

GREEDY_BELOW = 1e-5  # vLLM's own limit
MAX_SEED = 2**63 - 1


@dataclass(frozen=True)
class Request:
    """One row to be answered.

    Attributes:
        index: of the prompt in its file.
        sampling: keyword arguments of `vllm.SamplingParams`, JSON types; one answer a request.
        raw: tokenize the text as it is, without the chat template.
        sample: number of the answer, from 0, where a prompt gets several of each arm.
    """

    index: int
    arm: Arm
    prompt: Prompt
    sampling: Mapping[str, Any]
    raw: bool = False
    sample: int | None = None

    @property
    def source(self) -> str:
        """Where the prompt comes from, for messages."""
        return source_of(self.prompt, self.index)

    def to_dict(self) -> dict[str, Any]:
        """The columns of an output row that are known before it is answered."""
        row = {"index": self.index, **self.prompt.to_dict(), **self.arm.to_dict()}
        if self.sample is not None:
            row["sample"] = self.sample
        if "seed" in self.sampling:
            row["seed"] = self.sampling["seed"]
        return row


def plan(
    prompts: Sequence[PromptLike],
    arms: Sequence[Arm],
    sampling: Mapping[str, Any],
    *,
    samples: int = 1,
    raw: bool = False,
) -> list[Request]:
    """Every prompt in every arm, `samples` times.

    A prompt's own arm stands in place of `arms`, its own sampling fields in place of the run's;
    `n` in either is a number of samples. What is sampled gets a seed that depends on the run's
    `seed` (default 0), the prompt's place and the sample's number only: pairs across arms, and
    independent otherwise. A prompt's own seed is taken as it is, plus the sample's number. What
    is greedy gets none.

    Raises:
        PromptError: no arm, several samples of a greedy row, or a malformed `n` or `seed`.
    """
    requests = []
    for index, prompt in enumerate(prompts_of(prompts)):
        own = prompt if isinstance(prompt, BatchPrompt) else None
        chosen = [own.arm] if own and own.arm else arms
        if not chosen:
            raise PromptError(f"{source_of(prompt, index)}: no arm to answer it in")
        fields = {**sampling, **(own.sampling if own else {})}
        try:
            variants = _samples(fields, index, samples, own)
        except PromptError as error:
            raise PromptError(f"{source_of(prompt, index)}: {error}") from error
        requests += [
            Request(index, arm, prompt, variant, raw or bool(own and own.raw), number)
            for number, variant in variants
            for arm in chosen
        ]
    return requests


def digests(requests: Iterable[Request]) -> dict[str, Any]:
    """What the rows of a `plan` are: their number, and a SHA-256 each of four parts of them.

    A prompt's rows are all of its arms with all of its samplings, so each of these is taken once a
    prompt; arms and samplings only where they are not those of the prompt before. Thus a run with
    an arm more differs in its arms and its number of rows, and in nothing else.
    """
    hashes = {part: hashlib.sha256() for part in ("prompts", "arms", "sampling", "seeds")}
    before: dict[str, list[str]] = {}
    count = 0
    for index, group in itertools.groupby(requests, key=lambda request: request.index):
        rows = list(group)
        count += len(rows)
        parts: dict[str, list[Any]] = {
            "prompts": [[row.raw, row.prompt.to_dict()] for row in rows],
            "arms": [row.arm.to_dict() for row in rows],
            "sampling": [
                [row.sample, {k: v for k, v in row.sampling.items() if k != "seed"}] for row in rows
            ],
            "seeds": [row.sampling.get("seed") for row in rows],
        }
        for part, values in parts.items():
            texts = list(dict.fromkeys(json.dumps(value, sort_keys=True) for value in values))
            if before.get(part) != texts:
                hashes[part].update("\n".join([str(index), *texts, ""]).encode("ascii"))
            before[part] = texts
    return {"rows": count} | {part: whole.hexdigest() for part, whole in hashes.items()}


def source_of(prompt: Prompt, index: int) -> str:
    """`FILE:LINE` of a prompt, or its number."""
    return (isinstance(prompt, BatchPrompt) and prompt.source) or f"prompt {index}"


def _samples(
    fields: dict[str, Any], index: int, samples: int, own: BatchPrompt | None
) -> list[tuple[int | None, dict[str, Any]]]:
    count, base = fields.pop("n", samples), fields.pop("seed", 0)
    if not is_int(count) or count < 1:
        raise PromptError(f"n: must be a whole number of at least 1, not {show(count)}")
    if not is_int(base) or not 0 <= base <= MAX_SEED - count:
        raise PromptError(f"seed: must be a whole number from 0 to 2**63 - 1, not {show(base)}")
    temperature = fields.get("temperature", 1.0)
    if isinstance(temperature, int | float) and temperature < GREEDY_BELOW:
        if count > 1:
            raise PromptError(
                f"n: {count} samples of a greedy row would all be alike; set a temperature above 0"
            )
        return [(None, fields)]
    as_it_is = own is not None and "seed" in own.sampling
    return [
        (
            number if count > 1 else None,
            {**fields, "seed": base + number if as_it_is else _seed(base, index, number)},
        )
        for number in range(count)
    ]


def _seed(base: int, index: int, sample: int) -> int:
    """48 bits, which every reader of JSON keeps exactly."""
    whole = hashlib.sha256(f"{base}:{index}:{sample}".encode("ascii")).digest()
    return int.from_bytes(whole[:6], "big")
