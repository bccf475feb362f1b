# SPDX-License-Identifier: Apache-2.0
"""What commands check in their arguments, the error that tells, and the line that reports."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from cna_vllm.steering.content import show


class UsageError(ValueError):
    """A command line that cannot be run: one line."""


def say(message: str) -> None:
    """A line of progress; stdout is for results."""
    print(message, file=sys.stderr, flush=True)


def number(
    kind: Callable[[str], Any], what: str, allowed: Callable[[Any], bool]
) -> Callable[[str], Any]:
    """An option's type: a value that `kind` reads and `allowed` takes; `what` names those."""

    def parse(text: str) -> Any:
        try:
            if allowed(value := kind(text)):
                return value
        except ValueError:
            pass
        raise argparse.ArgumentTypeError(f"{text!r} is not {what}")

    return parse


positive_int = number(int, "a whole number of at least 1", lambda value: value >= 1)
share = number(float, "a number between 0 and 1", lambda value: 0 < value < 1)


def named_files(flag: str, arguments: Sequence[str], file: str = "C.json") -> dict[str, str]:
    """File by name, of an option that may be repeated; raises UsageError for another form than
    NAME=FILE, or a name given twice."""
    files: dict[str, str] = {}
    for argument in arguments:
        name, separator, path = argument.partition("=")
        if not (name and separator and path):
            raise UsageError(f"{flag} {show(argument)}: write it as NAME={file}")
        if name in files:
            raise UsageError(f"{flag}: the name {show(name)} is given twice")
        files[name] = path
    return files


def located(load: Callable[[str], Any], files: Mapping[str, str]) -> dict[str, tuple[str, str]]:
    """Absolute path and digest by name, of circuits or vectors; raises what `load` does."""
    return {name: (str(Path(file).resolve()), load(file).digest) for name, file in files.items()}


def check_known(
    where: str, names: Iterable[str], circuits: Container[str], add: str = "--circuit {}=C.json"
) -> None:
    """Raises UsageError for a name that is no circuit's; `add` is the option that would help."""
    for name in names:
        if name not in circuits:
            raise UsageError(f"{where}: no circuit is named {show(name)}; add {add.format(name)}")


def check_output(path: str, overwrite: bool) -> None:
    """Raises UsageError if `path` exists and may not be replaced, or lies in no folder."""
    target = Path(path)
    if not target.absolute().parent.is_dir():
        raise UsageError(f"{path}: the folder {str(target.parent)!r} does not exist")
    if target.is_dir():
        raise UsageError(f"{path}: is a folder; name a file")
    if target.exists() and not overwrite:
        raise UsageError(f"{path}: exists; choose another name or add --overwrite")


def check_plot(path: str | None, overwrite: bool) -> None:
    """`check_output` for a picture, if there is to be one: its name must end in .png, too."""
    if not path:
        return
    if Path(path).suffix.lower() != ".png":
        raise UsageError(f"{path}: pictures are PNG files; name it P.png")
    check_output(path, overwrite)
