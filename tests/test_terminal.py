"""Habits of the shell: a pager that ends early, a removed folder, odd numbers of threads."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from ssl_core import cli

COMMAND = "from ssl_core.cli import main; raise SystemExit(main())"


def test_a_reader_that_ends_early_gets_no_traceback(root: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-c", COMMAND, "recipes"]
    result = subprocess.run(command, cwd=root, stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert (result.returncode, result.stderr) == (141, "")


def test_a_removed_working_directory_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    assert cli.main(["init", "mine"]) == 2
    assert capsys.readouterr().err.startswith("error: the working directory was removed: change to another folder")


@pytest.mark.parametrize("threads", ["0", "-4", "two"])
def test_a_number_of_threads_that_is_none(threads: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["views", "x", f"--threads={threads}"])
    assert f"argument --threads: expected a number from 1 on, found '{threads}'" in capsys.readouterr().err
