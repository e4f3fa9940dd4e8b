"""The whole workflow under Snakemake, ended at random moments and started twice at the same time."""

import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest

from tests.waiting import wait_until
from tests.workflow.conftest import finish, start

from .conftest import KNN, SPEC, contents, final, write_project
from .test_interruptions import survivors

pytestmark = [pytest.mark.long, pytest.mark.timeout(3600)]
TARGET = "results/tiny/knn.json"
MOMENTS = 9  # three per signal


@pytest.fixture(scope="module")
def project(root: Path, bare: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny project with Snakefile and rules."""
    folder = tmp_path_factory.mktemp("workflow") / "project"
    write_project(folder, root, bare, SPEC, {"knn": KNN})
    return folder


@pytest.fixture(scope="module")
def undisturbed(project: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, bytes], float]:
    folder = tmp_path_factory.mktemp("undisturbed") / "project"
    shutil.copytree(project, folder)
    begin = time.monotonic()
    finish(folder, TARGET)
    return contents(folder), time.monotonic() - begin


def test_the_workflow_ended_at_random_moments_goes_on_to_the_same_bytes(
    project: Path, undisturbed: tuple[dict[str, bytes], float], tmp_path: Path
) -> None:
    whole, seconds = undisturbed
    moments, hits = random.Random(0), 0
    for number in range(MOMENTS):
        kind = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)[number % 3]
        folder = tmp_path / str(number)
        shutil.copytree(project, folder)
        process = start(folder, TARGET)
        moment = moments.uniform(1, 0.7 * seconds)
        time.sleep(moment)  # the moment is under test
        if process.poll() is None:
            os.killpg(process.pid, kind)
        output, _ = process.communicate(timeout=600)
        wait_until(lambda group=process.pid: not survivors(group))
        hits += process.returncode != 0
        written = final(folder)
        assert {file: whole.get(file) for file in written} == written, f"{kind.name} after {moment:.1f} s: {output}"
        finish(folder, TARGET)
        assert contents(folder) == whole, f"{kind.name} after {moment:.1f} s"
    print(f"ended {hits} times of {MOMENTS} before it had finished")
    assert hits >= MOMENTS // 2


def test_an_output_that_a_kill_left_without_snakemakes_record_is_made_again(
    project: Path, undisturbed: tuple[dict[str, bytes], float], tmp_path: Path
) -> None:
    folder = tmp_path / "project"
    shutil.copytree(project, folder)
    (folder / "bin").mkdir()
    real, target = Path(sys.executable).parent / "ssl-core", "shards/tiny/manifest.json"
    stage = folder / "bin" / "ssl-core"
    stage.write_text(f'#!/bin/sh\n{real} "$@"\nkill -9 0\n')  # kills itself, Snakemake and the rest of the group
    stage.chmod(0o755)
    process = start(folder, target)
    process.communicate(timeout=300)
    assert process.returncode == -signal.SIGKILL
    assert (folder / target).exists()
    stage.unlink()
    assert "1 of 1 steps (100%) done" in finish(folder, target)
    assert contents(folder).items() <= undisturbed[0].items()


def test_a_second_workflow_in_the_same_folder_is_refused_and_does_not_disturb_the_first(
    project: Path, undisturbed: tuple[dict[str, bytes], float], tmp_path: Path
) -> None:
    folder = tmp_path / "project"
    shutil.copytree(project, folder)
    (folder / "bin").mkdir()
    gate = folder / "bin" / "ssl-core"  # keeps the first workflow in its first job until the second has been refused
    real = Path(sys.executable).parent / "ssl-core"
    gate.write_text(f'#!/bin/sh\ntouch started\nuntil [ -e go ]; do sleep 0.05; done\nexec {real} "$@"\n')
    gate.chmod(0o755)
    first = start(folder, TARGET)
    wait_until((folder / "started").exists)
    second = start(folder, TARGET)
    output, _ = second.communicate(timeout=120)
    assert second.returncode != 0
    assert "Directory cannot be locked" in output
    assert "--unlock" in output
    (folder / "go").touch()
    output, _ = first.communicate(timeout=600)
    assert first.returncode == 0, output
    assert contents(folder) == undisturbed[0]
