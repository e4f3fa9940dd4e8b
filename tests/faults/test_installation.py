"""`make install` is killed at each of its steps; the same command then installs everything."""

import os
import shutil
import signal
import subprocess
from pathlib import Path

import pytest

# In place of Python: each step writes half a file, then the whole one. The step in $KILLED kills make in between.
PYTHON = """#!/bin/sh
case "$1 $2 $3 $4" in
-c*) exit 0 ;;
"-m pip --version "*) exec test -e .venv/venv ;;
"-m venv "*) mkdir -p .venv/bin; step=venv ;;
"-m pip install "*) step=pip ;;
"-m uv pip sync") step=sync ;;
"-m uv pip install") step=editable ;;
esac
[ ! -e .venv/$step ] || exit 0  # as pip and uv: a package that is there is not checked
echo half > .venv/$step
[ $step = venv ] && cp "$0" .venv/bin/python
[ "$KILLED" = $step ] && kill -9 0
echo whole > .venv/$step
"""
STEPS = ("venv", "pip", "sync", "editable")


def install(folder: Path, *, killed: str = "") -> "subprocess.CompletedProcess[str]":
    command = ["make", "install", f"PYTHON={folder}/python3"]
    environment = {**os.environ, "KILLED": killed}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, start_new_session=True)


@pytest.fixture
def project(root: Path, tmp_path: Path) -> Path:
    for file in ("Makefile", "pyproject.toml", "requirements.lock", "requirements-slurm.lock"):
        shutil.copy(root / file, tmp_path)
    (tmp_path / "python3").write_text(PYTHON)
    (tmp_path / "python3").chmod(0o755)
    return tmp_path


def installed(folder: Path) -> dict[str, str]:
    return {step: (folder / ".venv" / step).read_text().strip() for step in STEPS}


@pytest.mark.parametrize("step", STEPS)
def test_an_installation_killed_at_any_step_is_completed_by_the_same_command(step: str, project: Path) -> None:
    assert install(project, killed=step).returncode == -signal.SIGKILL
    assert not (project / ".venv" / ".installed").exists()
    run = install(project)
    assert run.returncode == 0, run.stderr
    assert installed(project) == dict.fromkeys(STEPS, "whole")
    assert "Nothing to be done" in install(project).stdout


@pytest.mark.parametrize("step", STEPS[1:])
def test_an_update_killed_at_any_step_is_completed_by_the_same_command(step: str, project: Path) -> None:
    assert install(project).returncode == 0
    (project / ".venv" / step).unlink()  # the step has work to do
    os.utime(project / ".venv" / ".installed", (0, 0))  # older than requirements.lock
    assert install(project, killed=step).returncode == -signal.SIGKILL
    assert install(project).returncode == 0
    assert installed(project) == dict.fromkeys(STEPS, "whole")
