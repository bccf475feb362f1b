# SPDX-License-Identifier: Apache-2.0
"""The plan of a batch: its order, seeds paired over arms, rows with settings of their own."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cna_vllm.batch.plan import digests, plan
from cna_vllm.batch.reading import BatchPrompt
from cna_vllm.steering.arms import Arm, parse_arm
from cna_vllm.text.prompts import Prompt, PromptError

ARMS = [parse_arm("plain"), parse_arm("off=f@0"), parse_arm("f@2:all")]
GREEDY = {"temperature": 0.0}
SAMPLED = {"temperature": 0.7, "max_tokens": 4}


def test_arms_are_innermost_and_rows_are_greedy_without_a_seed() -> None:
    rows = plan([Prompt("a"), Prompt("b")], ARMS, {"temperature": 0.0, "seed": 3})
    assert [(row.index, row.arm.name) for row in rows] == [
        (i, name) for i in (0, 1) for name in ("plain", "off", "f@2:all")
    ]
    assert all(row.sampling == {"temperature": 0.0} and row.sample is None for row in rows)
    assert rows[1].to_dict() == {
        "index": 0,
        "prompt": "a",
        "arm": "off",
        "circuit": "f",
        "multiplier": 0.0,
        "scope": "last",
        "vector": None,
        "coefficient": None,
    }
    assert [rows[0].to_dict()[k] for k in ("circuit", "multiplier", "scope")] == [None] * 3


@given(
    prompts=st.integers(1, 6), samples=st.integers(1, 5), base=st.integers(0, 2**62), arms=st.data()
)
def test_seeds_are_paired_across_arms_and_distinct_otherwise(
    prompts: int, samples: int, base: int, arms: st.DataObject
) -> None:
    chosen = arms.draw(st.lists(st.sampled_from(ARMS), min_size=1, unique=True))
    texts = [Prompt(f"p{i}") for i in range(prompts)]
    rows = plan(texts, chosen, {**SAMPLED, "seed": base}, samples=samples)
    assert len(rows) == prompts * samples * len(chosen)
    seeds: dict[Any, set[int]] = {}
    for row in rows:
        seeds.setdefault((row.index, row.sample), set()).add(row.sampling["seed"])
        assert row.to_dict()["seed"] == row.sampling["seed"]
        assert row.to_dict().get("sample") == row.sample
    assert len(seeds) == prompts * samples
    assert all(len(of_arms) == 1 for of_arms in seeds.values())
    assert len(set.union(*seeds.values())) == prompts * samples
    assert all(0 <= seed < 2**48 for of_arms in seeds.values() for seed in of_arms)
    # More prompts, other arms: the seeds of what was there stay.
    longer = plan([*texts, Prompt("z")], ARMS, {**SAMPLED, "seed": base}, samples=samples)
    assert {(r.index, r.sample): {r.sampling["seed"]} for r in longer}.items() >= seeds.items()


def test_a_row_replaces_the_runs_sampling() -> None:
    greedy = BatchPrompt("a", sampling={"temperature": 0})
    seeded = BatchPrompt("b", sampling={"seed": 11, "n": 3, "max_tokens": 9})
    counted = BatchPrompt("c", sampling={"n": 1})
    first, *others, last = plan([greedy, seeded, counted], ARMS[:1], SAMPLED | {"n": 1}, samples=5)
    assert first.sampling == {"temperature": 0, "max_tokens": 4} and first.sample is None
    assert [(row.sample, row.sampling["seed"]) for row in others] == [(0, 11), (1, 12), (2, 13)]
    assert {row.sampling["max_tokens"] for row in others} == {9}
    assert last.sample is None and last.sampling["max_tokens"] == 4


def test_a_rows_own_arm_and_tokenization() -> None:
    own = Arm("own", (("g", 3.0),))
    rows = plan([BatchPrompt("a", arm=own, raw=True), BatchPrompt("b", id=5)], ARMS[:2], SAMPLED)
    assert [(row.arm.name, row.raw) for row in rows] == [
        ("own", True),
        ("plain", False),
        ("off", False),
    ]
    assert rows[2].to_dict()["id"] == 5
    assert all(row.raw for row in plan([Prompt("a")], ARMS, SAMPLED, raw=True))


@pytest.mark.parametrize(
    ("prompt", "sampling", "samples", "says"),
    [
        (Prompt("a"), {"temperature": 0.0}, 2, "prompt 0: n: 2 samples of a greedy row"),
        (BatchPrompt("a", sampling={"n": 0}, source="f:3"), SAMPLED, 1, "f:3: n: must be"),
        (BatchPrompt("a", sampling={"n": True}, source="f:3"), SAMPLED, 1, "f:3: n: must be"),
        (BatchPrompt("a", sampling={"seed": -1}, source="f:3"), SAMPLED, 1, "f:3: seed: must be"),
        (BatchPrompt("a", sampling={"seed": 2**63}, source="f:3"), SAMPLED, 1, "f:3: seed"),
        (BatchPrompt("a", sampling={"seed": "x"}, source="f:3"), SAMPLED, 1, "f:3: seed"),
    ],
)
def test_refused(prompt: Prompt, sampling: dict[str, Any], samples: int, says: str) -> None:
    with pytest.raises(PromptError) as refused:
        plan([prompt], ARMS, sampling, samples=samples)
    assert says in str(refused.value)


def test_no_arm() -> None:
    with pytest.raises(PromptError, match="no arm"):
        plan([Prompt("a")], [], SAMPLED)


def test_digests_tell_apart_what_differs() -> None:
    base = plan([Prompt("a"), Prompt("b")], ARMS, SAMPLED)
    whole = digests(base)
    assert whole["rows"] == 6 and digests(list(base)) == whole
    others = {
        "prompts": [
            plan([Prompt("a"), Prompt("c")], ARMS, SAMPLED),
            plan([Prompt("b"), Prompt("a")], ARMS, SAMPLED),
            plan([Prompt("a"), Prompt("b")], ARMS, SAMPLED, raw=True),
            plan([BatchPrompt("a", id="x"), Prompt("b")], ARMS, SAMPLED),
        ],
        "arms": [
            plan([Prompt("a"), Prompt("b")], ARMS[::-1], SAMPLED),
            plan([Prompt("a"), Prompt("b")], [*ARMS[:2], parse_arm("f@2")], SAMPLED),
        ],
        "sampling": [plan([Prompt("a"), Prompt("b")], ARMS, SAMPLED | {"top_k": 1})],
        "seeds": [plan([Prompt("a"), Prompt("b")], ARMS, SAMPLED | {"seed": 1})],
    }
    for part, plans in others.items():
        for rows in plans:
            changed = {name for name, value in digests(rows).items() if value != whole[name]}
            assert changed == {part}
    every = [digests(rows)[part] for part, plans in others.items() for rows in plans]
    assert all(a != b for a, b in pairwise(every))


@pytest.mark.parametrize(
    ("prompts", "arms", "samples", "changed"),
    [
        ("abc", ARMS, 1, {"rows", "prompts"}),
        ("ab", [*ARMS, parse_arm("f@2")], 1, {"rows", "arms"}),
        ("ab", ARMS, 2, {"rows", "sampling", "seeds"}),
        ("abc", ARMS, 2, {"rows", "prompts", "sampling", "seeds"}),
    ],
)
def test_digests_name_what_was_changed_and_no_more(
    prompts: str, arms: list[Arm], samples: int, changed: set[str]
) -> None:
    def found(prompts: str, arms: list[Arm], samples: int) -> dict[str, Any]:
        fields = GREEDY if samples == 1 else SAMPLED
        return digests(plan([Prompt(text) for text in prompts], arms, fields, samples=samples))

    whole = found("ab", ARMS, 1)
    other = found(prompts, arms, samples)
    assert {name for name in whole if whole[name] != other[name]} == changed


def test_where_arms_change_is_part_of_the_digest() -> None:
    arm = parse_arm("f@2")

    def found(*own: str) -> dict[str, Any]:
        prompts = [BatchPrompt(p, arm=arm if p in own else None) for p in "abcd"]
        return digests(plan(prompts, ARMS[:1], GREEDY))

    assert found("b")["arms"] != found("c")["arms"] != found("b", "c")["arms"]
