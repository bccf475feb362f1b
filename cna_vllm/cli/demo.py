# SPDX-License-Identifier: Apache-2.0
"""`cna-vllm demo`: discover a circuit, switch it off and up, and check that nothing else moved.

The behaviour is harmless and visible: answering in French when asked to. Requests at three
multipliers and unrelated plain requests share one batch of one engine.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from importlib import resources
from itertools import zip_longest
from typing import TYPE_CHECKING

from cna_vllm.checkpoints.models import DEFAULT_MODEL
from cna_vllm.cli.options import OptionParser
from cna_vllm.cli.usage import UsageError, say
from cna_vllm.reading.profile import strongest
from cna_vllm.reading.report import neurons_text, profile_text, readings_text
from cna_vllm.serving.doctor import Check
from cna_vllm.serving.seams.offline import engine_of
from cna_vllm.text.prompts import Prompt, read_prompts

if TYPE_CHECKING:
    from vllm import LLM, CompletionOutput

    from cna_vllm.steering.circuit import Circuit

    Group = Sequence[CompletionOutput]
    Replies = Mapping[float, Group]

_DESCRIPTION = """\
Discover the circuit for answering in French in a small real model, switch it off and turn it up
for single requests of one batch, and check that the other requests of that batch did not move."""
_NAME = "french"
_MULTIPLIERS = (1.0, 0.0, 2.0)
_TITLES = {1.0: "m = 1 (plain)", 0.0: "m = 0 (off)", 2.0: "m = 2 (up)"}
_MAX_TOKENS = 32
_SHOWN = 4
_COLUMN = 30
_CHART_ROWS = 10
_STRONGEST = 6


def run(argv: list[str]) -> int:
    parser = OptionParser("demo", _DESCRIPTION, model="[MODEL]")
    _, rest = parser.split(argv)
    try:
        import py3langid  # noqa: F401
    except ImportError as error:
        raise UsageError("the demo needs py3langid: pip install 'cna-vllm[demo]'") from error

    from cna_vllm.cli.engine_args import start_engine

    llm = start_engine(
        "demo",
        rest,
        {"record": True, "max_circuits": 8},
        default_model=DEFAULT_MODEL,
        cpu_defaults={"dtype": "float32", "kv_cache_memory_bytes": 2**30},
    )

    from cna_vllm.discovery import discover
    from cna_vllm.serving.control import load_circuit

    say("recording 12 French and 12 English requests")
    circuit = discover(llm, packaged("positive"), packaged("negative"))
    load_circuit(llm, _NAME, circuit)
    print(f"{circuit.summary()}\n\n{profile_text(circuit, _CHART_ROWS)}")
    print(f"\n{_promoted(llm, circuit)}")

    heldout, plain = packaged("heldout"), packaged("plain")
    say(f"one batch: {len(heldout)} held-out requests x 3 multipliers + {len(plain)} plain ones")
    jobs = [(prompt, m) for m in _MULTIPLIERS for prompt in heldout]
    mixed = _generate(llm, jobs + [(prompt, None) for prompt in plain])
    say("the plain requests alone")
    alone = _generate(llm, [(prompt, None) for prompt in plain])

    replies = {
        m: mixed[i * len(heldout) : (i + 1) * len(heldout)] for i, m in enumerate(_MULTIPLIERS)
    }
    print(f"\n{_table(heldout[:_SHOWN], replies)}")
    checks = _checks(replies, mixed[len(jobs) :], alone)
    for check in checks:
        print(check)
    return 0 if all(check.holds for check in checks) else 1


def packaged(name: str) -> list[Prompt]:
    """The demo's prompts: `positive`, `negative`, `heldout` or `plain`."""
    with resources.as_file(resources.files("cna_vllm") / "data" / "french" / f"{name}.txt") as path:
        return read_prompts(path)


def _promoted(llm: LLM, circuit: Circuit) -> str:
    """The strongest neurons and, where the checkpoint can be read, the tokens they promote."""
    from cna_vllm.checkpoints.checkpoint import CheckpointError, open_checkpoint
    from cna_vllm.reading.vocabulary import read_neurons

    neurons = strongest(circuit, _STRONGEST)
    try:
        checkpoint = open_checkpoint(engine_of(llm).model)
        readings = read_neurons(checkpoint, llm.get_tokenizer(), neurons)
    except CheckpointError as error:
        return f"{neurons_text(neurons)}\npromoted tokens not shown: {error}"
    return readings_text(readings, suppresses=False)


def _generate(llm: LLM, jobs: Sequence[tuple[Prompt, float | None]]) -> list[CompletionOutput]:
    from vllm import SamplingParams, TokensPrompt

    from cna_vllm.steering.request import steer
    from cna_vllm.text.prompts import render

    tokenizer = llm.get_tokenizer()
    inputs = [TokensPrompt(prompt_token_ids=render(tokenizer, prompt)) for prompt, _ in jobs]
    params = [
        SamplingParams(
            max_tokens=_MAX_TOKENS,
            temperature=0.0,
            extra_args=None if multiplier is None else steer(_NAME, multiplier),
        )
        for _, multiplier in jobs
    ]
    return [request.outputs[0] for request in llm.generate(inputs, params)]


def _checks(
    replies: Replies,
    mixed: Sequence[CompletionOutput],
    alone: Sequence[CompletionOutput],
) -> list[Check]:
    import py3langid

    checks = []
    for m, low, high in ((1.0, 0.6, 1.0), (0.0, 0.0, 0.1), (2.0, 0.9, 1.0)):
        answers = replies[m]
        french = sum(py3langid.classify(answer.text)[0] == "fr" for answer in answers)
        bound = f"at least {low:.0%}" if low else f"at most {high:.0%}"
        claim = f"m = {m:g} answers in French, {bound}"
        holds = low <= french / len(answers) <= high
        checks.append(Check(claim, f"{french} of {len(answers)}", holds))
    equal = sum([*a.token_ids] == [*b.token_ids] for a, b in zip(mixed, alone, strict=True))
    claim = "plain requests in the same batch unchanged, all, token by token"
    return [*checks, Check(claim, f"{equal} of {len(alone)}", equal == len(alone))]


def _table(prompts: Sequence[Prompt], replies: Replies) -> str:
    lines = ["  ".join(f"{_TITLES[m]:{_COLUMN}}" for m in _MULTIPLIERS).rstrip()]
    for index, prompt in enumerate(prompts):
        lines.append(f"--- {prompt.text}")
        columns = [
            textwrap.wrap(textwrap.shorten(replies[m][index].text, 3 * _COLUMN), _COLUMN)
            for m in _MULTIPLIERS
        ]
        for row in zip_longest(*columns, fillvalue=""):
            lines.append("  ".join(f"{cell:{_COLUMN}}" for cell in row).rstrip())
    return "\n".join(lines) + "\n"
