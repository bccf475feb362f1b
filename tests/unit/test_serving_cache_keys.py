# SPDX-License-Identifier: Apache-2.0
"""Which blocks are shared, against the rule on positions; the keys come from real admission."""

from __future__ import annotations

from typing import Any, NamedTuple

from hypothesis import given, settings
from hypothesis import strategies as st

from cna_vllm import steer
from cna_vllm.serving.config import CnaConfig
from cna_vllm.serving.core.cache_keys import steering_key
from cna_vllm.serving.front.admission import Admission
from cna_vllm.serving.front.registry import Registry, ServedModel
from cna_vllm.steering.circuit import Circuit, Neuron
from cna_vllm.steering.request import SCOPES
from cna_vllm.steering.resolved import Steering
from cna_vllm.steering.shape import Shape
from tests.keys import block_key

NAMES = ("a", "b", "c")
MULTIPLIERS = (0.0, 0.5, 1.0, 2.0)


def make_circuit(index: int) -> Circuit:
    return Circuit("m", "A", 2, 16, (Neuron(0, index, 0.5),))


def make_admission() -> Admission:
    registry = Registry(ServedModel("m", "A", Shape.of(2, 16), 6))
    for index, name in enumerate(NAMES):
        registry.register(name, make_circuit(index))
    return Admission(CnaConfig(), registry)


ADMISSION = make_admission()


class Asked(NamedTuple):
    circuits: dict[str, float]
    scope: str
    prompt_len: int

    def extra_args(self) -> dict[str, Any] | None:
        if not self.circuits:
            return {"unrelated": 1}
        return ADMISSION.admit(steer(list(self.circuits.items()), scope=self.scope))

    def key(self, block_end: int) -> tuple[str, str] | None:
        return block_key(self.extra_args(), self.prompt_len, block_end)

    def chain(self, block_size: int, block_end: int) -> list[tuple[str, str] | None]:
        """The keys of all blocks up to one; vLLM's block hash is over all of them."""
        return [self.key(end) for end in range(block_size, block_end + 1, block_size)]

    def at(self, position: int) -> dict[str, float]:
        """What is applied at a position: the table of scopes, read literally."""
        inside = {
            "last": position >= self.prompt_len - 1,
            "all": True,
            "generated": position >= self.prompt_len,
        }[self.scope]
        return {n: m for n, m in self.circuits.items() if m != 1.0} if inside else {}


ASKED = st.builds(
    Asked,
    st.dictionaries(st.sampled_from(NAMES), st.sampled_from(MULTIPLIERS), max_size=2),
    st.sampled_from(SCOPES),
    st.integers(1, 40),
)


@st.composite
def neighbours(draw: st.DrawFn) -> tuple[Asked, Asked]:
    """Two requests that differ in few things, so that equal steering is not a rare draw."""
    one, other = draw(ASKED), draw(ASKED)
    changed = draw(st.sets(st.sampled_from(Asked._fields)))
    return one, one._replace(**{name: getattr(other, name) for name in changed})


@given(neighbours(), st.integers(1, 16), st.integers(1, 8))
@settings(max_examples=400, deadline=None)
def test_blocks_are_shared_exactly_where_steering_is_equal(
    pair: tuple[Asked, Asked], block_size: int, blocks: int
) -> None:
    one, other = pair
    end = block_size * blocks
    equal = all(one.at(p) == other.at(p) for p in range(end))
    shared = one.chain(block_size, end) == other.chain(block_size, end)
    assert not shared or equal, "a polluted block"
    # "last" of P tokens and "generated" of P - 1 steer alike; the scope in the key parts them.
    if one.scope == other.scope or not (any(map(one.at, range(end)))):
        assert shared or not equal, "a block that could be shared is not"
    # No later block may be reached through an earlier one alone.
    assert (one.key(end) == other.key(end)) <= equal


@given(ASKED, st.integers(1, 64))
@settings(max_examples=200, deadline=None)
def test_only_blocks_that_hold_a_steered_position_have_a_key(asked: Asked, end: int) -> None:
    key = asked.key(end)
    assert (key is not None) == any(asked.at(p) for p in range(end))
    if key is not None:
        assert type(key) is tuple
        assert [type(part) for part in key] == [str, str]  # KV events read key[1]
        assert hash(key) == hash(asked.key(end + 1))


def test_the_first_steered_position_is_the_border() -> None:
    def ends(scope: str) -> list[int]:
        asked = Asked({"a": 0.0}, scope, 17)
        return [end for end in range(1, 21) if asked.key(end) is not None]

    assert ends("last") == [17, 18, 19, 20]
    assert ends("generated") == [18, 19, 20]
    assert ends("all") == list(range(1, 21))


def test_prompt_in_one_request_and_output_in_another() -> None:
    """The same text, the same circuit and scope: the border alone differs."""
    for scope in ("last", "generated"):
        short, long = (Asked({"a": 0.0}, scope, p) for p in (8, 12))
        assert short.key(16) != long.key(16)
    assert Asked({"a": 0.0}, "all", 8).key(16) == Asked({"a": 0.0}, "all", 12).key(16)


def test_plain_requests_have_no_key() -> None:
    for extra_args in (None, {}, {"other": "x"}, steer("a", 0.0)):
        # Unresolved fields never reach the scheduler, and would not be a key there.
        assert block_key(extra_args, 4, 16) is None
    for scope in SCOPES:
        assert Asked({"a": 1.0, "b": 1.0}, scope, 4).key(16) is None
        assert Asked({"a": 1.0 + 1e-9}, scope, 4).key(16) is None, "1 in float32"


def test_a_circuit_of_multiplier_one_does_not_part_requests() -> None:
    assert Asked({"a": 0.0, "b": 1.0}, "last", 4).key(16) == Asked({"a": 0.0}, "last", 4).key(16)
    assert Asked({"a": -0.0}, "last", 4).key(16) == Asked({"a": 0.0}, "last", 4).key(16)


def test_order_of_the_circuits_does_not_matter() -> None:
    one, other = {"a": 0.0, "b": 2.0}, {"b": 2.0, "a": 0.0}
    assert Asked(one, "all", 4).key(8) == Asked(other, "all", 4).key(8)
    assert Asked(one, "all", 4).key(8) != Asked({"a": 2.0, "b": 0.0}, "all", 4).key(8)


def test_the_digest_counts_and_not_the_name() -> None:
    gate = make_admission()

    def key(name: str) -> tuple[str, str]:
        found = block_key(gate.admit(steer(name, 0.0)), 4, 16)
        assert found is not None
        return found

    before = key("a")
    gate.registry.register("alias", make_circuit(0))
    assert key("alias") == before
    gate.registry.register("a", make_circuit(7))
    assert key("a") != before, "old blocks of a reloaded circuit must not be hit"
    assert key("alias") == before
    assert gate.registry.digest("circuit", "a") in key("a")[1]
    assert not any("alias" in part for part in key("alias"))


def test_an_image_that_is_steered_in_part_is_keyed_as_a_whole() -> None:
    """Position 9, the last of a prompt, is in an image, whose other positions may attend to it."""
    admitted = ADMISSION.admit(steer("a", 0.0, scope="last"))
    assert admitted is not None
    steering = Steering.from_field(admitted["cna_resolved"])
    plain = steering_key(steering, 10)
    inside = steering_key(steering, 10, [(0, 2), (4, 10)])
    before = steering_key(steering, 10, [(0, 2), (4, 9)])
    assert [key.first_position for key in (plain, inside, before)] == [9, 4, 9]
    assert plain.key == inside.key == before.key
