"""The notebook in the documents: its outputs are those of a run, the site shows its cells, and its code runs."""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.markdown import ROOT, commands, files

NOTEBOOK = ROOT / "docs/notebooks/use_a_network.ipynb"
SHORT = """
experiments:
  ressl_r18: {training: {epochs: 1, warmup_epochs: 0}}
evaluations:
  finetune: {epochs: 1}
"""


def module(path: str) -> ModuleType:
    """Import a file that is in no package."""
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    assert spec is not None
    assert spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


def code_cells(notebook: dict[str, Any]) -> list[dict[str, Any]]:
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def test_every_cell_was_run_in_order_and_the_file_is_small() -> None:
    cells = code_cells(json.loads(NOTEBOOK.read_text(encoding="utf-8")))
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    assert sum(len(cell["outputs"]) for cell in cells) >= len(cells) - 1
    assert NOTEBOOK.stat().st_size < 150_000


def test_the_page_of_the_site_has_the_notebooks_code_and_pictures() -> None:
    text = NOTEBOOK.read_text(encoding="utf-8")
    page, pictures = module("workflow/site.py").notebook_page(text, "notebooks/use_a_network")
    sources = ["".join(cell["source"]) for cell in code_cells(json.loads(text))]
    assert re.findall(r"^```python\n(.*?)\n```$", page, re.MULTILINE | re.DOTALL) == sources
    assert len(pictures) == text.count("image/png") > 1
    for name, content in pictures.items():
        assert f"]({Path(name).name})" in page
        assert content.startswith(b"\x89PNG")


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_the_code_runs_on_networks_made_as_the_page_tells(tmp_path: Path) -> None:
    page, notebook = tmp_path / "page.md", tmp_path / "notebook.ipynb"
    page.write_text(module("workflow/site.py").notebook_page(NOTEBOOK.read_text(encoding="utf-8"), "x")[0])
    for name, text in files(page).items():
        (tmp_path / name).write_text(text)
    (tmp_path / "short.yaml").write_text(SHORT)
    tool, *words = commands(page)[0]
    assert tool == "snakemake"
    place = ["--snakefile", str(ROOT / "Snakefile"), "--directory", str(tmp_path)]
    run = run_tool(tool, *words, "short.yaml", *place, folder=tmp_path)
    assert run.returncode == 0, run.stderr[-3000:]
    shutil.copy(NOTEBOOK, notebook)
    run = run_tool("python", str(ROOT / "docs/scripts/run_notebook.py"), str(notebook), folder=tmp_path)
    assert run.returncode == 0, run.stderr[-3000:]
    fresh, shown = (code_cells(json.loads(path.read_text(encoding="utf-8"))) for path in (notebook, NOTEBOOK))
    assert [kinds(cell) for cell in fresh] == [kinds(cell) for cell in shown]


def kinds(cell: dict[str, Any]) -> list[str]:
    return [output["output_type"] for output in cell["outputs"]]


def run_tool(*words: str, folder: Path) -> subprocess.CompletedProcess[str]:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT)}
    return subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True)
