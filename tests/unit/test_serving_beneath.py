# SPDX-License-Identifier: Apache-2.0
"""Files are read beneath one folder only."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from cna_vllm.serving.front.beneath import PathError, read_beneath


@pytest.fixture
def folder(tmp_path: Path) -> str:
    inside = tmp_path / "inside"
    (inside / "sub").mkdir(parents=True)
    (inside / "a.json").write_bytes(b"a")
    (inside / "sub" / "b.json").write_bytes(b"b")
    (tmp_path / "secret").write_bytes(b"secret")
    (inside / "link").symlink_to(tmp_path / "secret")
    (inside / "near").symlink_to("a.json")
    (inside / "up").symlink_to(tmp_path)
    os.mkfifo(inside / "pipe")
    return str(inside)


def test_files_of_the_folder_are_read(folder: str) -> None:
    assert read_beneath(folder, "a.json", 1) == b"a"
    assert read_beneath(folder, "sub/b.json", 10) == b"b"


@pytest.mark.parametrize(
    "path",
    ["", ".", "..", "../secret", "/etc/passwd", "sub/../a.json", "./a.json", "sub//b.json",
     "a.json/", "link", "near", "up/secret", "pipe", "sub", "none", "a\0b", "sub\\b.json",
     "x" * 5000, "~", "\ud800"],
)  # fmt: skip
def test_everything_else_is_refused(folder: str, path: str) -> None:
    with pytest.raises(PathError) as error:
        read_beneath(folder, path, 100)
    assert folder not in str(error.value)


def test_a_large_file_is_refused(folder: str) -> None:
    with pytest.raises(PathError, match="larger than 0 bytes"):
        read_beneath(folder, "a.json", 0)
