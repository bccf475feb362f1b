# SPDX-License-Identifier: Apache-2.0
"""The resident table: exact bits, fixed addresses, and rows that outlive their unload."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cna_kernels import mask_width, pack_mask
from cna_vllm.serving.config import CircuitTableError
from cna_vllm.serving.worker.table import CircuitTable
from cna_vllm.steering.circuit import Circuit, Neuron

CPU = torch.device("cpu")


def make_circuit(*neurons: tuple[int, int], layers: int = 4, size: int = 26) -> Circuit:
    return Circuit("m", "A", layers, size, tuple(Neuron(*n) for n in neurons))


A = make_circuit((0, 0), (2, 25))
B = make_circuit((1, 7), (1, 8), (3, 13))
C = make_circuit((3, 12))
D = make_circuit((0, 1))


def make_table(rows: int = 3) -> CircuitTable:
    return CircuitTable(range(4), 0, 26, rows, CPU)


def assert_row(table: CircuitTable, row: int, circuit: Circuit) -> None:
    by_layer = circuit.by_layer()
    for layer in table.layers:
        assert torch.equal(table.layer_masks(layer)[row], pack_mask(by_layer.get(layer, ()), 26))


@st.composite
def sharded(draw: st.DrawFn) -> tuple[Circuit, int, list[list[int]]]:
    """A circuit, the width of a tensor-parallel share, and the layers of each stage."""
    layers, ranks, width = (
        draw(st.integers(1, 4)),
        draw(st.integers(1, 3)),
        draw(st.integers(1, 21)),
    )
    size = ranks * width
    neurons = draw(
        st.sets(st.tuples(st.integers(0, layers - 1), st.integers(0, size - 1)), min_size=1)
    )
    cut = draw(st.integers(0, layers))
    stages = [list(range(cut)), list(range(cut, layers))]
    return make_circuit(*neurons, layers=layers, size=size), width, stages


@given(sharded())
@settings(max_examples=80, deadline=None)
def test_the_shares_of_all_ranks_are_the_circuit(
    case: tuple[Circuit, int, list[list[int]]],
) -> None:
    circuit, width, stages = case
    found = []
    for offset in range(0, circuit.intermediate_size, width):
        for layers in stages:
            table = CircuitTable(layers, offset, width, 2, CPU)
            row = table.load(circuit.packed())
            for layer in layers:
                masks = table.layer_masks(layer)
                assert masks.shape == (2, mask_width(width))
                assert masks.dtype == torch.uint8
                assert not masks[1 - row].any()
                held = [int(b) >> bit & 1 for b in masks[row] for bit in range(8)]
                assert not any(held[width:]), "padding bits"
                found += [Neuron(layer, offset + i) for i, bit in enumerate(held) if bit]
    assert sorted(found, key=lambda n: n.place) == list(circuit.neurons)


def test_halves_that_do_not_split_a_byte() -> None:
    circuit = make_circuit((0, 0), (0, 12), (0, 13), (0, 25))
    for offset, channels in ((0, [0, 12]), (13, [0, 12])):
        table = CircuitTable([0], offset, 13, 1, CPU)
        table.load(circuit.packed())
        assert torch.equal(table.layer_masks(0)[0], pack_mask(channels, 13))
    table = CircuitTable([0], 13, 13, 1, CPU)
    table.load(make_circuit((0, 3), (0, 12)).packed())
    assert not table.layer_masks(0).any(), "all neurons on the other rank"


def test_loading_is_idempotent() -> None:
    table = make_table()
    row = table.load(A.packed())
    assert table.load(B.packed()) != row
    assert table.load(A.packed()) == row
    again = make_circuit((2, 25), (0, 0))
    assert table.load(again.packed()) == row
    assert table.loaded() == (A.digest, B.digest)
    assert_row(table, row, A)


def test_unload_and_reload() -> None:
    table = make_table()
    row = table.load(A.packed())
    assert table.unload(A.digest)
    assert not table.unload(A.digest)
    assert not table.unload(B.digest)
    assert table.loaded() == ()
    assert table.acquire([A.digest])[0] == row, (
        "a request admitted before the unload still finds it"
    )
    assert table.load(A.packed()) == row
    assert table.loaded() == (A.digest,)
    assert table.unload(A.digest)


def test_retired_rows_are_reused_oldest_first_and_only_when_needed() -> None:
    table = make_table()
    rows = {c.digest: table.load(c.packed()) for c in (A, B)}
    table.unload(B.digest)
    table.unload(A.digest)
    assert table.load(C.packed()) not in rows.values(), "a row that never held one comes first"
    assert table.load(D.packed()) == rows[B.digest], "unloaded first"
    assert_row(table, rows[B.digest], D)
    assert_row(table, rows[A.digest], A)
    with pytest.raises(CircuitTableError):
        table.acquire([B.digest])[0]
    assert table.users(B.digest) == 0
    assert table.acquire([A.digest])[0] == rows[A.digest]


def test_a_reload_starts_a_new_turn() -> None:
    table = make_table(2)
    first, second = table.load(A.packed()), table.load(B.packed())
    for circuit in (A, B):
        table.unload(circuit.digest)
    table.load(A.packed())
    table.unload(A.digest)
    assert table.load(C.packed()) == second, "B was unloaded before the last unload of A"
    assert table.load(D.packed()) == first


def test_a_row_with_running_users_is_never_overwritten() -> None:
    table = make_table(2)
    held, idle = table.load(A.packed()), table.load(B.packed())
    assert table.acquire([A.digest])[0] == held
    assert table.acquire([A.digest])[0] == held
    assert table.users(A.digest) == 2
    table.unload(A.digest)
    table.unload(B.digest)
    assert table.load(C.packed()) == idle, "the older one is in use"
    with pytest.raises(CircuitTableError):
        table.load(D.packed())
    table.release([held])
    with pytest.raises(CircuitTableError):
        table.load(D.packed())
    assert_row(table, held, A)
    assert_row(table, idle, C)
    table.release([held])
    assert table.users(A.digest) == 0
    assert table.load(D.packed()) == held
    assert_row(table, held, D)


def test_a_full_table_is_refused_and_unchanged() -> None:
    table = make_table(2)
    table.load(A.packed())
    table.load(B.packed())
    before = [table.layer_masks(layer).clone() for layer in table.layers]
    with pytest.raises(CircuitTableError, match=r"all 2 circuit rows.*cna\.max_circuits"):
        table.load(C.packed())
    assert table.loaded() == (A.digest, B.digest)
    for layer, masks in zip(table.layers, before, strict=True):
        assert torch.equal(table.layer_masks(layer), masks)
    with pytest.raises(CircuitTableError):
        table.acquire([C.digest])[0]


def test_addresses_never_change() -> None:
    table = make_table(2)
    views = {layer: table.layer_masks(layer) for layer in table.layers}
    before = {layer: view.data_ptr() for layer, view in views.items()}
    assert len(set(before.values())) == len(before)
    for circuit in (A, B, C, D, A):
        table.load(circuit.packed())
        table.unload(circuit.digest)
        assert {layer: table.layer_masks(layer).data_ptr() for layer in before} == before
    row = table.load(D.packed())
    assert torch.equal(views[0][row], pack_mask([1], 26)), "a view taken at start sees the load"
    assert table.nbytes == 4 * 2 * mask_width(26)


def test_unknown_digest() -> None:
    table = make_table()
    table.load(A.packed())
    with pytest.raises(CircuitTableError, match=f"{B.digest[:12]}.*not resident.*unsteered"):
        table.acquire([B.digest])[0]
    assert table.users(B.digest) == 0


ACTIONS = st.lists(
    st.tuples(st.sampled_from(["load", "unload", "acquire", "release"]), st.integers(0, 3)),
    max_size=40,
)


@given(ACTIONS, st.integers(1, 3))
@settings(max_examples=100, deadline=None)
def test_running_requests_keep_their_circuit(actions: list[tuple[str, int]], rows: int) -> None:
    """Whatever is loaded and unloaded around them."""
    table, circuits = make_table(rows), (A, B, C, D)
    running: list[tuple[Circuit, int]] = []
    wanted: set[str] = set()
    for action, which in actions:
        circuit = circuits[which]
        if action == "load":
            try:
                assert_row(table, table.load(circuit.packed()), circuit)
                wanted.add(circuit.digest)
            except CircuitTableError:
                in_use = wanted | {c.digest for c, _ in running}
                assert circuit.digest not in in_use
                assert len(in_use) == rows, "refused with a row to spare"
        elif action == "unload":
            assert table.unload(circuit.digest) == (circuit.digest in wanted)
            wanted.discard(circuit.digest)
        elif action == "acquire" and circuit.digest in wanted:
            running.append((circuit, table.acquire([circuit.digest])[0]))
        elif action == "release" and running:
            table.release([running.pop(which % len(running))[1]])
        for held, row in running:
            assert_row(table, row, held)
        assert set(table.loaded()) == wanted


def test_a_row_that_a_waiting_request_needs_is_not_overwritten() -> None:
    """Unloaded, and in no batch, but an admitted request has not run yet."""
    table = CircuitTable(range(2), 0, 8, 1, torch.device("cpu"))
    table.load(A.packed())
    table.unload(A.digest)
    with pytest.raises(CircuitTableError, match="max_circuits"):
        table.load(B.packed(), wanted=[A.digest])
    assert table.acquire([A.digest]) == (0,)
    table.release([0])
    table.load(B.packed())
    with pytest.raises(CircuitTableError, match="not resident"):
        table.acquire([A.digest])
