# SPDX-License-Identifier: Apache-2.0
"""The partial file: nothing lost or doubled wherever a crash cut it; other runs are refused."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cna_vllm.batch.partial import BatchError, PartialFile, _lock, discard, partial_path

IDENTITY = {"model": "tiny", "prompts": "1" * 64}
ROWS = [
    {"index": i, "text": text, "token_ids": list(range(i))}
    for i, text in enumerate(["", "plain", 'quo"te\n', "日本語", "\u2028", "x" * 70_000, "é\\"])
]
WHOLE = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS).encode("utf-8")


def write(target: Path, order: list[int], identity: dict[str, Any] = IDENTITY) -> bytes:
    with PartialFile(target, identity, len(ROWS)) as partial:
        for position in order:
            partial.append(position, ROWS[position])
        return partial_path(target).read_bytes()


@settings(deadline=None)
@given(data=st.data())
def test_cut_at_any_byte_then_gone_on_with_gives_the_whole(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    target = tmp_path_factory.mktemp("run") / "out.jsonl"
    order = data.draw(st.permutations(range(len(ROWS))))
    count = data.draw(st.integers(0, len(ROWS)))
    written = write(target, order[:count])
    ends = [i + 1 for i, byte in enumerate(written) if byte == ord("\n")]
    near = st.sampled_from(ends).flatmap(lambda e: st.integers(e - 2, min(e + 2, len(written))))
    cut = data.draw(st.one_of(st.integers(0, len(written)), near))
    # What a power cut can leave after what was written: nothing, zeros, half of another line.
    tail = data.draw(st.sampled_from([b"", b"\0" * 10, b'{"at": 0, "row', b"\xff\n", b"3\n"]))
    partial_path(target).write_bytes(written[:cut] + tail)
    kept = sum(end <= cut for end in ends) - 1
    if kept < 0 and tail.endswith(b"\n"):  # a whole line that is no header is not ours to replace
        with pytest.raises(BatchError):
            PartialFile(target, IDENTITY, len(ROWS))
        return
    with PartialFile(target, IDENTITY, len(ROWS)) as partial:
        assert partial.done == set(order[: max(kept, 0)])
        missing = [position for position in range(len(ROWS)) if position not in partial.done]
        random.Random(cut).shuffle(missing)
        for position in missing:
            partial.append(position, ROWS[position])
        partial.finish()
    assert target.read_bytes() == WHOLE
    assert not partial_path(target).exists()


def test_a_row_that_is_there_twice_counts_once(tmp_path: Path) -> None:
    target = tmp_path / "out.jsonl"
    written = write(target, list(range(len(ROWS))))
    again = json.dumps({"at": 2, "row": {"index": "another"}}).encode() + b"\n"
    partial_path(target).write_bytes(written + again)
    with PartialFile(target, IDENTITY, len(ROWS)) as partial:
        partial.finish()
    assert target.read_bytes() == WHOLE


def test_an_unfinished_run_writes_no_target(tmp_path: Path) -> None:
    with PartialFile(tmp_path / "out.jsonl", IDENTITY, len(ROWS)) as partial:
        partial.append(1, ROWS[1])
        with pytest.raises(BatchError, match="6 of 7 rows are missing"):
            partial.finish()
    assert not (tmp_path / "out.jsonl").exists()


@pytest.mark.parametrize(
    ("identity", "says"),
    [
        ({**IDENTITY, "model": "other"}, '(model: "tiny" then, "other" now)'),
        ({**IDENTITY, "prompts": "2" * 64}, "(prompts)"),
        ({"model": "tiny"}, "(prompts)"),
        ({**IDENTITY, "vllm": "0.33.0"}, '(vllm: null then, "0.33.0" now)'),
    ],
)
def test_another_run_is_refused_and_kept(
    tmp_path: Path, identity: dict[str, Any], says: str
) -> None:
    target = tmp_path / "out.jsonl"
    written = write(target, [0, 3])
    with pytest.raises(BatchError) as refused:
        PartialFile(target, identity, len(ROWS))
    assert says in str(refused.value) and "--restart" in str(refused.value)
    assert "\n" not in str(refused.value)
    assert partial_path(target).read_bytes() == written
    discard(target)
    with PartialFile(target, identity, len(ROWS)) as partial:
        assert not partial.done


@pytest.mark.parametrize("line", [b"{}\n", b"\n", b'{"format": "cna-batch-partial"}\n', b"[1]\n"])
def test_a_file_of_another_kind_is_refused(tmp_path: Path, line: bytes) -> None:
    partial_path(tmp_path / "o").write_bytes(line)
    with pytest.raises(BatchError, match="--restart"):
        PartialFile(tmp_path / "o", IDENTITY, 1)


def test_a_run_that_kept_nothing_leaves_nothing(tmp_path: Path) -> None:
    write(tmp_path / "o", [])
    assert not list(tmp_path.iterdir())


def test_identity_is_compared_as_json_has_it(tmp_path: Path) -> None:
    identity = {"arms": ("a", 1.0), "digests": {1: "x"}}
    write(tmp_path / "o", [0], identity)
    with PartialFile(tmp_path / "o", identity, len(ROWS)) as partial:
        assert partial.done == {0}


def test_one_process_at_a_time(tmp_path: Path) -> None:
    target = tmp_path / "out.jsonl"
    code = (
        "import sys; from pathlib import Path; from cna_vllm.batch.partial import *\n"
        "try: {}\nexcept BatchError as error: print(error)"
    )
    ways = ("PartialFile(Path(sys.argv[1]), {}, 1)", "discard(Path(sys.argv[1]))")
    with PartialFile(target, IDENTITY, len(ROWS)) as partial:
        for way in ways:
            command = [sys.executable, "-c", code.format(way), str(target)]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            assert "another process is writing it" in done.stdout
        for position, row in enumerate(ROWS):
            partial.append(position, row)
        # Opened before the other process finished, locked after: nothing is there to go on with.
        late = open(partial_path(target), "a+b")  # noqa: SIM115
        partial.finish()
    with late, pytest.raises(BatchError, match="another process"):
        _lock(late.fileno(), target)
    assert target.read_bytes() == WHOLE
