# SPDX-License-Identifier: Apache-2.0
"""The prompts of the paper's evaluations, from a hub or from local files; none are shipped."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from cna_vllm.text.prompts import Prompt, PromptError, read_prompts

JBB_HUB = "JailbreakBench/JBB-Behaviors"
_JBB_FILES = ("harmful-behaviors.csv", "benign-behaviors.csv")
_JBB_COLUMN = "Goal"
# The published file has the first, mirrors of it the second.
_STRONGREJECT_COLUMNS = ("forbidden_prompt", "prompt")


@dataclass(frozen=True)
class JbbBehaviors:
    """JBB-Behaviors (arXiv 2404.01318): 100 harmful goals, 100 benign ones on the same topics."""

    harmful: tuple[Prompt, ...]
    benign: tuple[Prompt, ...]


def read_jbb(source: str = JBB_HUB) -> JbbBehaviors:
    """`harmful-behaviors.csv` and `benign-behaviors.csv` of a folder (or of its `data`), or a hub
    id of a data set that holds them there; their column `Goal`.

    Raises:
        PromptError: one line that says what was looked for and where.
    """
    files = [_jbb_file(source, name) for name in _JBB_FILES]
    return JbbBehaviors(*(tuple(read_prompts(file, column=_JBB_COLUMN)) for file in files))


def read_strongreject(source: str) -> tuple[Prompt, ...]:
    """The forbidden prompts of StrongREJECT (arXiv 2402.10260).

    Args:
        source: a .csv file with the column `forbidden_prompt` or `prompt`, any prompt file that
            `read_prompts` takes, or `REPOSITORY:FILE` of a hub.

    Raises:
        PromptError: as `read_jbb`.
    """
    path = Path(source)
    if not path.exists() and ":" in source:
        repository, _, name = source.partition(":")
        path = _hub_file(repository, name)
    if path.suffix.lower() != ".csv":
        return tuple(read_prompts(path))
    first, second = _STRONGREJECT_COLUMNS
    try:
        return tuple(read_prompts(path, column=first))
    except PromptError as error:
        if f"no column {first!r}" not in str(error):
            raise
    return tuple(read_prompts(path, column=second))


@contextmanager
def quiet_hub() -> Iterator[None]:
    """Without a line for every retry of a hub that cannot be reached; the error says it once."""
    from huggingface_hub.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def _jbb_file(source: str, name: str) -> Path:
    folder = Path(source)
    if folder.is_dir():
        for candidate in (folder / name, folder / "data" / name):
            if candidate.is_file():
                return candidate
        raise PromptError(f"{source}: holds no {name}, nor does its folder data")
    if folder.exists():
        raise PromptError(
            f"{source}: is a file; name the folder that holds {' and '.join(_JBB_FILES)}"
        )
    return _hub_file(source, f"data/{name}")


def _hub_file(repository: str, name: str) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        with quiet_hub():
            return Path(hf_hub_download(repository, name, repo_type="dataset"))
    except HFValidationError as error:
        raise PromptError(f"{repository}: is neither a folder nor a data set's hub id") from error
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        raise PromptError(
            f"{repository}: {name} cannot be fetched ({reason}); give a local copy instead"
        ) from error
