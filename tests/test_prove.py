"""`make prove` removes its checkout of the other revision, however it ends."""

import importlib.util
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

GIT = ("git", "-c", "user.name=tester", "-c", "user.email=tester@localhost")


@pytest.fixture
def prove(root: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("prove", root / "workflow" / "prove.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_proof_ended_by_sigterm_leaves_no_checkout(
    prove: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    subprocess.run([*GIT, "init", "--quiet"], cwd=tmp_path, check=True)
    subprocess.run([*GIT, "commit", "--quiet", "--allow-empty", "-m", "first"], cwd=tmp_path, check=True)
    checkouts = []

    def compare(*_: object, **__: object) -> None:
        checkouts.append(worktrees(tmp_path))
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(prove, "ROOT", tmp_path)
    monkeypatch.setattr(prove, "compare", compare)
    monkeypatch.setattr(sys, "argv", ["prove.py", "HEAD"])
    handler = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit, match="143"):
        prove.main()
    signal.signal(signal.SIGTERM, handler)
    assert checkouts == [2]
    assert worktrees(tmp_path) == 1


def worktrees(folder: Path) -> int:
    """Return the number of checkouts of a repository."""
    command = [*GIT, "worktree", "list"]
    return len(subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True).stdout.splitlines())
