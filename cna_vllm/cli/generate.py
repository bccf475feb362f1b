# SPDX-License-Identifier: Apache-2.0
"""`cna-vllm generate`: every prompt under every circuit and multiplier, in one engine pass."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cna_vllm.cli.options import OptionParser, check_output, load_circuits, positive_int
from cna_vllm.files import write_atomic
from cna_vllm.prompts import Prompt, read_prompts
from cna_vllm.rendering import render
from cna_vllm.request import DEFAULT_SCOPE, SCOPES, steer

if TYPE_CHECKING:
    from vllm import LLM, RequestOutput


@dataclass(frozen=True)
class Arm:
    """One setting under which every prompt is answered; a multiplier of 1 is the plain model."""

    circuit: str
    multiplier: float
    scope: str

    def extra_args(self) -> dict[str, Any]:
        return steer(self.circuit, self.multiplier, scope=self.scope)


def run(argv: list[str]) -> int:
    options, rest = _parser().split(argv)
    check_output(options.output, options.overwrite)
    circuits = load_circuits(options.circuit)
    multipliers = dict.fromkeys(options.multiplier)
    arms = [Arm(name, m, options.scope) for name in circuits for m in multipliers]
    for arm in arms:
        arm.extra_args()  # refuses what no engine would take, before one starts
    prompts = read_prompts(options.input, column=options.column)

    from cna_vllm.cli.engine_args import start_engine

    files = {name: str(path) for name, (path, _) in circuits.items()}
    llm = start_engine("generate", rest, {"circuits": files})
    outputs = answer(
        llm,
        prompts,
        arms,
        max_tokens=options.max_tokens,
        temperature=options.temperature,
        raw=options.raw,
    )
    write_atomic(options.output, _rows(prompts, arms, outputs))
    print(f"{len(outputs)} rows in {options.output}", file=sys.stderr)
    return 0


def answer(
    llm: LLM,
    prompts: Sequence[Prompt],
    arms: Sequence[Arm],
    *,
    max_tokens: int,
    temperature: float = 0.0,
    raw: bool = False,
) -> list[RequestOutput]:
    """One pass over prompts x arms, arms innermost, so that arms share their prompts' prefixes."""
    from vllm import SamplingParams, TokensPrompt

    tokenizer = llm.get_tokenizer()
    seed = llm.llm_engine.model_config.seed if temperature > 0 else None
    params = [
        SamplingParams(
            max_tokens=max_tokens, temperature=temperature, seed=seed, extra_args=arm.extra_args()
        )
        for arm in arms
    ]
    inputs = [TokensPrompt(prompt_token_ids=render(tokenizer, p, raw=raw)) for p in prompts]
    outputs: list[RequestOutput] = llm.generate(
        [i for i in inputs for _ in arms], params * len(inputs)
    )
    return outputs


def _rows(
    prompts: Sequence[Prompt], arms: Sequence[Arm], outputs: Sequence[RequestOutput]
) -> Iterator[str]:
    cells = ((index, prompt, arm) for index, prompt in enumerate(prompts) for arm in arms)
    for (index, prompt, arm), output in zip(cells, outputs, strict=True):
        completion = output.outputs[0]
        row = {
            "index": index,
            **prompt.to_dict(),
            "circuit": arm.circuit,
            "multiplier": arm.multiplier,
            "scope": arm.scope,
            "text": completion.text,
            "token_ids": list(completion.token_ids),
            "finish_reason": completion.finish_reason,
        }
        yield json.dumps(row, ensure_ascii=False) + "\n"


def _parser() -> OptionParser:
    parser = OptionParser(
        "generate", "Answer every prompt under every circuit and multiplier.", model="MODEL"
    )
    parser.add_argument(
        "--circuit", action="append", required=True, metavar="NAME=C.json", help="may be repeated"
    )
    parser.add_argument(
        "--multiplier",
        nargs="+",
        type=float,
        required=True,
        metavar="M",
        help="0 ablates, 1 is the plain model, above 1 amplifies",
    )
    parser.add_argument(
        "--scope",
        choices=SCOPES,
        default=DEFAULT_SCOPE,
        help="steered positions: from the last prompt token on, all, or generated ones only "
        f"(default: {DEFAULT_SCOPE})",
    )
    parser.add_argument("--input", required=True, metavar="FILE", help=".txt, .jsonl or .csv")
    parser.add_argument("--column", help="column of a .csv file (default: prompt)")
    parser.add_argument("--output", required=True, metavar="OUT.jsonl")
    parser.add_argument("--overwrite", action="store_true", help="replace OUT.jsonl")
    parser.add_argument("--max-tokens", type=positive_int, default=128, metavar="N")
    parser.add_argument("--temperature", type=_temperature, default=0.0, metavar="T")
    parser.add_argument("--raw", action="store_true", help="do not apply the chat template")
    return parser


def _temperature(text: str) -> float:
    try:
        if 0 <= (value := float(text)) < float("inf"):
            return value
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"{text!r} is not a finite number of at least 0")
