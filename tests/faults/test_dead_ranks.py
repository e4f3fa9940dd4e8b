"""One of two processes dies, for example for lack of memory: the run ends with a message and can be resumed."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.waiting import wait_until

from .conftest import COMMANDS, SPEC, Ended, Stage, Undisturbed, Warm, contents
from .test_interruptions import children, survivors

pytestmark = [pytest.mark.long, pytest.mark.timeout(900)]
TWO = json.dumps({**SPEC, "training": {**SPEC["training"], "gpus": 2}})
MINUTE = 60


def start(warm: Warm, folder: Path) -> Stage:
    return warm.start(folder, "pretrain", more=["--spec", TWO, "--threads", "2"])


def ranks(launcher: int) -> list[int]:
    """Return the process ids of both ranks, or none until both have started."""
    started = [child for child in children(launcher) if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes()]
    return sorted(started) if len(started) == 2 else []


@pytest.fixture(scope="module")
def whole(warm: Warm, undisturbed: Undisturbed, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("two") / "project"
    shutil.copytree(undisturbed.before["pretrain"], folder)
    ended = start(warm, folder).wait()
    assert ended.status == 0, ended.output
    return contents(folder)


@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize("moment", ["start", "training"])
def test_a_killed_rank_ends_the_run_within_a_minute(
    moment: str, victim: int, warm: Warm, undisturbed: Undisturbed, whole: dict[str, bytes], tmp_path: Path
) -> None:
    folder = tmp_path / "project"
    shutil.copytree(undisturbed.before["pretrain"], folder)
    running = start(warm, folder)
    processes = wait_until(lambda: ranks(running.process))
    if moment == "training":
        wait_until((folder / "checkpoints" / "tiny.pt").exists)
    time.sleep(random.Random(f"{moment} {victim}").uniform(0, 1))  # the moment is under test
    os.kill(processes[victim], signal.SIGKILL)
    killed = time.monotonic()
    ended = running.wait()
    assert time.monotonic() - killed < MINUTE
    assert_one_error(ended, f"process {victim} of 2 failed: it was killed, most likely for want of memory")
    wait_until(lambda: not survivors(running.process))
    ended = start(warm, folder).wait()
    assert ended.status == 0, ended.output
    assert ("continuing at step" in ended.output) == (moment == "training")
    assert contents(folder) == whole


def test_ranks_do_not_outlive_a_killed_launcher(warm: Warm, undisturbed: Undisturbed, tmp_path: Path) -> None:
    folder = tmp_path / "project"
    shutil.copytree(undisturbed.before["pretrain"], folder)
    running = start(warm, folder)
    wait_until(lambda: ranks(running.process))
    wait_until((folder / "checkpoints" / "tiny.pt").exists)
    os.kill(running.process, signal.SIGKILL)
    assert running.wait().status == -signal.SIGKILL
    killed = time.monotonic()
    wait_until(lambda: not survivors(running.process))
    assert time.monotonic() - killed < MINUTE


def test_ranks_save_together_on_sigterm(
    warm: Warm, undisturbed: Undisturbed, whole: dict[str, bytes], tmp_path: Path
) -> None:
    folder = tmp_path / "project"
    shutil.copytree(undisturbed.before["pretrain"], folder)
    running = start(warm, folder)
    processes = wait_until(lambda: ranks(running.process))
    wait_until((folder / "checkpoints" / "tiny.pt").exists)
    for process in processes:
        os.kill(process, signal.SIGSTOP)
    for checkpoint in (folder / "checkpoints").glob("*.pt"):
        checkpoint.unlink()
    os.kill(running.process, signal.SIGTERM)
    for process in processes:
        os.kill(process, signal.SIGCONT)
    assert running.wait().status == 128 + signal.SIGTERM
    ended = start(warm, folder).wait()
    assert ended.status == 0, ended.output
    assert "continuing at step" in ended.output
    assert contents(folder) == whole


def test_ranks_meet_on_a_host_whose_name_does_not_resolve(
    undisturbed: Undisturbed, whole: dict[str, bytes], tmp_path: Path
) -> None:
    namespace = ["unshare", "--user", "--map-root-user", "--uts"]
    if subprocess.call([*namespace, "hostname", "nowhere.invalid"]):
        pytest.skip("no user namespaces")
    folder = shutil.copytree(undisturbed.before["pretrain"], tmp_path / "project")
    stage = [
        str(Path(sys.executable).with_name("ssl-core")),
        "pretrain",
        *COMMANDS["pretrain"],
        "--spec",
        TWO,
        "--threads",
        "2",
    ]
    shell = ["sh", "-c", 'hostname nowhere.invalid && exec "$@"', "sh", *stage]
    run = subprocess.run([*namespace, *shell], cwd=folder, capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stderr
    assert "nowhere.invalid" not in run.stderr
    assert contents(folder) == whole


def assert_one_error(ended: Ended, words: str) -> None:
    """Assert that the output has one error line and that it contains `words`."""
    assert ended.status == 2, ended.output
    lines = [line for line in ended.output.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, ended.output
    assert words in lines[0]
