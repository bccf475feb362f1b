# SPDX-License-Identifier: Apache-2.0
"""Parsing a command's own options, apart from vLLM's engine flags.

A command's options are parsed first and without vLLM, so that help is instant and every mistake
in them, or in the files they name, is told before an engine starts. Whatever they leave over, the
model and vLLM's flags, goes to `engine_args`.
"""

from __future__ import annotations

import argparse
from collections.abc import Container, Iterator, Sequence
from typing import Any, NoReturn

from cna_vllm.cli.config_file import Group, flag, take_ours
from cna_vllm.cli.usage import UsageError, positive_int

_ENGINE_HELP = (
    "MODEL is a folder, a hub id, or smollm2 (a small model that is built on first use).\n"
    "All engine flags of vLLM are taken too: --help=all lists them."
)


class OptionParser(argparse.ArgumentParser):
    """`argparse`, but a mistake raises UsageError, and names may be written with underscores."""

    def __init__(self, command: str, description: str, *, model: str = "") -> None:
        super().__init__(
            prog=f"cna-vllm {command} {model}".rstrip(),
            description=description,
            epilog=_ENGINE_HELP if model else None,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        self.command = command

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; see cna-vllm {self.command} --help")

    def add_list(self, name: str, metavar: str, text: str, **more: Any) -> None:
        """An option that may be repeated; an empty list where it is not given."""
        self.add_argument(name, action="append", default=[], metavar=metavar, help=text, **more)

    def add_count(self, name: str, text: str, default: int | None = None) -> None:
        """An option that takes a whole number of at least 1."""
        self.add_argument(name, type=positive_int, default=default, metavar="N", help=text)

    def split(self, argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
        """This command's options, and the arguments left for the engine, as they were written.

        Options may also stand in the YAML file of vLLM's `--config`, beside vLLM's own. What may
        be repeated is then taken from both places; any other option has one value. `--help=...`,
        the form in which vLLM searches its flags, prints those and exits. Raises UsageError for a
        mistake in an option, or in that file.
        """
        if any(argument.startswith("--help=") for argument in argv):
            from cna_vllm.cli.engine_args import parse_engine_args

            parse_engine_args(self.command, argv)  # prints them and exits
        mine: list[Group] = []
        given: dict[str, list[Group]] = {}
        rest: list[str] = []
        for action, group in self._groups(argv):
            if action is None:
                rest += group
            else:
                mine.append(group)
                given.setdefault(action.dest, []).append(group)
        if "--config" not in self._option_string_actions:
            from_file, rest = take_ours(rest, self._option_string_actions, given)
            mine = [*from_file, *mine]
        return self.parse_args([word for group in mine for word in group]), rest

    def refuse_others(
        self, options: argparse.Namespace, taken: Container[str], flag: str, why: str
    ) -> None:
        """Raises UsageError for an option that is given and not one of `taken`, those of `flag`."""
        for name, value in vars(options).items():
            if name not in taken and value != self.get_default(name):
                raise UsageError(f"{flag} takes no --{name.replace('_', '-')}; {why}")

    def _groups(self, argv: Sequence[str]) -> Iterator[tuple[argparse.Action | None, Group]]:
        """Each of this command's options with its values; everything else word by word, but a
        dotted flag of vLLM's with its value, which may look like an option."""
        at = 0
        while at < len(argv):
            word, end = argv[at], at + 1
            action = self._option_string_actions.get(flag(word))
            if word == "--":
                yield None, tuple(argv[at:])
                return
            if action is None:
                dotted = word.startswith("-") and "." in word and "=" not in word
                if dotted and not word.startswith("-O"):
                    end += 1
                    if end > len(argv):
                        self.error(f"argument {word}: expected one argument")
                yield None, tuple(argv[at:end])
                at = end
                continue
            if "=" in word:
                pass
            elif action.nargs == "+":
                while end < len(argv) and not _is_flag(argv[end]):
                    end += 1
            else:
                end += 1 if action.nargs is None else int(action.nargs)
            name = flag(word)
            yield action, (name + word[len(name) :], *argv[at + 1 : end])
            at = end


def _is_flag(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return word.startswith("-")
    return False
