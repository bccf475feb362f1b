# SPDX-License-Identifier: Apache-2.0
"""Random schedules against a naive rule: one position, one request, one decision a row."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from cna_vllm.serving.config import CircuitTableError
from cna_vllm.serving.worker.state import SteeringState
from cna_vllm.serving.worker.table import CircuitTable
from cna_vllm.steering.circuit import Circuit, Neuron
from cna_vllm.steering.request import SCOPES
from cna_vllm.steering.resolved import Steering

LAYERS, WIDTH, SLOTS, MAX_REQS, MAX_TOKENS = (0, 1), 11, 3, 4, 48
MULTIPLIERS = (0.0, 0.5, -1.0, 2.0, 1000.0)


def make_circuit(*neurons: tuple[int, int]) -> Circuit:
    return Circuit("m", "A", len(LAYERS), WIDTH, tuple(Neuron(*n) for n in neurons))


CIRCUITS = {
    c.digest: c
    for c in (
        make_circuit((0, 0), (0, 10), (1, 4)),
        make_circuit((1, 3)),
        make_circuit((0, 0), (1, 3), (1, 4), (1, 9)),
    )
}
UNUSED = make_circuit((0, 7))

PAIRS = st.lists(
    st.tuples(st.sampled_from(sorted(CIRCUITS)), st.sampled_from(MULTIPLIERS)),
    min_size=1,
    max_size=SLOTS,
    unique_by=lambda pair: pair[0],
)
STEERINGS = st.none() | st.builds(
    lambda pairs, scope: Steering(tuple(sorted(pairs)), scope), PAIRS, st.sampled_from(SCOPES)
)


def make_state(max_reqs: int = MAX_REQS) -> tuple[CircuitTable, SteeringState]:
    table = CircuitTable(LAYERS, 0, WIDTH, 8, torch.device("cpu"))
    table.load(UNUSED.packed())
    for circuit in CIRCUITS.values():
        table.load(circuit.packed())
    return table, SteeringState(table, max_reqs, MAX_TOKENS, SLOTS)


def steered(steering: Steering | None, prompt_len: int, position: int) -> bool:
    """The table of scopes, read literally."""
    if steering is None:
        return False
    return {
        "last": position >= prompt_len - 1,
        "all": position >= 0,
        "generated": position >= prompt_len,
    }[steering.scope]


def factors(state: SteeringState, table: CircuitTable, slot: int) -> np.ndarray:
    """float32 [layers, WIDTH]: what a slot multiplies every channel by, read from the tables."""
    result = np.ones((len(LAYERS), WIDTH), dtype=np.float32)
    for entry in range(SLOTS):
        row = int(state.slot_circuits[slot, entry])
        if row < 0:
            continue
        for at, layer in enumerate(LAYERS):
            packed = table.layer_masks(layer)[row].numpy()
            held = np.unpackbits(packed, bitorder="little")[:WIDTH].astype(bool)
            result[at, held] *= np.float32(state.slot_multipliers[slot, entry])
    return result


def expected_factors(steering: Steering) -> np.ndarray:
    result = np.ones((len(LAYERS), WIDTH), dtype=np.float32)
    for digest, multiplier in steering.pairs:
        for neuron in CIRCUITS[digest].neurons:
            result[neuron.layer, neuron.index] *= np.float32(multiplier)
    return result


@dataclass
class Request:
    steering: Steering | None
    prompt_len: int
    computed: int = 0
    outputs: int = 0
    running: bool = True
    known: bool = field(default=True)  # False between a V2 preemption and the resume

    @property
    def total(self) -> int:
        return self.prompt_len + self.outputs


class Schedules(RuleBasedStateMachine):
    """A scheduler that does whatever a scheduler may do; subclasses fix the runner's style."""

    readds_after_preemption: bool

    @initialize()
    def start(self) -> None:
        self.table, self.state = make_state()
        self.requests: dict[str, Request] = {}
        self.counts: Counter[str] = Counter()
        self.made = 0
        self.last: list[str] = []
        # V1 hands over the same list and arrays each step, changed in place.
        self.handed: tuple[list[str], np.ndarray, np.ndarray] = (
            [],
            np.full(MAX_REQS + 4, 7, dtype=np.int32),
            np.full(MAX_REQS + 4, 7, dtype=np.int32),
        )

    def ids(self, running: bool) -> list[str]:
        return [i for i, r in self.requests.items() if r.running == running]

    @precondition(lambda self: len(self.ids(True)) < MAX_REQS)
    @rule(steering=STEERINGS, prompt_len=st.integers(1, 20), cached=st.integers(0, 19))
    def add(self, steering: Steering | None, prompt_len: int, cached: int) -> None:
        """A new request; a prefix-cache hit never covers its last prompt token."""
        req_id = f"r{self.made}"
        self.made += 1
        self.state.add(req_id, steering, prompt_len)
        self.requests[req_id] = Request(steering, prompt_len, min(cached, prompt_len - 1))

    @precondition(lambda self: self.ids(True))
    @rule(data=st.data(), steering=STEERINGS, prompt_len=st.integers(1, 20))
    def replace(self, data: Any, steering: Steering | None, prompt_len: int) -> None:
        req_id = data.draw(st.sampled_from(self.ids(True)))
        self.state.add(req_id, steering, prompt_len)
        self.requests[req_id] = Request(steering, prompt_len)

    @precondition(lambda self: self.requests)
    @rule(data=st.data())
    def finish(self, data: Any) -> None:
        """Also aborts, of running and of preempted requests; runners may say so twice."""
        req_id = data.draw(st.sampled_from(sorted(self.requests)))
        del self.requests[req_id]
        self.state.remove(req_id)
        self.state.remove(req_id)
        self.state.suspend(req_id)

    @precondition(lambda self: self.ids(True))
    @rule(data=st.data())
    def preempt(self, data: Any) -> None:
        req_id = data.draw(st.sampled_from(self.ids(True)))
        request = self.requests[req_id]
        request.running, request.computed = False, 0
        if self.readds_after_preemption:
            self.state.remove(req_id)
            request.known = False
        else:
            self.state.suspend(req_id)

    @precondition(lambda self: self.ids(False) and len(self.ids(True)) < MAX_REQS)
    @rule(data=st.data())
    def resume(self, data: Any) -> None:
        req_id = data.draw(st.sampled_from(self.ids(False)))
        request = self.requests[req_id]
        request.running = True
        if self.readds_after_preemption:
            self.state.add(req_id, request.steering, request.prompt_len)
            request.known = True

    @rule(data=st.data())
    def step(self, data: Any) -> None:
        """Any subset of the running requests, in any order, in chunks of any size."""
        order = data.draw(st.permutations(self.ids(True)))
        batch: list[tuple[str, int, int]] = []
        drafts: dict[str, int] = {}
        budget = MAX_TOKENS
        for req_id in order[: data.draw(st.integers(0, len(order)))]:
            request = self.requests[req_id]
            left = request.total - request.computed
            chunk = data.draw(st.integers(1, left))
            if chunk == left:
                drafts[req_id] = data.draw(st.integers(0, 3))
                chunk += drafts[req_id]
            if chunk > budget:
                drafts.pop(req_id, None)
                continue
            budget -= chunk
            batch.append((req_id, chunk, request.computed))
        if data.draw(st.booleans()) and budget:
            dummy = ("dummy", data.draw(st.integers(1, budget)), data.draw(st.integers(0, 30)))
            batch.insert(data.draw(st.integers(0, len(batch))), dummy)
        self.run(batch)
        for req_id, chunk, _ in batch:
            if req_id not in self.requests:
                continue
            request = self.requests[req_id]
            request.computed += chunk
            if req_id in drafts:  # some drafts are accepted, the others rolled back
                accepted = data.draw(st.integers(0, drafts[req_id]))
                request.computed += accepted - drafts[req_id]
                request.outputs += accepted + 1

    @precondition(lambda self: self.last)
    @rule(
        widths=st.lists(st.sampled_from((1, 1, 1, 3)), min_size=1, max_size=3),
        swap=st.booleans(),
    )
    def decode(self, widths: list[int], swap: bool) -> None:
        """The last batch goes on as it is, one token or some drafts each, or in another order."""
        names = [name for name in self.last if name in self.ids(True)]
        for width in widths:
            batch = [(name, width, self.requests[name].computed) for name in names]
            self.run(batch[::-1] if swap else batch)
            for name in names:
                self.requests[name].computed += width
                self.requests[name].outputs += width

    def run(self, batch: list[tuple[str, int, int]]) -> None:
        """One step; every row of the whole buffer and all that is told of it are checked."""
        self.last = [req_id for req_id, _, _ in batch]
        names, scheduled, computed = self.handed
        if self.readds_after_preemption:
            names, scheduled, computed = [], scheduled.copy(), computed.copy()
        names[:] = self.last
        scheduled[: len(batch)] = [n for _, n, _ in batch]
        computed[: len(batch)] = [c for _, _, c in batch]
        self.state.fill(names, scheduled, computed)
        self.check(batch)

    def check(self, batch: list[tuple[str, int, int]]) -> None:
        slots = self.state.row_slot.tolist()
        row = 0
        slot_of: dict[str, int] = {}
        rows: Counter[str] = Counter()
        for req_id, chunk, computed in batch:
            request = self.requests.get(req_id)
            for position in range(computed, computed + chunk):
                slot = slots[row]
                row += 1
                if request is None or not steered(request.steering, request.prompt_len, position):
                    assert slot == -1, (req_id, position)
                    continue
                assert request.steering is not None
                assert 0 <= slot < MAX_REQS, (req_id, position)
                assert slot_of.setdefault(req_id, slot) == slot
                rows[req_id] += 1
                for digest, _ in request.steering.pairs:
                    self.counts[digest] += 1
        assert slots[row:] == [-1] * (MAX_TOKENS - row)
        assert len(set(slot_of.values())) == len(slot_of)
        told = self.state.step
        assert (told is not None) == bool(rows)
        if told is not None:
            assert told.rows == rows
            told_slots = dict(zip(told.req_ids, told.slots.tolist(), strict=True))
            assert {name: told_slots[name] for name in slot_of} == slot_of
        for req_id, slot in slot_of.items():
            steering = self.requests[req_id].steering
            assert steering is not None
            used = [int(r) for r in self.state.slot_circuits[slot] if r >= 0]
            assert len(used) == len(steering.pairs)
            assert np.array_equal(factors(self.state, self.table, slot), expected_factors(steering))

    @rule()
    def count(self) -> None:
        """A rule, not an invariant: reading the counters must not be what makes them right."""
        assert self.state.steered_tokens() == dict(self.counts)

    @invariant()
    def circuits_are_held_by_exactly_their_requests(self) -> None:
        held = Counter(
            digest
            for request in self.requests.values()
            if request.known and request.steering is not None
            for digest, _ in request.steering.pairs
        )
        assert {d: self.table.users(d) for d in CIRCUITS} == {d: held[d] for d in CIRCUITS}

    def teardown(self) -> None:
        if not hasattr(self, "requests"):
            return
        for req_id in list(self.requests):
            self.state.remove(req_id)
        self.requests.clear()
        self.run([("dummy", 3, 0)])
        assert (self.state.row_slot == -1).all()
        assert [self.table.users(digest) for digest in CIRCUITS] == [0] * len(CIRCUITS)
        assert self.state.steered_tokens() == dict(self.counts)
        # Every slot index is free again: as many new requests as there are get one each.
        steering = Steering(((min(CIRCUITS), 0.5),), "all")
        for i in range(MAX_REQS):
            self.state.add(f"new{i}", steering, 1)
            self.requests[f"new{i}"] = Request(steering, 1)
        self.run([(f"new{i}", 1, 0) for i in range(MAX_REQS)])
        assert sorted(self.state.row_slot[:MAX_REQS].tolist()) == list(range(MAX_REQS))


class SuspendingRunner(Schedules):
    """V1: a preempted request keeps its state and runs again without being added."""

    readds_after_preemption = False


class ReaddingRunner(Schedules):
    """V2: a preempted request is removed, and added again with its original prompt length."""

    readds_after_preemption = True


SETTINGS = settings(
    max_examples=120,
    stateful_step_count=30,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
TestSuspendingRunner = SuspendingRunner.TestCase
TestSuspendingRunner.settings = SETTINGS
TestReaddingRunner = ReaddingRunner.TestCase
TestReaddingRunner.settings = SETTINGS


def fill(state: SteeringState, *batch: tuple[str, int, int]) -> list[int]:
    """Runs one step and returns the rows of the batch."""
    state.fill(
        [b[0] for b in batch],
        np.array([b[1] for b in batch], dtype=np.int32),
        np.array([b[2] for b in batch], dtype=np.int32),
    )
    return state.row_slot[: sum(b[1] for b in batch)].tolist()


def any_steering(scope: str = "last", multiplier: float = 0.0) -> Steering:
    return Steering(((min(CIRCUITS), multiplier),), scope)


def test_chunk_ends_are_not_steered() -> None:
    _, state = make_state()
    state.add("a", any_steering(), 10)
    assert fill(state, ("a", 4, 0)) == [-1] * 4
    assert fill(state, ("a", 4, 4)) == [-1] * 4
    (*before, last) = fill(state, ("a", 2, 8))
    assert before == [-1]
    assert last >= 0
    assert fill(state, ("a", 3, 10)) == [last] * 3


def test_recompute_steers_earlier_output_and_no_other_prompt_row() -> None:
    """The resumed prefill covers prompt and output; only the original prompt counts as prompt."""
    for readd in (False, True):
        _, state = make_state()
        state.add("a", any_steering(), 3)
        fill(state, ("a", 3, 0))
        if readd:
            state.remove("a")
            state.add("a", any_steering(), 3)
        else:
            state.suspend("a")
        slots = fill(state, ("a", 8, 0))
        assert slots[:2] == [-1, -1]
        assert min(slots[2:]) >= 0


def test_ids_match_whole() -> None:
    _, state = make_state()
    state.add("foo", any_steering("all"), 2)
    assert fill(state, ("foo-bar", 2, 0), ("0_foo", 2, 0), ("fo", 2, 0)) == [-1] * 6


def test_more_preempted_requests_than_arms() -> None:
    """All of them come back, in an order that no slot index remembers."""
    _, state = make_state(max_reqs=2)
    names = [f"r{i}" for i in range(9)]
    for name in names:
        state.add(name, any_steering("all", float(name[1:]) + 2), 4)
        assert fill(state, (name, 1, 0)) != [-1]
        state.suspend(name)
    for left, right in zip(reversed(names), names, strict=True):
        batch = [left] if left == right else [left, right]
        slots = fill(state, *((name, 1, 0) for name in batch))
        multipliers = [float(state.slot_multipliers[slot, 0]) for slot in slots]
        assert multipliers == [float(name[1:]) + 2 for name in batch]
        for name in batch:
            state.suspend(name)


def test_the_same_batch_after_a_preemption_takes_a_new_slot() -> None:
    """The list of requests is the last step's, yet the slot may since be another request's."""
    _, state = make_state(max_reqs=2)
    for name, multiplier in (("a", 2.0), ("b", 0.5)):
        state.add(name, any_steering("all", multiplier), 4)
    fill(state, ("a", 1, 0))
    state.suspend("a")
    (slot,) = fill(state, ("a", 1, 0))
    assert fill(state, ("b", 1, 0)) != [slot]
    assert fill(state, ("a", 1, 1)) == [slot]
    assert float(state.slot_multipliers[slot, 0]) == 2.0
    assert state.steered_tokens() == {min(CIRCUITS): 4}


def test_rows_after_a_shrinking_batch_are_plain() -> None:
    _, state = make_state()
    state.add("a", any_steering("all"), 40)
    assert min(fill(state, ("a", 40, 0))) >= 0
    fill(state, ("plain", 1, 5))
    assert (state.row_slot == -1).all()
    fill(state, ("a", 30, 0))
    state.remove("a")
    fill(state, ("plain", 2, 5))
    assert (state.row_slot == -1).all()


def test_addresses_never_change() -> None:
    _, state = make_state()
    tensors = [state.row_slot, state.slot_circuits, state.slot_multipliers]
    before = [t.data_ptr() for t in tensors]
    buffers = state.buffers()
    for i in range(3):
        state.add(f"r{i}", any_steering("all"), 4)
        fill(state, *((f"r{j}", 4, 0) for j in range(i + 1)))
    after = [buffers.row_slot, buffers.slot_circuits, buffers.slot_multipliers]
    assert [t.data_ptr() for t in after] == before
    assert tensors[0] is state.row_slot


def test_too_many_circuits_are_refused() -> None:
    table, state = make_state()
    pairs = tuple((digest, 0.5) for digest in [*CIRCUITS, UNUSED.digest])
    with pytest.raises(ValueError, match="4 circuits, over 3"):
        state.add("a", Steering(pairs, "all"), 2)
    assert [table.users(digest) for digest, _ in pairs] == [0] * 4


def test_a_circuit_that_is_not_resident_is_refused_and_holds_nothing() -> None:
    table, state = make_state()
    known = min(CIRCUITS)
    with pytest.raises(CircuitTableError, match="refusing to run it unsteered"):
        state.add("a", Steering(((known, 0.5), ("f" * 64, 0.5)), "all"), 2)
    assert fill(state, ("a", 2, 0)) == [-1, -1]
    assert table.users(known) == 0


@given(st.lists(st.sampled_from(MULTIPLIERS), min_size=2, max_size=SLOTS))
@settings(max_examples=20, deadline=None)
def test_one_circuit_several_times_counts_a_row_once(multipliers: list[float]) -> None:
    """Two names can stand for equal content; their multipliers multiply."""
    table, state = make_state()
    digest = min(CIRCUITS)
    state.add("a", Steering(tuple((digest, m) for m in sorted(multipliers)), "all"), 2)
    (slot, *_) = fill(state, ("a", 2, 0))
    product = np.float32(1)
    for multiplier in sorted(multipliers):
        product *= np.float32(multiplier)
    assert set(factors(state, table, slot).reshape(-1).tolist()) == {1.0, float(product)}
    assert state.steered_tokens() == {digest: 2}
    state.remove("a")
    assert table.users(digest) == 0
