# SPDX-License-Identifier: Apache-2.0
"""Our options in the YAML file of vLLM's `--config`, which vLLM itself would refuse.

They are taken out of it: vLLM reads what is left, by its own rules, from a copy.

    circuit: {french: french.json}      # or [french=french.json, ...]
    adapter: {french-off: french@0}
    max-multiplier: 10
    max-model-len: 512
"""

from __future__ import annotations

import argparse
import atexit
import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from cna_vllm.cli.usage import UsageError
from cna_vllm.steering.content import show

Group = tuple[str, ...]
Actions = Mapping[str, argparse.Action]


def flag(word: str) -> str:
    """The name of an argument, with dashes for underscores as in vLLM; a dotted one, which is
    none of ours, stays as it is."""
    name = word.partition("=")[0]
    return name if "." in name or not name.startswith("--") else name.replace("_", "-")


def take_ours(
    rest: Sequence[str], actions: Actions, given: Mapping[str, Sequence[Group]]
) -> tuple[list[Group], list[str]]:
    """The options that the file of `--config` in `rest` sets, and `rest` without them.

    `actions` are our options by name, `given` those of the command line by `dest`. Raises
    UsageError if the file cannot be used, or gives an option another value than `given` has.
    """
    words = [part for word in rest for part in _apart(word)]
    if "--config" not in words:
        return [], list(rest)
    at = words.index("--config")
    if words.count("--config") > 1 or at + 1 == len(words):
        raise UsageError("--config: name one file, once")
    path = words[at + 1]
    settings = _read(path)
    ours = {key: value for key, value in settings.items() if flag(f"--{key}") in actions}
    found: list[Group] = []
    for key, value in ours.items():
        action = actions[flag(f"--{key}")]
        groups = list(_groups(path, key, action, value))
        if groups and (before := given.get(action.dest)):
            there = [_values(group) for group in before]
            groups = [group for group in groups if _values(group) not in there]
            if groups and not isinstance(action, argparse._AppendAction):
                raise UsageError(f"{before[-1][0]}: {path} has another value; drop one of the two")
        found += groups
    if ours:
        left = {key: value for key, value in settings.items() if key not in ours}
        words[at + 1] = _copy(left)
        if not left:
            del words[at : at + 2]
    return found, words


def _apart(word: str) -> tuple[str, ...]:
    """`--config=FILE`, which vLLM takes and then does not read, as two words."""
    name, separator, value = word.partition("=")
    return (name, value) if separator and name == "--config" else (word,)


def _read(path: str) -> dict[str, Any]:
    import yaml

    if Path(path).suffix not in (".yaml", ".yml"):
        raise UsageError(f"--config {path}: must be a .yaml or .yml file")
    try:
        with open(path, "rb") as file:
            settings = yaml.safe_load(file)
    except OSError as error:
        raise UsageError(f"--config {path}: cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise UsageError(f"--config {path}: is not YAML: {reason}") from error
    if not isinstance(settings, dict) or not all(isinstance(key, str) for key in settings):
        raise UsageError(f"--config {path}: must hold flags and their values, like port: 8000")
    return settings


def _groups(path: str, key: str, action: argparse.Action, value: Any) -> Iterator[Group]:
    """One option of the file as arguments."""
    name = flag(f"--{key}")
    if value is None or isinstance(value, bool) != (action.nargs == 0):
        what = "true or false" if action.nargs == 0 else "a value"
        raise UsageError(f"--config {path}: {key} needs {what}, not {show(value)}")
    if isinstance(action, argparse._AppendAction):
        if isinstance(value, dict):
            value = [f"{one}={_text(text)}" for one, text in value.items()]
        for item in value if isinstance(value, list) else [value]:
            yield (f"{name}={_text(item)}",)
    elif action.nargs == 0:
        if value:
            yield (name,)
    elif isinstance(value, list):
        yield (name, *map(_text, value))
    elif action.nargs == "+":
        yield name, _text(value)
    else:
        yield (f"{name}={_text(value)}",)


def _text(value: Any) -> str:
    return json.dumps(value) if isinstance(value, dict | list) else str(value)


def _values(group: Group) -> Group:
    """Of `--name=value` and `--name value` alike."""
    _, separator, value = group[0].partition("=")
    return (*((value,) if separator else ()), *group[1:])


def _copy(settings: Mapping[str, Any]) -> str:
    """A file of these settings for as long as this process lives."""
    import yaml

    folder = tempfile.TemporaryDirectory(prefix="cna-config-")
    atexit.register(folder.cleanup)
    path = Path(folder.name) / "engine.yaml"
    path.write_text(yaml.safe_dump(dict(settings), sort_keys=False), "utf-8")
    return str(path)
