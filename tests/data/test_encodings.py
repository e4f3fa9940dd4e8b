"""Names with umlauts: the locale of the machine decides nothing."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.data.test_sources import png

CARD = """\
name: cards
source: {type: table, folder: Fotos für é, splits: {train: {file: Fotos für é/tabelle.csv}}}
image_size: 4
licence: frei, © Jürgen
"""


def shard(folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [str(Path(sys.executable).parent / "ssl-core"), "shard", "cards.yaml", "--output", "out"]
    return subprocess.run(
        [*command, "--threads", "1"], cwd=folder, env={**os.environ, **environment}, capture_output=True, text=True
    )


@pytest.mark.parametrize(
    "environment",
    [{"LC_ALL": "C"}, {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}],
    ids=["C", "a locale without UTF-8"],
)
def test_a_card_a_table_and_images_with_umlauts_in_any_locale(tmp_path: Path, environment: dict[str, str]) -> None:
    images = tmp_path / "Fotos für é"
    images.mkdir()
    (images / "Vögel 1.png").write_bytes(png(1))
    (images / "tabelle.csv").write_text("path,label\nVögel 1.png,Zaunkönig\n", encoding="utf-8")
    (tmp_path / "cards.yaml").write_text(CARD, encoding="utf-8")
    run = shard(tmp_path, **environment)
    assert (run.returncode, run.stderr.count("Traceback")) == (0, 0), run.stderr
    assert "Zaunkönig" in (tmp_path / "out" / "manifest.json").read_text(encoding="utf-8")
    (images / "tabelle.csv").write_text("path,label\nVögel 2.png,Zaunkönig\n", encoding="utf-8")
    run = shard(tmp_path, **environment)
    assert run.returncode == 2
    assert run.stderr.splitlines()[-1].startswith("error: Vögel 2.png: No such file or directory")


def test_every_file_is_opened_as_utf8(root: Path) -> None:
    rule = ["--preview", "--select", "PLW1514"]  # `open` in text mode without an encoding
    run = subprocess.run(["ruff", "check", "--no-cache", *rule, "ssl_core"], cwd=root, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout
