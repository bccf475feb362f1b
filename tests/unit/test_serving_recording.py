# SPDX-License-Identifier: Apache-2.0
"""Recording under random schedules against one float64 sum per group, kept by hand."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from cna_kernels import record_rows
from cna_vllm.serving.worker.recording import Recorder
from cna_vllm.serving.worker.share import NO_EXPERT, Part

LAYERS, OFFSET, WIDTH, MAX_REQS, MAX_TOKENS = (2, 5), 7, 5, 3, 32


class Engine:
    """A recorder, a source of activations, and the sums a test expects.

    Activations are multiples of 1/256, so float64 sums of any order are exact.
    """

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        self.dtype = dtype
        parts = [Part(layer, NO_EXPERT, OFFSET, WIDTH) for layer in LAYERS]
        self.recorder = Recorder(parts, dtype, MAX_REQS, MAX_TOKENS, torch.device("cpu"))
        self.addresses = self.tensors()
        self.random = np.random.default_rng(0)
        self.sums: dict[str, NDArray[np.float64]] = {}
        self.counts: dict[str, int] = {}

    def tensors(self) -> list[int]:
        stages = [self.recorder.share.stage(layer) for layer in LAYERS]
        return [t.data_ptr() for t in (self.recorder.row_record, *stages)]

    def step(self, *batch: tuple[str, int, int], expect: dict[str, tuple[str, int]]) -> None:
        """One forward pass of padded rows; expect: request -> (group, position) to record now."""
        self.recorder.fill(
            [b[0] for b in batch],
            np.array([b[1] for b in batch], dtype=np.int32),
            np.array([b[2] for b in batch], dtype=np.int32),
        )
        flagged = set()
        values = self.random.integers(-4096, 4096, (len(LAYERS), MAX_TOKENS, WIDTH)) / 256
        rows = torch.from_numpy(values).to(self.dtype)
        row = 0
        for req_id, scheduled, computed in batch:
            group, wanted = expect.get(req_id, ("", -1))
            for position in range(computed, computed + scheduled):
                if position == wanted:
                    flagged.add(row)
                    value = rows[:, row].double().numpy()
                    self.sums[group] = self.sums.get(group, 0.0) + value
                    self.counts[group] = self.counts.get(group, 0) + 1
                row += 1
        slots = self.recorder.row_record.tolist()
        assert {i for i, slot in enumerate(slots) if slot >= 0} == flagged
        assert len({slots[i] for i in flagged}) == len(flagged)
        for at, layer in enumerate(LAYERS):
            record_rows(rows[at].contiguous(), self.recorder.row_record, self._stage(layer))

    def _stage(self, layer: int) -> torch.Tensor:
        return self.recorder.share.stage(layer)

    def check(self) -> None:
        taken = self.recorder.take()
        parts = np.frombuffer(taken["parts"], dtype=np.int32).reshape(-1, 4)
        assert parts.tolist() == [[layer, -1, OFFSET, WIDTH] for layer in LAYERS]
        assert {g: found["count"] for g, found in taken["groups"].items()} == self.counts
        for group, found in taken["groups"].items():
            total = np.frombuffer(found["sum"], dtype=np.float64).reshape(len(LAYERS), WIDTH)
            assert np.array_equal(total, self.sums[group])
            assert set(np.frombuffer(found["reached"], dtype=np.int64)) == {found["count"]}
        self.sums, self.counts = {}, {}
        assert self.recorder.take()["groups"] == {}, "taking starts again from nothing"
        assert self.tensors() == self.addresses


GROUPS = st.sampled_from(["positive", "negative", None])


@given(st.data(), st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
@settings(max_examples=100, deadline=None)
def test_each_request_once_at_its_last_prompt_token(data: Any, dtype: torch.dtype) -> None:
    engine = Engine(dtype)
    running: dict[str, dict[str, Any]] = {}
    made = 0
    for _ in range(data.draw(st.integers(1, 25))):
        action = data.draw(
            st.sampled_from(["add", "step", "step", "step", "preempt", "end", "take"])
        )
        if action == "add" and len(running) < MAX_REQS:
            prompt_len, group = data.draw(st.integers(1, 12)), data.draw(GROUPS)
            engine.recorder.add(f"r{made}", group, prompt_len)
            cached = data.draw(st.integers(0, prompt_len - 1))
            running[f"r{made}"] = {"p": prompt_len, "group": group, "computed": cached, "total": 0}
            running[f"r{made}"]["total"] = prompt_len
            made += 1
        elif action == "preempt" and running:
            # V1: nothing is said to the recorder; the request starts over.
            running[data.draw(st.sampled_from(sorted(running)))]["computed"] = 0
        elif action == "end" and running:
            req_id = data.draw(st.sampled_from(sorted(running)))
            engine.recorder.remove(req_id)
            del running[req_id]
        elif action == "take":
            engine.check()
        elif action == "step":
            batch, expect, budget = [], {}, MAX_TOKENS - 3
            for req_id in data.draw(st.permutations(sorted(running))):
                request = running[req_id]
                scheduled = data.draw(st.integers(0, request["total"] - request["computed"]))
                scheduled = min(scheduled, budget)
                if not scheduled:
                    continue
                budget -= scheduled
                batch.append((req_id, scheduled, request["computed"]))
                at = request["p"] - 1
                request["computed"] += scheduled
                if request["computed"] > at and request["group"] is not None:
                    expect[req_id] = (request["group"], at)
                    request["group"] = None
                if request["computed"] == request["total"]:
                    request["total"] += 1
            batch.insert(data.draw(st.integers(0, len(batch))), ("dummy", 3, 0))
            engine.step(*batch, expect=expect)
    engine.check()


def test_chunk_ends_and_decodes_are_not_recorded() -> None:
    engine = Engine()
    engine.recorder.add("a", "g", 7)
    engine.step(("a", 3, 0), expect={})
    engine.step(("a", 3, 3), expect={})
    engine.step(("a", 1, 6), expect={"a": ("g", 6)})
    engine.step(("a", 1, 7), expect={})
    assert (engine.recorder.row_record == -1).all()
    engine.check()


def test_preempted_before_its_last_prompt_token() -> None:
    engine = Engine()
    engine.recorder.add("a", "g", 7)
    engine.step(("a", 5, 0), expect={})
    engine.recorder.remove("a")
    engine.recorder.add("a", "g", 7)
    engine.step(("a", 7, 0), expect={"a": ("g", 6)})
    engine.check()


@pytest.mark.parametrize("readded", [False, True], ids=["V1", "V2"])
@pytest.mark.parametrize("drained", [False, True])
def test_recompute_after_preemption_is_not_counted_again(readded: bool, drained: bool) -> None:
    """V1 keeps the request; V2 removes it and adds it again with its original prompt length."""
    engine = Engine()
    engine.recorder.add("a", "g", 4)
    engine.recorder.add("b", "g", 4)
    engine.step(("a", 4, 0), expect={"a": ("g", 3)})
    if drained:
        engine.step(("b", 4, 0), expect={"b": ("g", 3)})
    if readded:
        engine.recorder.remove("a")
        engine.recorder.add("a", "g", 4)
    engine.step(("a", 6, 0), expect={})
    engine.check()


def test_aborted_before_it_was_recorded() -> None:
    engine = Engine()
    engine.recorder.add("a", "g", 4)
    engine.step(("a", 2, 0), expect={})
    engine.recorder.remove("a")
    engine.recorder.remove("a")
    engine.step(("a", 2, 2), expect={})
    engine.check()


def test_a_replaced_request_is_recorded_as_what_it_is_now() -> None:
    engine = Engine()
    engine.recorder.add("a", "old", 4)
    engine.recorder.add("a", "new", 2)
    engine.step(("a", 2, 0), expect={"a": ("new", 1)})
    engine.recorder.add("b", "old", 4)
    engine.recorder.add("b", None, 4)
    engine.step(("b", 4, 0), expect={})
    engine.check()


def test_a_full_step_and_groups_of_it() -> None:
    """Every slot is used, every row is the last, and groups do not touch each other."""
    engine = Engine()
    for i in range(MAX_REQS):
        engine.recorder.add(f"r{i}", f"g{i % 2}", 1)
    expect = {f"r{i}": (f"g{i % 2}", 0) for i in range(MAX_REQS)}
    engine.step(*((name, 1, 0) for name in expect), expect=expect)
    for i in range(MAX_REQS):
        engine.recorder.add(f"s{i}", "g1", 1)
    expect = {f"s{i}": ("g1", 0) for i in range(MAX_REQS)}
    engine.step(*((name, 1, 0) for name in expect), expect=expect)
    assert engine.counts == {"g0": 2, "g1": 4}
    engine.check()


def test_sums_do_not_lose_what_the_dtype_would() -> None:
    """4096 + 1/256 is not a float16; a sum of float16 rows must still be exact."""
    engine = Engine(torch.float16)
    for i, value in enumerate((4096.0, 1 / 256, -4096.0)):
        engine.recorder.add(f"r{i}", "g", 1)
        engine.recorder.fill([f"r{i}"], np.array([1]), np.array([0]))
        for layer in LAYERS:
            row = torch.full((1, WIDTH), value, dtype=torch.float16)
            record_rows(row, engine.recorder.row_record, engine.recorder.share.stage(layer))
    found = engine.recorder.take()["groups"]["g"]
    assert found["count"] == 3
    assert set(np.frombuffer(found["sum"], dtype=np.float64).tolist()) == {1 / 256}


def test_reports_cross_process_borders() -> None:
    engine = Engine()
    engine.recorder.start(top={"t": 2}, top_prompts=1)
    for name in ("g", "t"):
        engine.recorder.add(name, name, 1)
        engine.step((name, 1, 0), expect={name: (name, 0)})
    taken = engine.recorder.take()
    sums, top = taken["groups"]["g"], taken["top"]["t"]
    for kept, field in ((sums, "sum"), (sums, "reached"), (top, "keys"), (taken, "parts")):
        assert type(kept[field]) is bytes
        kept[field] = kept[field].hex()
    json.dumps(taken)


def record(engine: Engine, names: range, group: str | None = None) -> NDArray[np.float64]:
    """One step per prompt; what it held: [prompts, layers, width]."""
    rows = []
    for name in names:
        own = str(name) if group is None else group
        engine.sums.clear()
        engine.recorder.add(f"r{name}", own, 1)
        engine.step((f"r{name}", 1, 0), expect={f"r{name}": (own, 0)})
        rows.append(engine.sums[own])
    return np.stack(rows)


def test_the_strongest_neurons_of_each_prompt_beside_sums() -> None:
    engine = Engine()
    engine.recorder.start(top={"t": 3}, top_prompts=4)
    rows = record(engine, range(4), "t")
    record(engine, range(4, 6), "g")
    taken = engine.recorder.take()
    assert taken["groups"].keys() == {"g"} and taken["rows"] is None
    found = taken["top"]["t"]
    assert (found["names"], found["k"]) == (["r0", "r1", "r2", "r3"], 3)
    keys = np.frombuffer(found["keys"], dtype=np.uint64).reshape(4, 3)
    for prompt, key in zip(rows, keys, strict=True):
        strongest = sorted(range(2 * WIDTH), key=lambda i: (-abs(prompt.flat[i]), i))[:3]
        assert sorted(2**32 - 1 - (key & np.uint64(2**32 - 1))) == sorted(strongest)
        magnitudes = (key >> np.uint64(32)).astype(np.uint32).view(np.float32)
        assert sorted(magnitudes) == sorted(abs(prompt.flat[i]) for i in strongest)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_of_chosen_layers(dtype: torch.dtype) -> None:
    engine = Engine(dtype)
    engine.recorder.start(row_layers=[0, 5, 9], row_prompts=3)
    rows = record(engine, range(3))
    taken = engine.recorder.take()
    assert taken["groups"] == {} and taken["top"] == {}
    assert taken["rows"]["layers"] == [5]
    assert taken["rows"]["names"] == ["0", "1", "2"]
    found = np.frombuffer(taken["rows"]["rows"], dtype=np.float32).reshape(3, 1, WIDTH)
    assert np.array_equal(found, rows[:, 1:])


def test_a_plan_ends_when_its_recording_is_taken() -> None:
    engine = Engine()
    engine.recorder.start(top={"g": 1}, top_prompts=1, row_layers=[2], row_prompts=1)
    engine.recorder.take()
    record(engine, range(1), "g")
    assert engine.recorder.take()["groups"].keys() == {"g"}
    record(engine, range(1, 2), "g")
    engine.recorder.start()
    assert engine.recorder.take()["groups"] == {}, "starting forgets what was there"


def test_what_is_over_the_capacity_is_left_out() -> None:
    """The reader counts names; an engine's step must not fail."""
    engine = Engine()
    engine.recorder.start(top={"t": 1}, top_prompts=2)
    record(engine, range(3), "t")
    assert engine.recorder.take()["top"]["t"]["names"] == ["r0", "r1"]
    engine.recorder.start(row_layers=[2], row_prompts=2)
    record(engine, range(3))
    assert engine.recorder.take()["rows"]["names"] == ["0", "1"]


def test_memory_does_not_grow_with_the_prompts() -> None:
    def held(count: int) -> list[int]:
        engine = Engine()
        engine.recorder.start(top={"t": 2}, top_prompts=50)
        sizes = [engine.recorder.nbytes]
        record(engine, range(count), "g")
        record(engine, range(count, 2 * count), "t")
        engine.recorder.fill([], np.array([]), np.array([]))
        return [*sizes, engine.recorder.nbytes]

    few, many = held(50), held(500)
    assert few == many
    # row_record, the stage with a flag for each layer, one float64 sum and a count for each layer;
    # keys and their tie-breaks before the first prompt.
    stage = len(LAYERS) * (MAX_REQS * WIDTH * 4 + 1)
    keys = 8 * 50 * 2 + 8 * len(LAYERS) * WIDTH
    assert few == [4 * MAX_TOKENS + stage + keys, few[0] + 8 * len(LAYERS) * (WIDTH + 1)]


def test_steps_in_inference_mode_and_calls_outside_of_it() -> None:
    """The model runner's steps are in inference mode, calls from the front end need not be."""
    engine = Engine()
    engine.recorder.start(top={"t": 1}, top_prompts=3)
    with torch.inference_mode():
        record(engine, range(2), "g")
    record(engine, range(2, 4), "t")
    with torch.inference_mode():
        record(engine, range(4, 5), "t")
    taken = engine.recorder.take()
    assert taken["groups"]["g"]["count"] == 2
    assert len(taken["top"]["t"]["names"]) == 3
