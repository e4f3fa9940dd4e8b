"""The same command continues an interrupted run, to the weights of an undisturbed run."""

import os
import random
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
import yaml

from tests.waiting import wait_until

from .conftest import finish, start

TARGET = "results/tiny/backbone.safetensors"
CONFIG = {
    "experiments": {
        "tiny": {
            "dataset": {"name": "demo", "subset": {"images": 128}},
            "backbone": {"name": "mobilenet_v3_small", "stem": "small"},
            "method": {"name": "ressl", "queue_size": 64, "projector_hidden": 32, "embedding_dim": 16, "warmup": 0.5},
            # A checkpoint after each of the 12 steps
            "training": {
                "epochs": 3,
                "batch_size": 32,
                "warmup_epochs": 1,
                "checkpoint_minutes": 1e-6,
                "precision": "fp32",
            },
        }
    }
}


@pytest.fixture(scope="module")
def undisturbed(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project with the results of an undisturbed run."""
    folder = tmp_path_factory.mktemp("undisturbed") / "project"
    folder.mkdir()
    shutil.copy(root / "Snakefile", folder)
    for name in ("workflow", "datasets"):
        shutil.copytree(root / name, folder / name)
    (folder / "config.yaml").write_text(yaml.safe_dump(CONFIG))
    finish(folder, TARGET)
    return folder


@pytest.mark.parametrize(
    "number",
    [
        signal.SIGKILL,
        pytest.param(signal.SIGINT, marks=pytest.mark.long),
        pytest.param(signal.SIGTERM, marks=pytest.mark.long),
    ],
    ids=lambda number: number.name,
)
def test_an_interrupted_run_continues_to_the_same_bytes(number, undisturbed, tmp_path):
    folder = tmp_path / "project"
    shutil.copytree(undisturbed, folder, ignore=shutil.ignore_patterns("results"))
    process = start(folder, TARGET)
    interrupt(process, number, folder / "checkpoints" / "tiny.pt", saves=random.Random(number).randint(1, 5))
    assert process.returncode != 0
    assert not (folder / TARGET).exists()
    output = finish(folder, TARGET)
    assert "continuing at step" in output
    assert (folder / TARGET).read_bytes() == (undisturbed / TARGET).read_bytes()
    assert not (folder / "checkpoints" / "tiny.pt").exists()


@pytest.mark.long
def test_snakemake_killed_alone_leaves_no_second_training(undisturbed, tmp_path):
    folder = tmp_path / "project"
    shutil.copytree(undisturbed, folder, ignore=shutil.ignore_patterns("results"))
    process = start(folder, TARGET)
    wait_for_saves(process, folder / "checkpoints" / "tiny.pt", saves=2)
    process.kill()
    process.wait()
    output = finish(folder, TARGET)  # while the stage of the killed workflow saves its last checkpoint
    assert "continuing at step" in output
    assert (folder / TARGET).read_bytes() == (undisturbed / TARGET).read_bytes()
    assert list((folder / "checkpoints").iterdir()) == []
    process.communicate()


def interrupt(process: subprocess.Popen[str], number: int, checkpoint: Path, *, saves: int) -> None:
    """Send the signal to the whole process group once the checkpoint has been written `saves` times."""
    wait_for_saves(process, checkpoint, saves=saves)
    os.killpg(process.pid, number)
    process.communicate(timeout=60)


def wait_for_saves(process: subprocess.Popen[str], checkpoint: Path, *, saves: int) -> None:
    """Return once the checkpoint has been written `saves` times."""
    files: set[tuple[int, int]] = set()  # a number of a file is used again soon

    def is_saved() -> bool:
        assert process.poll() is None, f"ended before the signal: {process.communicate()[0]}"
        if checkpoint.exists():
            status = checkpoint.stat()
            files.add((status.st_ino, status.st_mtime_ns))
        return len(files) >= saves

    wait_until(is_saved)
