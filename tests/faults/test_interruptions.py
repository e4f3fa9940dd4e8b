"""Stages are ended at random moments; the same command then writes the same bytes as an undisturbed run."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from tests.waiting import wait_until

from .conftest import SPEC, STAGES, Undisturbed, Warm, contents, final

SIGNALS = {"SIGKILL": (signal.SIGKILL, False), "SIGTERM": (signal.SIGTERM, False), "Ctrl-C": (signal.SIGINT, True)}
ENDS = {"SIGKILL": {-9}, "SIGTERM": {-15, 143}, "Ctrl-C": {130, 1}}


def disturb(warm: Warm, undisturbed: Undisturbed, folder: Path, stage: str, name: str, *, seed: int, times: int) -> int:
    """End a stage `times` times, then let it finish; return how many times it was ended before it had finished."""
    moments, whole, hits = random.Random(f"{stage} {name} {seed}"), final(undisturbed.after[stage]), 0
    number, group = SIGNALS[name]
    latest = undisturbed.seconds[stage]
    shutil.copytree(undisturbed.before[stage], folder)
    for _ in range(times):
        running = warm.start(folder, stage)
        time.sleep(moments.uniform(0.02, latest))  # the moment is under test
        running.send(number, group=group)
        ended = running.wait()
        assert ended.status in {0} | ENDS[name], ended.output
        wait_until(lambda group=running.process: not survivors(group))  # its workers end with it
        hits += ended.status != 0
        written = final(folder)
        assert {file: whole.get(file) for file in written} == written, f"{stage}, {name}, seed {seed}"
        if ended.status == 0:  # it was faster than the undisturbed run
            latest = min(latest, ended.seconds)
            shutil.rmtree(folder)
            shutil.copytree(undisturbed.before[stage], folder)
    ended = warm.run(folder, stage)
    assert ended.status == 0, ended.output
    assert contents(folder) == contents(undisturbed.after[stage])
    return hits


# tests/workflow/test_interruption.py has the fast test of a killed pre-training.
FEW = [*(("shard", name) for name in SIGNALS), ("evaluate", "SIGKILL")]


@pytest.mark.parametrize(("stage", "name"), FEW)
def test_a_stage_ended_at_a_random_moment_goes_on_to_the_same_bytes(
    stage: str, name: str, warm: Warm, undisturbed: Undisturbed, tmp_path: Path
) -> None:
    disturb(warm, undisturbed, tmp_path / "project", stage, name, seed=0, times=1)


@pytest.mark.long
@pytest.mark.parametrize("name", SIGNALS)
@pytest.mark.parametrize("stage", STAGES)
def test_stages_ended_at_many_random_moments_go_on_to_the_same_bytes(
    stage: str, name: str, warm: Warm, undisturbed: Undisturbed, tmp_path: Path
) -> None:
    hits = sum(disturb(warm, undisturbed, tmp_path / str(seed), stage, name, seed=seed, times=4) for seed in (1, 2))
    print(f"{stage}, {name}: ended {hits} times of 8 before it had finished")
    assert hits


def test_a_killed_shard_worker_ends_the_stage_with_a_message(warm: Warm, bare: Path, tmp_path: Path) -> None:
    """The kernel does this to a worker when memory runs out."""
    folder = tmp_path / "project"
    shutil.copytree(bare, folder)
    (folder / "images/train/circle/slow.png").symlink_to("/dev/zero")  # a worker reads it until it is killed
    running = warm.start(folder, "shard")
    (worker, *_) = wait_until(lambda: children(running.process))
    os.kill(worker, signal.SIGKILL)
    ended = running.wait()
    assert ended.status == 2
    assert "a worker process was killed" in ended.output.splitlines()[-1]
    (folder / "images/train/circle/slow.png").unlink()
    assert warm.run(folder, "shard").status == 0


def test_ctrl_c_does_not_end_a_worker_in_its_first_moment() -> None:
    code = (
        "import os, signal; from ssl_core.experiments import processes\n"
        "signal.signal(signal.SIGINT, signal.SIG_DFL)\n"
        "os.register_at_fork(after_in_child=lambda: os.kill(os.getpid(), signal.SIGINT))\n"
        "processes.keep_interrupts_from_forks()\n"
        "worker = os.fork() or os._exit(7)\n"
        "print(os.waitstatus_to_exitcode(os.waitpid(worker, 0)[1]), signal.pthread_sigmask(signal.SIG_BLOCK, ()))\n"
    )
    assert (
        subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout == "7 set()\n"
    )


def test_a_worker_whose_parent_died_before_it_began_does_not_stay() -> None:
    code = (
        "import multiprocessing, os; from ssl_core.data import sharding\n"
        "def begin(parent):\n"
        "    while os.getppid() == parent:\n"
        "        pass\n"
        "    sharding._become_worker(sharding.Job(None, None, None, None, None))\n"
        "    print('stayed', flush=True)\n"
        "multiprocessing.get_context('fork').Process(target=begin, args=(os.getpid(),)).start()\n"
        "os._exit(0)"  # as if SIGTERM had come
    )
    assert subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.PIPE).stdout == b""


def children(process: int) -> list[int]:
    """Return the ids of the living children of a process."""
    return [child for child, parent, _ in processes() if parent == process]


def survivors(group: int) -> list[int]:
    """Return the ids of the living processes of a group."""
    return [process for process, _, its_group in processes() if its_group == group]


def processes() -> Iterator[tuple[int, int, int]]:
    """Iterate over the living processes of this machine as (id, parent's id, group)."""
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            state, parent, group = path.read_text().rpartition(")")[2].split()[:3]
            if state != "Z":
                yield int(path.parent.name), int(parent), int(group)


def test_a_tar_that_is_cut_while_it_is_read_is_named(warm: Warm, undisturbed: Undisturbed, tmp_path: Path) -> None:
    """The kernel sends SIGBUS to DALI's threads, which read the mapped file."""
    folder = shutil.copytree(undisturbed.before["pretrain"], tmp_path / "project")
    endless = {**SPEC, "training": {**SPEC["training"], "epochs": 10_000}}
    running = warm.start(folder, "pretrain", more=["--spec", json.dumps(endless)])
    wait_until((folder / "checkpoints" / "tiny.pt").exists)
    os.truncate(folder / "shards" / "tiny" / "train-000000.tar", 0)
    ended = running.wait()
    assert ended.status == 2, ended.output
    message = (
        "error: a file was cut short while it was read (SIGBUS): shards/tiny/train-000000.tar has 0 bytes instead of"
    )
    assert ended.output.splitlines()[-1].startswith(message), ended.output
