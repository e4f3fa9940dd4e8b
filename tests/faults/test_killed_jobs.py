"""One process of a workflow is killed while a job writes; the same command then writes the same bytes."""

import json
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.workflow.conftest import finish, start

from .conftest import KNN, SPEC, contents, write_project

pytestmark = [pytest.mark.long, pytest.mark.timeout(1200)]

EXPERIMENT = {**SPEC, "training": {**SPEC["training"], "epochs": 2}}
EVALUATIONS: dict[str, Any] = {
    "knn": KNN,
    "looks": {"protocol": "pictures", "images": 40},
    "price": {"protocol": "cost", "repeats": 1},
}
# The rule that is killed, the target that only it makes, and its other outputs.
TARGETS = {
    "shard": "shards/tiny/manifest.json",
    "views": "results/tiny/views.png",
    "pretrain": "results/tiny/backbone.safetensors",
    "curves": "results/tiny/curves.png",
    "evaluate": "results/tiny/knn.json",
    "pictures": "results/tiny/looks.json",
    "draw": "results/tiny/looks/tsne.png",
    "export": "results/tiny/export/README.md",
    "cost": "results/tiny/price.json",
    "table": "results/table.csv",
}
OUTPUTS = {
    "shard": ["shards/tiny"],
    "pretrain": [f"results/tiny/{name}" for name in ("model.safetensors", "pretrain.json", "history.csv")],
    "curves": ["results/tiny/curves.svg"],
    "pictures": ["results/tiny/looks/pictures.npz"],
    "draw": [
        f"results/tiny/looks/{name}.{extension}"
        for name in ("tsne", "triangles", "neighbours", "confusion", "spectrum")
        for extension in ("png", "svg")
    ],
    "export": ["results/tiny/export"],
    "table": ["results/table.html"],
}
ONE_FILE = ("views", "evaluate", "cost")
# Who is killed before the renaming of which file; 0 is the start.
MOMENTS = [("stage", 1), ("stage", 2), ("shell", 1), ("workflow", 0), ("workflow", 1), ("workflow", 2)]
CASES = [(rule, *moment) for rule in TARGETS for moment in MOMENTS if moment[1] < 2 or rule not in ONE_FILE]
CASES.append(("shard", "worker", 1))


@pytest.fixture(scope="module")
def undisturbed(root: Path, bare: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished project whose stages can be killed."""
    folder = tmp_path_factory.mktemp("workflow") / "project"
    write_project(folder, root, bare, EXPERIMENT, EVALUATIONS)
    stage = folder / "bin" / "ssl-core"
    stage.parent.mkdir()
    script = Path(__file__).with_name("killing_stage.py")
    # Without `exec`, so that there is a shell between Snakemake and the stage with any version of bash.
    stage.write_text(f'#!/bin/sh\n{sys.executable} {script} "$@"\nexit $?\n')
    stage.chmod(0o755)
    finish(folder, *TARGETS.values())
    return folder


@pytest.mark.parametrize(("rule", "victim", "file"), CASES)
def test_the_same_command_completes_a_job_of_which_a_process_was_killed(
    rule: str, victim: str, file: int, undisturbed: Path, tmp_path: Path
) -> None:
    folder, target = shutil.copytree(undisturbed, tmp_path / "project"), TARGETS[rule]
    remove(folder, target, *OUTPUTS.get(rule, []))
    others = times(folder)
    (folder / "kill.json").write_text(json.dumps({"victim": victim, "file": file}))
    process = start(folder, target)
    assert process.wait(timeout=300) == (-signal.SIGKILL if victim == "workflow" else 1)
    assert not (folder / "kill.json").exists()
    finish(folder, target)  # at once, while the stage of a killed workflow ends
    process.communicate()
    assert not (folder / "twice.txt").exists()
    assert others.items() <= times(folder).items()
    written, expected = contents(folder), contents(undisturbed)
    if rule == "cost":  # measures times
        assert written.pop(target).count(b"\n") == expected.pop(target).count(b"\n")
    assert written == expected


def remove(folder: Path, *paths: str) -> None:
    for path in (folder / name for name in paths):
        if path.is_dir():
            shutil.rmtree(path)
        elif path.exists():
            path.unlink()


def times(folder: Path) -> dict[str, int]:
    """Return the modification times of all outputs."""
    return {name: (folder / name).stat().st_mtime_ns for name in contents(folder)}
