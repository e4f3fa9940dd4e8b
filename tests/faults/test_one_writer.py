"""One process writes an experiment or a data set at a time, and no stage outlives its workflow."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from ssl_core import cli
from ssl_core.experiments import processes
from ssl_core.experiments.processes import Process, one_writer

from .conftest import COMMANDS

LOCKS = {"shard": Path("shards/.tiny.lock"), "pretrain": Path("checkpoints/tiny.lock")}
# Holds a lock, reports it, and ends with its standard input.
WRITER = """
import sys
from pathlib import Path
from ssl_core.experiments.processes import one_writer
with one_writer(Path(sys.argv[1]), "x"):
    print("writes", flush=True)
    sys.stdin.read()
"""
# Starts another program as a workflow does and waits for it.
WORKFLOW = """
import subprocess, sys
from ssl_core.experiments import processes
processes.announce_workflow()
subprocess.run([sys.executable, "-c", *sys.argv[1:]])
"""


def start(*arguments: str) -> "subprocess.Popen[str]":
    command = [sys.executable, "-c", *arguments]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, text=True, stdin=pipe, stdout=pipe, stderr=pipe)


def read_line(process: "subprocess.Popen[str]") -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


@pytest.mark.parametrize("stage", LOCKS)
def test_a_second_writer_ends_in_one_line_and_changes_nothing(
    stage: str, bare: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "log.txt").write_text("of the first")
    (tmp_path / "datasets").symlink_to(bare / "datasets")
    with one_writer(LOCKS[stage], "x"):
        before = sorted(tmp_path.rglob("*"))
        assert cli.main([stage, *COMMANDS[stage], "--log", "log.txt"]) == 2
        assert sorted(tmp_path.rglob("*")) == before
    (line,) = capsys.readouterr().err.splitlines()
    assert f"is being written by process {os.getpid()} on " in line
    assert (tmp_path / "log.txt").read_text() == "of the first"


def test_the_message_names_the_job_of_a_cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    with (
        one_writer(tmp_path / "lock", "x"),
        pytest.raises(ValueError, match=r"x is being written by process .* job 4711"),
        one_writer(tmp_path / "lock", "x"),
    ):
        pass


def test_a_killed_writer_holds_no_lock(tmp_path: Path) -> None:
    with start(WRITER, str(tmp_path / "lock")) as writer:
        assert read_line(writer) == "writes"
        writer.kill()
    with one_writer(tmp_path / "lock", "x"):
        assert f":{os.getpid()}:" in (tmp_path / "lock").read_text()
    assert not (tmp_path / "lock").exists()


def test_a_writer_without_workflow_is_waited_for(tmp_path: Path) -> None:
    lock = str(tmp_path / "lock")
    with start(WORKFLOW, WRITER, lock) as workflow:
        assert read_line(workflow) == "writes"
        workflow.kill()
        workflow.wait()
        with start(WRITER, lock) as second:
            assert second.stderr is not None
            assert second.stderr.readline().endswith(", whose workflow has ended\n")
            assert workflow.stdin is not None
            workflow.stdin.close()  # the first writer ends
            assert read_line(second) == "writes"
            second.communicate()


def test_a_lock_file_is_never_followed_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("kept")
    (tmp_path / "lock").symlink_to("precious")
    with pytest.raises(OSError, match="lock"), one_writer(tmp_path / "lock", "x"):
        pass
    assert (tmp_path / "precious").read_text() == "kept"


# Begins as a workflow does, reports it, and ends with its standard input.
LOCKING = """
import sys
from pathlib import Path
from ssl_core.experiments.processes import remove_stale_locks
remove_stale_locks(Path(sys.argv[1]))
print("runs", flush=True)
sys.stdin.read()
"""


def run_workflow(folder: Path) -> None:
    with start(LOCKING, str(folder)) as workflow:
        assert read_line(workflow) == "runs"
        workflow.communicate()


def test_locks_of_snakemake_are_removed_after_the_end_of_every_workflow(tmp_path: Path) -> None:
    lock = tmp_path / "locks" / "0.input.lock"
    lock.parent.mkdir()
    with start(LOCKING, str(tmp_path)) as workflow:
        assert read_line(workflow) == "runs"
        lock.touch()
        run_workflow(tmp_path)
        assert lock.exists()
        workflow.kill()
    run_workflow(tmp_path)
    assert not lock.exists()


def test_locks_of_a_workflow_on_another_host_stay(tmp_path: Path) -> None:
    lock = tmp_path / "locks" / "0.input.lock"
    lock.parent.mkdir()
    lock.touch()
    (tmp_path / "workflows.lock").write_text("another-host")
    run_workflow(tmp_path)
    run_workflow(tmp_path)
    assert lock.exists()


# A stage that would train for ever.
ENDLESS = """
import sys, threading
from ssl_core.experiments import processes
processes.end_with_workflow()
print("trains", flush=True)
threading.Event().wait()
"""
SHELL = "import subprocess, sys; subprocess.run([sys.executable, '-c', *sys.argv[1:]])"


@pytest.mark.parametrize("victim", ["workflow", "shell"])
def test_a_stage_ends_with_its_workflow_and_with_its_shell(victim: str) -> None:
    with start(WORKFLOW, SHELL, ENDLESS) as workflow:
        assert read_line(workflow) == "trains"
        (shell,) = children(workflow.pid)
        os.kill(workflow.pid if victim == "workflow" else shell, signal.SIGKILL)
        _, errors = workflow.communicate(timeout=60)  # ends when no process has the pipes open
    assert "the workflow that started this stage has ended: stopping" in errors


def test_a_stage_begins_no_work_after_its_workflow_has_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    with start("import sys; sys.stdin.read()") as workflow:
        ended = Process.with_id(workflow.pid)
        workflow.communicate()
    assert ended is not None
    monkeypatch.setenv(processes.WORKFLOW, ended.text)
    with pytest.raises(ValueError, match="has ended; run the workflow again"):
        processes.end_with_workflow()


def test_a_stage_refuses_a_workflow_of_another_installation(monkeypatch: pytest.MonkeyPatch) -> None:
    (parent, *_) = processes.ancestors()
    monkeypatch.setenv(processes.WORKFLOW, parent.text)
    monkeypatch.setenv(processes.PACKAGE, "/another/ssl_core")
    with pytest.raises(ValueError, match=r"the code of /another/ssl_core, its stage that of .*: put the `ssl-core`"):
        processes.end_with_workflow()


def test_a_reused_process_id_is_another_process() -> None:
    current = Process.with_id(os.getpid())
    assert current is not None
    assert not current.has_ended()
    assert current._replace(started=current.started - 1).has_ended()
    assert Process.parse(current.text) == current


def children(process: int) -> list[int]:
    return [int(number) for number in Path(f"/proc/{process}/task/{process}/children").read_text().split()]
