"""A copied, moved or renamed project runs its own code, or one line names the remedy."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from .conftest import Project, copy_of


def test_the_workflow_refuses_the_code_of_another_folder(root: Path, fresh: Project) -> None:
    environment = {**os.environ, "PYTHONPATH": str(root)}
    command = ["snakemake", "-n", "--cores", "1"]
    answer = subprocess.run(command, cwd=fresh.folder, env=environment, capture_output=True, text=True)
    assert answer.returncode == 1
    lines = answer.stderr.splitlines()
    assert f"error: the code of {root} is installed, not that of {fresh.folder}: run `make install` in" in lines[-1]


@pytest.mark.parametrize("name", ["copied", "my proj \u00fc"])
def test_make_installs_anew_in_a_copied_folder_only(root: Path, name: str, tmp_path: Path) -> None:
    original, copied = tmp_path / "original", tmp_path / name
    programs = original / ".venv" / "bin"
    programs.mkdir(parents=True)
    for file in ("Makefile", "pyproject.toml", "requirements.lock", "requirements-slurm.lock"):
        shutil.copy(root / file, original)
    (programs / "ssl-core").write_text(f"#!{programs}/python\n")
    (original / ".venv" / ".installed").touch()
    shutil.copytree(original, copied)
    assert "is up to date" in dry_make(original)
    plan = dry_make(copied)
    assert "rm -rf .venv" in plan
    assert re.search(r'VIRTUAL_ENV="\$\(pwd -P\)/.venv" .* --editable \.', plan)


def dry_make(folder: Path) -> str:
    answer = subprocess.run(["make", "-n", ".venv/.installed"], cwd=folder, capture_output=True, text=True)
    assert answer.returncode == 0, answer.stderr
    return answer.stdout


def test_the_workflow_runs_in_a_folder_with_blanks_quotes_and_umlauts(template: Project, tmp_path: Path) -> None:
    project = copy_of(template, tmp_path / "my 'proj' \u00fc $(touch x); & #")
    config = project.config
    first = config["experiments"]["first"]
    weights = "the weights' file.safetensors"
    config["experiments"]["taken"] = {"dataset": {"name": "tiny"}, "backbone": first["backbone"], "weights": weights}
    config["reported"] = {"first": {"source": "O'Brien et al. \u00fc $(touch x)", "results": {"linear": 90.8}}}
    config["evaluations"] |= {"price": {"protocol": "cost"}, "looks": {"protocol": "pictures"}}
    project.configure(config)
    (project.folder / weights).write_text("weights")
    targets = ("all", "all_evaluations")
    run = project.snakemake(*targets)
    assert run.returncode == 0, run.stderr
    assert project.pending(*targets) == set()
    assert not list(tmp_path.rglob("x"))
    (prices,) = [call for call in project.calls() if call.startswith("cost taken")]
    assert "--pretrain" not in prices
