# SPDX-License-Identifier: Apache-2.0
"""The working folder of an A/B test: whether what it holds belongs to the test at hand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cna_vllm.batch import partial
from cna_vllm.batch.plan import Request, digests
from cna_vllm.evaluation.result import ResultError, Test, load

ANSWERS, RESULT, REPORT = "answers.jsonl", "ab.json", "report.html"


def batch_identity(
    model: str, steering: Mapping[str, Mapping[str, Any]], identity: Mapping[str, Any]
) -> dict[str, Any]:
    """What answers depend on besides the rows that ask for them."""
    named = {f"steering {name}": what["digest"] for name, what in steering.items()}
    return {**identity, "model": model, **named}


def answered(out: Path, rows: Sequence[Request], identity: Mapping[str, Any]) -> Test | None:
    """The test in `out` if it is this one and all of its rows are answered; None if none is there.

    Raises:
        ResultError: `out` holds another test.
        BatchError: it holds the unfinished rows of another one.
    """
    from cna_vllm.batch.runner import rows_done

    rows_done(rows, out / ANSWERS, identity)
    if not ((out / RESULT).exists() and (out / ANSWERS).exists()):
        return None
    test, *_ = load(out / RESULT)
    wanted = {**identity, **digests(rows)}
    if test.identity == wanted:
        return test
    names = [n for n in {**wanted, **test.identity} if test.identity.get(n) != wanted.get(n)]
    raise ResultError(
        f"{out}: holds a test with other settings ({', '.join(names)}); name another folder, or "
        "add --restart to discard that test"
    )


def discard(out: Path) -> None:
    """Removes what an earlier test left in `out`. Raises BatchError where one runs."""
    partial.discard(out / ANSWERS)
    for name in (RESULT, REPORT, ANSWERS):
        (out / name).unlink(missing_ok=True)
