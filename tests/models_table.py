# SPDX-License-Identifier: Apache-2.0
"""The table of models: what steering does for every architecture of vLLM that writes text.

``make models`` examines all of them and writes ``cna_vllm/serving/models.md``; each one in a
process of its own, so that a crash is a row and not the end. ``ONLY="A B"`` examines some, and
``FROM=A`` goes on where a run was interrupted.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.engine_forks import ROOT, forks
from tests.engine_job import V1_HERE, environment

TABLE = ROOT / "cna_vllm" / "serving" / "models.md"
TIMEOUT = 180

EXACT, DISCOVERED = "exact", "discovered"
REFUSED, ABSENT, FAILED = "refused", "not buildable here", "failed"

HALF = "in bfloat16, which is all that stock vLLM runs there, against scaled columns"
_ONLY_HALF = "requires BF16"

MEANINGS: Mapping[str, str] = {
    EXACT: "arms mixed in one batch are token by token those of Hugging Face hooks that scale the "
    "input of the down projection, float32, and discovery finds the same neurons; or what the row "
    "says",
    DISCOVERED: "discovery finds the same neurons; arms cannot be compared, for the reason given",
    REFUSED: "the engine does not start with circuits, and says why",
    ABSENT: "transformers cannot build a tiny random checkpoint, or stock vLLM cannot run it on a "
    "CPU or writes another text than transformers",
}


ASKED_FOR: Mapping[str, str] = {
    "Llama 3": "LlamaForCausalLM",
    "Llama 4": "Llama4ForConditionalGeneration",
    "Qwen 2.5": "Qwen2ForCausalLM",
    "Qwen 3": "Qwen3ForCausalLM",
    "Qwen 3 MoE": "Qwen3MoeForCausalLM",
    "Qwen 3.5": "Qwen3_5ForConditionalGeneration",
    "Qwen 3 VL": "Qwen3VLForConditionalGeneration",
    "gpt-oss": "GptOssForCausalLM",
    "DeepSeek V3": "DeepseekV3ForCausalLM",
    "GLM 4.5": "Glm4MoeForCausalLM",
    "Gemma 3": "Gemma3ForConditionalGeneration",
    "Gemma 4": "Gemma4ForConditionalGeneration",
    "Mistral 7B": "MistralForCausalLM",
    "Mistral Small 3": "Mistral3ForConditionalGeneration",
    "Mixtral": "MixtralForCausalLM",
    "Phi 4": "Phi3ForCausalLM",
    "Granite 4": "GraniteMoeHybridForCausalLM",
    "Nemotron-H": "NemotronHForCausalLM",
    "OLMo 3": "Olmo3ForCausalLM",
    "InternVL 3": "InternVLForConditionalGeneration",
}
"""Twenty families that people ask for most, by the architecture of their checkpoints."""


@dataclass(frozen=True)
class Row:
    """What became of one architecture.

    detail: for what works, the modules of vLLM that own the neurons; else why it does not.
    """

    architecture: str
    outcome: str
    detail: str

    def line(self) -> str:
        return f"| `{self.architecture}` | {self.outcome} | {self.detail.replace('|', '/')} |"


def examine(architecture: str) -> Row:
    """Builds and serves a tiny checkpoint in forks of a process that has all imported."""
    with tempfile.TemporaryDirectory() as folder:
        row = _fork("serve", architecture, folder)
        if row is None:
            row = _fork("compare", architecture, folder)
        elif row.outcome == FAILED:
            plain = _fork("plain", architecture, folder)
            row = plain if plain is not None and plain.outcome == ABSENT else row
            if _ONLY_HALF in row.detail:
                row = _fork("serve_half", architecture, folder) or _fork(
                    "compare_half", architecture, folder
                )
        assert row is not None, "comparing makes a row"
        return row


def _fork(function: str, architecture: str, folder: str) -> Row | None:
    """None where the result is not a row yet."""
    result = Path(folder) / "result.json"
    if function in ("plain", "serve_half"):
        result.unlink(missing_ok=True)
    try:
        ended = forks(False).run(
            "tests.models_row:run",
            [function, architecture, folder],
            environment(TORCH_COMPILE_DISABLE="1", **V1_HERE),
            TIMEOUT,
        )
    except TimeoutError:
        return Row(architecture, FAILED, f"{function}: no end after {TIMEOUT} s")
    if ended.status != 0 or not result.exists():
        last = (ended.output.strip().splitlines() or ["no output"])[-1]
        return Row(architecture, FAILED, f"{function}: ended with {ended.status}: {last[:200]}")
    made = json.loads(result.read_text())
    return Row(**made) if "outcome" in made else None


def read(path: Path = TABLE) -> dict[str, Row]:
    """The rows of the table, by architecture; none where there is no table."""
    if not path.exists():
        return {}
    found = re.findall(r"^\| `(\w+)` \| ([^|]+) \| ([^|]*) \|$", path.read_text(), re.MULTILINE)
    return {name: Row(name, outcome, detail) for name, outcome, detail in found}


def write(rows: Mapping[str, Row], path: Path = TABLE) -> None:
    path.write_text("\n".join(_page(sorted(rows.values(), key=lambda row: row.architecture))))


def _page(rows: Sequence[Row]) -> Iterator[str]:
    from importlib.metadata import version

    import vllm

    counts = Counter(row.outcome for row in rows)
    yield "# Every model"
    yield ""
    yield (
        f"Written by `make models`: the architectures that write text of vLLM "
        f"{vllm.__version__.partition('+')[0]}, each as a tiny random checkpoint of "
        f"transformers {version('transformers')} on a CPU; of those with towers for images or "
        f"sounds, the text model alone (six families [with images](limits.md)). `make test` "
        f"examines some again."
    )
    yield ""
    for outcome, meaning in MEANINGS.items():
        yield f"- **{outcome}** ({counts[outcome]}): {meaning}."
    yield ""
    yield "| architecture | outcome | where its neurons are, or why not |"
    yield "|---|---|---|"
    yield from (row.line() for row in rows)
    yield ""


def main(arguments: Sequence[str] | None = None) -> int:
    from tests.models_zoo import architectures

    parser = argparse.ArgumentParser(prog="make models", description=__doc__)
    parser.add_argument("--only", nargs="*", default=[])
    parser.add_argument("--from", dest="start", default="")
    options = parser.parse_args(arguments)
    known = architectures()
    wanted = [name for name in options.only or known if name >= options.start]
    if unknown := sorted({*options.only} - {*known}):
        parser.error(f"not in vLLM's registry: {', '.join(unknown)}")
    rows = {name: row for name, row in read().items() if name in known}
    for name in wanted:
        rows[name] = examine(name)
        print(rows[name].line(), flush=True)
        write(rows)
    failed = [row.architecture for row in rows.values() if row.outcome == FAILED]
    if failed:
        print(f"neither exact nor refused: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main())
