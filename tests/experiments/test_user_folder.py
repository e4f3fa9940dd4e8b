"""`ssl-core init` writes a folder once and never over anything."""

from pathlib import Path

import pytest

from ssl_core import cli
from ssl_core.experiments import bundled

FILES = {"Snakefile", "config.yaml", "datasets/demo.yaml", "workflow/profiles/slurm/config.yaml"}


def files_in(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_a_folder_is_made_with_its_parents(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "folder"
    assert cli.main(["init", str(folder)]) == 0
    assert files_in(folder) == FILES
    assert (folder / "config.yaml").read_text() == bundled.CONFIG.read_text()
    assert str(bundled.ROOT) not in (folder / "Snakefile").read_text()  # the environment may move


def test_other_files_stay(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    assert cli.main(["init", str(tmp_path)]) == 0
    assert files_in(tmp_path) == FILES | {"notes.txt"}


@pytest.mark.parametrize("name", sorted(FILES))
def test_nothing_is_overwritten(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_text("mine")
    assert cli.main(["init", str(tmp_path)]) == 2
    message = f"error: {tmp_path / name} exists: remove it, or name another folder (nothing was written)\n"
    assert capsys.readouterr().err == message
    assert files_in(tmp_path) == {name}
    assert (tmp_path / name).read_text() == "mine"


def test_a_file_in_place_of_the_folder_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("mine")
    assert cli.main(["init", str(tmp_path / "file")]) == 2
    assert "is no folder" in capsys.readouterr().err
