"""Names with umlauts: the locale of the machine decides nothing."""

import os
import subprocess
import sys
from pathlib import Path

from tests.data.test_sources import png

CARD = """\
name: cards
source: {type: table, folder: Fotos für é, splits: {train: {file: Fotos für é/tabelle.csv}}}
image_size: 4
licence: frei, © Jürgen
"""


def shard(folder: Path) -> subprocess.CompletedProcess[str]:
    program = str(Path(sys.executable).parent / "ssl-core")
    command = [program, "shard", "cards.yaml", "--output", "out", "--threads", "1"]
    environment = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


def test_a_card_a_table_and_images_with_umlauts_in_a_locale_without_utf8(tmp_path: Path) -> None:
    images = tmp_path / "Fotos für é"
    images.mkdir()
    (images / "Vögel 1.png").write_bytes(png(1))
    (images / "tabelle.csv").write_text("path,label\nVögel 1.png,Zaunkönig\n", encoding="utf-8")
    (tmp_path / "cards.yaml").write_text(CARD, encoding="utf-8")
    run = shard(tmp_path)
    assert (run.returncode, run.stderr.count("Traceback")) == (0, 0), run.stderr
    assert "Zaunkönig" in (tmp_path / "out" / "manifest.json").read_text(encoding="utf-8")
    (images / "tabelle.csv").write_text("path,label\nVögel 2.png,Zaunkönig\n", encoding="utf-8")
    run = shard(tmp_path)
    assert run.returncode == 2
    assert run.stderr.splitlines()[-1].startswith("error: Vögel 2.png: No such file or directory")


def test_every_file_is_opened_as_utf8(root: Path) -> None:
    rule = ["--preview", "--select", "PLW1514"]  # `open` in text mode without an encoding
    run = subprocess.run(["ruff", "check", "--no-cache", *rule, "ssl_core"], cwd=root, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout
