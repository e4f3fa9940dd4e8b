"""Lists of files on disk equal lists in memory, for any name."""

import os
import random
from pathlib import Path

import pytest

from ssl_core.data.sources import file_list
from ssl_core.data.sources.file_list import File, Files, sorted_files

NAMES = ["b/2.png", "a\n.png", "", "é.png", os.fsdecode(b"\xff.png"), "\ud800.png", "a" * 5000, "b/10.png"]
LISTED = [File(name, number, 2**40 + number, number) for number, name in enumerate(NAMES)]


def test_files_come_back_by_position_and_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file_list, "BLOCK", 3)
    files = Files(iter(LISTED), tmp_path)
    assert list(files) == LISTED
    assert [files[position] for position in range(len(files))] == LISTED
    assert files[-1] == LISTED[-1]
    assert not list(Files([], tmp_path))
    with pytest.raises(IndexError):
        files[len(LISTED)]


def test_nothing_is_left_on_disk_or_open(tmp_path: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    files = Files(LISTED, tmp_path)
    assert not list(tmp_path.iterdir())
    del files
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize("run", [1, 7, 100])
def test_sorting_on_disk_is_sorting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: int) -> None:
    monkeypatch.setattr(file_list, "RUN", run)
    files = [*LISTED, *(File(name, 0, offset) for name in ("x", "y") for offset in (300, 20, 1))]
    random.Random(0).shuffle(files)
    assert list(sorted_files(iter(files), tmp_path)) == sorted(files)
    assert list(sorted_files(iter(()), tmp_path)) == []
