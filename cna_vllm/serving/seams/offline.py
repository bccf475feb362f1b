# SPDX-License-Identifier: Apache-2.0
"""Seam of an offline ``LLM``: what it serves, and requests given to it one by one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cna_vllm.serving.seams.gate import gate_of

if TYPE_CHECKING:
    from vllm import LLM, RequestOutput, SamplingParams

    from cna_vllm.serving.front.admission import Admission


@dataclass(frozen=True)
class Engine:
    """What a running engine serves, and how.

    Attributes:
        model: a hub id, or the path of a folder.
        dtype: of the weights, as ``float32``.
        num_layers: decoder layers.
        vocabulary: number of tokens.
        max_model_len: positions of a sequence, prompt and answer.
        max_num_seqs: requests that run at once.
        eager: nothing is compiled or captured.
        drafts: it speculates.
        chunked_prefill: a prompt may be computed in several steps.
    """

    model: str
    architecture: str
    dtype: str
    num_layers: int
    hidden_size: int
    vocabulary: int
    max_model_len: int
    max_num_seqs: int
    eager: bool
    drafts: bool
    chunked_prefill: bool


def engine_of(llm: LLM) -> Engine:
    """What ``llm`` serves."""
    config: Any = llm.llm_engine.vllm_config
    model, scheduler = config.model_config, config.scheduler_config
    return Engine(
        model=str(model.model),
        architecture=model.architectures[0],
        dtype=str(model.dtype).removeprefix("torch."),
        num_layers=model.get_total_num_hidden_layers(),
        hidden_size=model.get_hidden_size(),
        vocabulary=model.get_vocab_size(),
        max_model_len=model.max_model_len,
        max_num_seqs=scheduler.max_num_seqs,
        eager=model.enforce_eager,
        drafts=config.speculative_config is not None,
        chunked_prefill=scheduler.enable_chunked_prefill,
    )


def gate_of_llm(llm: LLM) -> Admission | None:
    """The admission gate of an offline ``LLM``; None for one that was started plain."""
    return gate_of(llm.llm_engine)


@contextmanager
def refusals() -> Iterator[None]:
    """Within, what vLLM raises for parameters or a request that it refuses is a ValueError."""
    from vllm.exceptions import VLLMClientError

    try:
        yield
    except VLLMClientError as error:
        raise ValueError(str(error)) from error


def make_final_only(params: SamplingParams) -> None:
    """The request yields nothing before it is finished."""
    from vllm.sampling_params import RequestOutputKind

    params.output_kind = RequestOutputKind.FINAL_ONLY


def verify(llm: LLM, params: SamplingParams) -> None:
    """Raises ValueError for parameters over this engine's limits."""
    config = llm.llm_engine.vllm_config
    with refusals():
        params.verify(
            config.model_config,
            config.speculative_config,
            config.structured_outputs_config,
            llm.renderer.tokenizer,
        )


class Stream:
    """The requests of one caller in an engine that has none of others."""

    def __init__(self, llm: LLM) -> None:
        """Raises RuntimeError when the engine has unfinished requests."""
        self._llm, self._engine = llm, llm.llm_engine
        self._running: dict[str, str] = {}
        if self._engine.has_unfinished_requests():
            raise RuntimeError("the engine has unfinished requests of others; wait for them first")

    def __len__(self) -> int:
        return len(self._running)

    def add(self, request_id: str, token_ids: Sequence[int], params: SamplingParams) -> None:
        """Raises ValueError when the engine refuses it."""
        from vllm import TokensPrompt

        prompt = TokensPrompt(prompt_token_ids=list(token_ids))
        (rendered,) = self._llm.renderer.render_cmpl([prompt])
        with refusals():
            self._running[request_id] = self._engine.add_request(request_id, rendered, params)

    def step(self) -> list[RequestOutput]:
        """One step of the engine; what it finished."""
        finished = [output for output in self._engine.step() if output.finished]
        for output in finished:
            del self._running[output.request_id]
        return finished

    def abort(self) -> None:
        """Ends whatever still runs."""
        self._engine.abort_request(list(self._running.values()), internal=True)
        self._running.clear()
