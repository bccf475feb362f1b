# SPDX-License-Identifier: Apache-2.0
"""Every command line of the pages is one that our parsers take, on files that are there by then."""

from __future__ import annotations

import importlib
import re
import shlex
from pathlib import Path

import pytest

from cna_vllm.cli import ab_options, serve
from cna_vllm.cli.engine_args import parse_engine_args
from cna_vllm.cli.options import OptionParser
from tests.pages import PAGES, ROOT, blocks

WRITES = {"--out", "--output", "--plot", "--control", "--save", "--registry-dir"}
ROOTS = ("cna_vllm", "benchmarks", "tests")
FILE = re.compile(r"\.(json|jsonl|txt|csv|yaml|safetensors)$")


def commands(page: str) -> list[list[str]]:
    """The simple commands of a page's shell blocks, word by word, variables filled in."""
    found: list[list[str]] = []
    for block in blocks("", "sh"):
        if block.page != page or not re.search(r"^(cna-vllm|[A-Z]=)", block.text, re.MULTILINE):
            continue
        variables: dict[str, str] = {}
        for line in block.text.replace("\\\n", " ").split("\n"):
            if assigned := re.fullmatch(r"([A-Z]+)=(\S+)", line):
                variables[assigned[1]] = assigned[2]
                continue
            filled = re.sub(r"\$([A-Z])\b", "{\\1}", line) if variables else line
            for name, value in variables.items():
                filled = filled.replace(f"{{{name}}}", value)
            if filled.startswith(("cna-vllm ", "mkdir ", "cp ", "python -c")):
                found.append(shlex.split(filled))
    return found


def parse(words: list[str]) -> None:
    command, argv = words[1], words[2:]
    if command == "serve":
        _, rest = serve._parser().split(argv)
        serve.server_args(rest)
    elif command in ("generate", "discover", "eval", "ab"):
        module = importlib.import_module(f"cna_vllm.cli.{command}")
        parser = ab_options.parser() if command == "ab" else module._parser()
        _, rest = parser.split(argv)
        if rest:  # nothing for `ab --from`
            parse_engine_args(command, rest)
    elif command == "inspect":
        importlib.import_module("cna_vllm.cli.inspect")._parser().parse_args(argv)
    else:
        assert command == "doctor"
        parser = OptionParser("doctor", "", model="MODEL")
        parse_engine_args("doctor", parser.split(argv)[1])


@pytest.mark.parametrize("page", [p for p in PAGES if commands(p)])
def test_command_lines(page: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cna_vllm.cli.engine_args.resolve_model", str)
    monkeypatch.setattr("cna_vllm.cli.serve.resolve_model", str)
    # The serving page goes on from the README's first command, and says so.
    there = {"french.json"} if page == "cna_vllm/serving/README.md" else set()
    lines = commands(page)
    assert len(lines) >= 3
    for words in lines:
        if words[0] == "cna-vllm":
            parse(words)
        for before, word in zip(["", *words], words, strict=False):
            path = re.sub(r"^[\w-]+=", "", re.sub(r":\w+$", "", word))
            if words[0] in ("mkdir", "cp") or before in WRITES:
                there.add(path)
            elif words[0] == "python":
                there.update(re.findall(r"Path\('([\w/]+)'\)", word))
            elif FILE.search(path) and "{" not in path:
                made = path in there or any(path.startswith(f"{folder}/") for folder in there)
                assert made or (ROOT / path).exists(), f"{page}: {path} is not there by then"


def test_models_are_hub_ids_or_ours() -> None:
    """A bare name such as Qwen2.5-Coder-0.5B-Instruct is neither on a hub nor a folder."""
    for page in PAGES:
        for words in commands(page):
            if words[0] == "cna-vllm" and words[1] not in ("inspect", "compare"):
                model = words[2]
                assert model == "smollm2" or "/" in model or Path(model).exists(), words


def test_the_file_of_flags(tmp_path: Path) -> None:
    """The serving page's example of `--config`."""
    (block,) = (b for b in blocks("yaml") if b.text.startswith("circuit:"))
    (tmp_path / "c.yaml").write_text(block.text)
    options, rest = serve._parser().split(["m", f"--config={tmp_path / 'c.yaml'}"])
    assert options.circuit == ["french=french.json"] and options.max_multiplier == 10
    assert options.adapter == ["french-off=french@0", "french-more=french@2:all"]
    args = serve.server_args(rest)
    assert (args.max_model_len, args.dtype) == (512, "float32")
    assert args.additional_config == {"cna": {"circuits": {"other": "other.json"}}}


def test_pages_are_read_in_minutes() -> None:
    """A short front page, no crowded table cell, and no link to a file that is not there."""
    assert len((ROOT / "README.md").read_text("utf-8").split("\n")) < 150
    pages = [ROOT / "README.md", *(p for d in ROOTS for p in (ROOT / d).rglob("*.md"))]
    assert {ROOT / page for page in PAGES} <= set(pages)
    for page in pages:
        text = page.read_text("utf-8")
        for line in text.split("\n"):
            if line.startswith("|") and page.name != "models.md":  # its cells quote messages
                assert max(len(cell.split()) for cell in line.split("|")) <= 25, (page, line)
        for target in re.findall(r"\]\(([^)#]+)", text):
            assert target.startswith("https://") or (page.parent / target).exists(), (page, target)
