# SPDX-License-Identifier: Apache-2.0
"""Arms: their short form, the fields they stand for, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest

from cna_vllm.steering.arms import Arm, check_names, parse_arm
from cna_vllm.steering.request import SteeringError, steer, steer_vector


@pytest.mark.parametrize(
    ("text", "arm"),
    [
        ("off=french@0", Arm("off", (("french", 0.0),))),
        ("french@0:all", Arm("french@0:all", (("french", 0.0),), "all")),
        ("x=a@0+b@-1.5:generated", Arm("x", (("a", 0.0), ("b", -1.5)), "generated")),
        ("base=plain", Arm("base")),
        ("plain", Arm("plain")),
    ],
)
def test_the_short_form(text: str, arm: Arm) -> None:
    assert parse_arm(text) == arm


@pytest.mark.parametrize(
    ("text", "arm"),
    [
        ("caa=v@-1.5:all", Arm("caa", (), "all", (("v", -1.5),))),
        ("x=v@1+a@0+w@2", Arm("x", (("a", 0.0),), "last", (("v", 1.0), ("w", 2.0)))),
        ("v@0", Arm("v@0", (), "last", (("v", 0.0),))),
    ],
)
def test_names_of_vectors_go_to_the_vectors(text: str, arm: Arm) -> None:
    assert parse_arm(text, frozenset({"v", "w"})) == arm
    assert parse_arm(text).vectors == ()


@pytest.mark.parametrize("text", ["", "=a@0", "x=", "x=a", "x=a@", "x=a@b", "x=@1", "x=a@0:first"])
def test_a_malformed_short_form_is_told(text: str) -> None:
    with pytest.raises(SteeringError, match=r"NAME|CIRCUIT@M"):
        parse_arm(text)


@pytest.mark.parametrize("text", ["x=a@nan", "x=a@inf", "x=a@1e40"])
def test_steering_that_no_engine_takes_is_refused(text: str) -> None:
    with pytest.raises(SteeringError, match="cna_multiplier"):
        parse_arm(text)


def test_fields_are_those_of_steer() -> None:
    assert Arm("x", (("a", 0.0),), "all").extra_args() == steer("a", 0.0, scope="all")
    pairs = [("a", 0.0), ("b", 2.0)]
    assert Arm("x", tuple(pairs)).extra_args() == steer(pairs)
    assert Arm("x").extra_args() == {}
    assert Arm("x", vectors=(("v", -2.0),)).extra_args() == steer_vector("v", -2.0)
    both = {**steer("a", 0.0, scope="all"), **steer_vector("v", 1.0, scope="all")}
    assert Arm("x", (("a", 0.0),), "all", (("v", 1.0),)).extra_args() == both
    with pytest.raises(SteeringError, match="cna_coefficient"):
        Arm("x", vectors=(("v", float("inf")),))


@pytest.mark.parametrize(
    ("arm", "row", "dose"),
    [
        (Arm("p"), {}, 1.0),
        (Arm("p", (("a", 2.0),)), {"circuit": "a", "multiplier": 2.0, "scope": "last"}, 2.0),
        (
            Arm("p", (("a", 2.0), ("b", 0.0))),
            {"circuit": ["a", "b"], "multiplier": [2.0, 0.0], "scope": "last"},
            None,
        ),
        (
            Arm("p", (), "all", (("v", -1.0),)),
            {"scope": "all", "vector": "v", "coefficient": -1.0},
            None,
        ),
        (
            Arm("p", (("a", 0.0),), "last", (("v", 1.0), ("w", 2.0))),
            {
                "circuit": "a",
                "multiplier": 0.0,
                "scope": "last",
                "vector": ["v", "w"],
                "coefficient": [1.0, 2.0],
            },
            None,
        ),
    ],
)
def test_columns_and_dose(arm: Arm, row: dict[str, Any], dose: float | None) -> None:
    columns = ("circuit", "multiplier", "scope", "vector", "coefficient")
    assert arm.to_dict() == {"arm": "p", **dict.fromkeys(columns), **row}
    assert arm.dose == dose


def test_names_are_unique() -> None:
    check_names([Arm("a"), Arm("b")])
    for arms in ([], [Arm("a"), Arm("a")]):
        with pytest.raises(SteeringError, match="arm"):
            check_names(arms)
