# SPDX-License-Identifier: Apache-2.0
"""KV blocks are shared exactly as far as no position before their end is steered differently."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from tests import tiny_models
from tests.engine_job import V1_HERE, V2, run_engine
from tests.integration.conftest import PLAIN, Subject
from tests.oracles import Arm, assert_token_exact

pytestmark = pytest.mark.engine

BLOCK = 32
RUNNERS = pytest.mark.parametrize("runner", [V1_HERE, V2], ids=["V1", "V2-interpreted"])


def one_by_one(
    subject: Subject, prompt: Sequence[int], arms: Sequence[Arm]
) -> tuple[list[dict[str, Any]], list[tuple[Sequence[int], Arm]]]:
    """A step for every arm, so that each request finds what all before it have cached."""
    requests, wanted = subject.requests([prompt], arms, max_tokens=8, ignore_eos=True)
    return [{"op": "generate", "requests": [request]} for request in requests], wanted


def cached(outputs: Sequence[Sequence[Mapping[str, Any]]]) -> list[int]:
    return [output[0]["cached"] for output in outputs]


@RUNNERS
def test_what_is_shared_with_plain_requests(tiny: Subject, runner: Mapping[str, str]) -> None:
    """After one plain request, arms reuse its full blocks before their first steered position."""
    arms = [
        PLAIN,
        tiny.arm(("one", 0.0), scope="last"),
        tiny.arm(("one", 0.0), scope="generated"),
        tiny.arm(("one", 0.0), scope="all"),
        tiny.arm(("one", 1.0), scope="all"),
        PLAIN,
    ]
    lengths = (2 * BLOCK, 2 * BLOCK + 1, 2 * BLOCK + 7)
    steps, wanted = [], []
    for length in lengths:
        (seed,) = tiny_models.prompts(1, seed=length)
        more, asked = one_by_one(tiny, (seed * length)[:length], arms)
        steps += more
        wanted += asked
    outputs = run_engine(tiny.config(block_size=BLOCK), steps, env=runner)
    assert_token_exact(tiny.verdicts(wanted, [o[0] for o in outputs]), "after a plain request")
    for i, length in enumerate(lengths):
        before_last = (length - 1) // BLOCK * BLOCK  # full blocks before position P - 1
        # vLLM always recomputes the last prompt token, and with it the block that holds it.
        expected = [0, before_last, before_last, 0, before_last, before_last]
        assert cached(outputs[i * len(arms) : (i + 1) * len(arms)]) == expected


@RUNNERS
def test_plain_after_steered(tiny: Subject, runner: Mapping[str, str]) -> None:
    """Steered first: the plain request reuses only what was computed unsteered, both orders."""
    reused = {"all": 0, "last": 3 * BLOCK}
    steps, wanted = [], []
    for seed, scope in enumerate(reused, start=20):
        prompt = (tiny_models.prompts(1, seed=seed)[0] * 99)[: 3 * BLOCK + 5]
        steered = tiny.arm(("one", -1.0), scope=scope)
        more, asked = one_by_one(tiny, prompt, [steered, PLAIN, steered])
        steps += more
        wanted += asked
    outputs = run_engine(tiny.config(block_size=BLOCK), steps, env=runner)
    assert_token_exact(tiny.verdicts(wanted, [o[0] for o in outputs]), "plain after steered")
    for i, expected in enumerate(reused.values()):
        # The third request finds the first one's own blocks, whatever its scope.
        assert cached(outputs[3 * i : 3 * i + 3]) == [0, expected, 3 * BLOCK]


def test_arms_do_not_share_with_each_other(tiny: Subject) -> None:
    """Another multiplier, circuit or scope reuses nothing from the first steered block on."""
    prompt = (tiny_models.prompts(1, seed=6)[0] * 99)[: 2 * BLOCK + 3]
    arms = [
        tiny.arm(("one", 0.0), scope="all"),
        tiny.arm(("one", 0.5), scope="all"),
        tiny.arm(("two", 0.0), scope="all"),
        tiny.arm(("one", 0.0), ("two", 0.0), scope="all"),
        tiny.arm(("two", 0.0), ("one", 0.0), scope="all"),
        tiny.arm(("one", 0.0), scope="all"),
    ]
    steps, wanted = one_by_one(tiny, prompt, arms)
    outputs = run_engine(tiny.config(block_size=BLOCK), steps)
    assert_token_exact(tiny.verdicts(wanted, [o[0] for o in outputs]), "arms among themselves")
    # Only the same arm again shares, in whichever order its circuits are named.
    assert cached(outputs) == [0, 0, 0, 0, 2 * BLOCK, 2 * BLOCK]


def test_reload_under_the_same_name_reuses_nothing(tiny: Subject) -> None:
    """Other content under an old name: new text, no old block, and the addresses stay."""
    prompt = (tiny_models.prompts(1, seed=7)[0] * 99)[: 2 * BLOCK + 3]
    arm_one, arm_two = (tiny.arm((name, 0.0), scope="all") for name in ("one", "two"))
    step = one_by_one(tiny, prompt, [arm_one])[0][0]
    other = tiny_models.circuit_object(tiny.circuits["two"])
    mine = tiny_models.circuit_object(tiny.circuits["one"])
    results = run_engine(
        tiny.config(block_size=BLOCK),
        [
            {"op": "status"},
            step,
            {"op": "load", "name": "one", "circuit": other},
            step,
            {"op": "load", "name": "one", "circuit": mine},
            step,
            {"op": "unload", "name": "one"},
            {"op": "refused", "requests": step["requests"]},
            {"op": "status"},
        ],
    )
    first, reloaded, again = results[1][0], results[3][0], results[5][0]
    verdicts = tiny.verdicts(
        [(prompt, arm_one), (prompt, arm_two), (prompt, arm_one)], [first, reloaded, again]
    )
    assert_token_exact(verdicts, "reload under the same name")
    assert [first["cached"], reloaded["cached"], again["cached"]] == [0, 0, 2 * BLOCK]
    assert "no circuit is named 'one'" in results[7][0]
    assert results[0][0]["addresses"] == results[8][0]["addresses"]


@RUNNERS
def test_second_turn_of_a_conversation(tiny: Subject, runner: Mapping[str, str]) -> None:
    """The steered answer of turn 1 is plain prompt text in turn 2, steered or not."""
    turn = (tiny_models.prompts(1, seed=8)[0] * 99)[: BLOCK + 5]
    arm = tiny.arm(("one", 0.0), scope="last")
    opening = {
        "prompt": turn,
        "params": {"max_tokens": BLOCK, "ignore_eos": True, **tiny.fields(arm)},
    }
    engine = tiny.config(block_size=BLOCK)
    answer = run_engine(engine, [{"op": "generate", "requests": [opening]}], env=runner)
    second = [*turn, *answer[0][0]["token_ids"][0], *turn[:7]]
    steps, wanted = one_by_one(tiny, second, [PLAIN, arm, tiny.arm(("one", 0.0), scope="all")])
    outputs = run_engine(engine, [{"op": "generate", "requests": [opening]}, *steps], env=runner)
    assert outputs[0][0]["token_ids"] == answer[0][0]["token_ids"]
    assert_token_exact(tiny.verdicts(wanted, [o[0] for o in outputs[1:]]), "second turn")
    # The plain second turn may reuse only the block before the first turn's steered position.
    assert outputs[1][0]["cached"] == BLOCK
