# SPDX-License-Identifier: Apache-2.0
"""The core's account of steered rows, and which blocks are not sound."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch

from cna_vllm.serving.core.ledger import Ledger
from cna_vllm.serving.step_report import SentReport, SteeredRows, StepReport
from cna_vllm.steering.resolved import Steering

DIGEST = "a" * 64


def steered(scope: str) -> Steering:
    return Steering(((DIGEST, 0.0),), scope)


def report(rows: dict[str, int], overflowed: set[str] = frozenset()) -> SentReport:  # type: ignore[assignment]
    return SentReport(rows, set(overflowed))


def test_rows_follow_from_positions() -> None:
    """Chunks of a prompt of 10 in every scope, with 4 tokens cached; then one generated token."""
    ledger = Ledger("float16")
    names = {"last": 0, "generated": 0, "all": 3}
    for scope in names:
        ledger.begin(scope, steered(scope), 10)
    scheduled = {**dict.fromkeys(names, 3), "plain": 10}
    computed = {**dict.fromkeys(names, 4), "plain": 0}.items()
    assert ledger.check(scheduled, computed, report({"all": 3})) == {}
    wrong = ledger.check(scheduled, computed, report({"all": 2, "last": 1}))
    assert set(wrong) == {"all", "last"}
    scheduled, computed = dict.fromkeys(names, 3), dict.fromkeys(names, 7).items()
    assert ledger.check(scheduled, computed, report({"all": 3, "last": 1})) == {}
    scheduled, computed = dict.fromkeys(names, 1), dict.fromkeys(names, 10).items()
    assert ledger.check(scheduled, computed, report(dict.fromkeys(names, 1))) == {}
    assert ledger.steered_tokens() == {DIGEST: 3 + 3 + 3 + 1 + 3}
    (told,) = {m.split(";")[0] for m in ledger.check(scheduled, computed, None).values()}
    assert "steered 0 token rows of a step in place of 1" in told


def test_requests_that_ended_are_forgotten() -> None:
    ledger = Ledger("float16")
    ledger.begin("a", steered("all"), 3)
    assert ledger.check({"a": 1}, [("a", 3)], None)
    ledger.end("a")
    assert ledger.check({"a": 1}, [("a", 3)], report({"a": 9}, {"a"})) == {}
    assert ledger.unsound_from("a", 4, 4) is None


def test_what_is_unsound() -> None:
    """All from the first steered position on after an overflow; else what no report covers yet."""
    ledger = Ledger("bfloat16")
    ledger.begin("a", steered("last"), 8)
    assert ledger.unsound_from("a", 20, 0) is None
    assert ledger.unsound_from("a", 20, 3) == 17
    assert ledger.unsound_from("a", 8, 8) == 7
    assert ledger.unsound_from("b", 20, 20) is None
    (message,) = ledger.check({"a": 1}, [("a", 8)], report({"a": 1}, {"a"})).values()
    assert message.startswith("cna_multiplier: the steered activations left the range of bfloat16")
    assert ledger.unsound_from("a", 20, 0) == 7


def test_shared_blocks_wait_for_their_last_user() -> None:
    ledger = Ledger("float16")
    ledger.taint([4, 5])
    ledger.scrub_unused(lambda block: block == 5)
    assert ledger.take_scrub() == [4] and ledger.has_tainted
    assert ledger.take_scrub() == []
    ledger.scrub_unused(lambda block: False)
    assert ledger.take_scrub() == [5] and not ledger.has_tainted


def test_a_report_reads_only_marks_of_its_step_and_crosses_processes() -> None:
    """Also beside requests that are plain or whose rows of the step are not steered."""
    names, slots, counts = ("plain", "a", "b", "c", "d"), [-1, 2, 0, 1, 3], [0, 1, 2, 3, 0]
    rows = SteeredRows(names, np.array(slots), np.array(counts))
    told = StepReport(rows, torch.tensor([7, 6, 7, 7], dtype=torch.int32), 7)
    sent = pickle.loads(pickle.dumps(told))
    for seen in (told, sent):
        assert seen.rows() == {"a": 1, "b": 2, "c": 3}
        assert seen.overflowed() == {"a", "b"}


def test_counted_digests_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cna_vllm.serving.step_report.MOST_COUNTED", 2)
    ledger = Ledger("float16")
    for name in "abcb":
        ledger.begin(name, Steering(((name * 64, 0.0),), "all"), 1)
        assert ledger.check({name: 1}, [(name, 0)], report({name: 1})) == {}
        ledger.end(name)
    assert ledger.steered_tokens() == {"b" * 64: 2, "c" * 64: 1}
