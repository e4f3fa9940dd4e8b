"""All messages reach MLflow, even from a killed stage, and no failure of MLflow affects the training."""

import base64
import http.server
import json
import os
import re
import shutil
import signal
import socket
import sqlite3
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import Any, ClassVar

import pytest

from ssl_core.tracking import run as tracking
from ssl_core.tracking import ui
from ssl_core.tracking.recorder import (
    LEADERBOARD,
    flatten,
    leaderboard,
    lock_file,
    locked,
    metric_columns,
    without_passwords,
)

STAGE = """
import os, signal, sys
from pathlib import Path
from ssl_core.tracking import run as tracking
from ssl_core.tracking import ui
stage, end, run_id = sys.argv[1:]
with tracking.start(stage, "tiny", digest="d" * 64, parameters={"stage": stage}, run_id=run_id or None) as run:
    for step in range(1, 6):
        run.metrics({"loss": 10.0 - step}, step=step)
    if stage == "linear":
        run.headline({"linear/top1": 89.9012, "linear/top5": 99.0}, columns=["linear/top1"])
        open("card.md", "w").close()
        run.artifact(Path("card.md"), on_parent=True)
    if end == "exception":
        raise RuntimeError("boom")
    if end == "interrupt":
        raise KeyboardInterrupt
    if end == "sigterm":
        os.kill(os.getpid(), signal.SIGTERM)
    if end == "more":
        run.metrics({"loss": 4.0}, step=6)
"""
ENDS = {"linear": "finish", "knn": "exception", "pretrain": "sigterm", "tune": "interrupt"}


def launch(folder: Path, stage: str, end: str, run_id: str = "", **variables: str) -> "subprocess.Popen[str]":
    """Start a stage; its standard error closes only when its recorder has ended."""
    command = [sys.executable, "-c", STAGE, stage, end, run_id]
    return subprocess.Popen(command, cwd=folder, env=clean() | variables, stderr=subprocess.PIPE, text=True)


def clean() -> dict[str, str]:
    """Return the environment without settings of tracking."""
    return {key: value for key, value in os.environ.items() if not key.startswith(("MLFLOW_", "SSL_TRACKING"))}


def select(folder: Path, query: str) -> list[tuple]:
    connection = sqlite3.connect(folder / "mlflow.db")
    rows = connection.execute(query).fetchall()
    connection.close()
    return rows


def stages(folder: Path) -> dict[str, tuple[str, str]]:
    """Return run id and status by stage."""
    query = "select value, runs.run_uuid, status from runs join tags using (run_uuid) where key = 'stage'"
    return {stage: (run_id, status) for stage, run_id, status in select(folder, query)}


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four concurrent stages, with different ends, on a database that does not exist yet."""
    folder = tmp_path_factory.mktemp("tracking")
    processes = [launch(folder, stage, end) for stage, end in ENDS.items()]
    for process in processes:
        _, errors = process.communicate(timeout=120)
        assert "warning" not in errors
    return folder


def test_four_processes_make_one_experiment_one_parent_four_children(four: Path) -> None:
    assert select(four, "select count(*) from experiments where name = 'ssl-core'") == [(1,)]
    assert sorted(stages(four)) == ["experiment", "knn", "linear", "pretrain", "tune"]
    assert select(four, "select count(*) from runs") == [(5,)]
    parents = select(four, "select distinct value from tags where key = 'mlflow.parentRunId'")
    assert parents == [(stages(four)["experiment"][0],)]


def test_the_end_of_a_stage_is_the_status_of_its_run(four: Path) -> None:
    statuses = {stage: status for stage, (_, status) in stages(four).items() if stage in ENDS}
    assert statuses == {"linear": "FINISHED", "knn": "FAILED", "pretrain": "KILLED", "tune": "KILLED"}


def test_metrics_arrive_even_from_a_process_that_was_killed(four: Path) -> None:
    for stage in ENDS:
        query = f"select step, value from metrics where key = 'loss' and run_uuid = '{stages(four)[stage][0]}'"
        assert sorted(select(four, query)) == [(step, 10.0 - step) for step in range(1, 6)]


def test_headline_numbers_are_on_the_parent_and_in_the_leaderboard(four: Path) -> None:
    query = "select key, value from metrics where run_uuid = '{}'"
    metrics = select(four, query.format(stages(four)["experiment"][0]))
    assert set(metrics) == {("linear/top1", 89.9), ("linear/top5", 99.0)}
    tags = dict(select(four, "select key, value from experiment_tags"))
    assert tags["mlflow.experimentKind"] == "custom_model_development"
    assert metric_columns(tags["mlflow.sharedViewState.leaderboard"]) == ["linear/top1"]


def test_the_leaderboard_has_accuracies_then_parameters_then_costs_and_the_best_experiment_first() -> None:
    assert "orderByKey" not in json.loads(leaderboard([]))
    view = json.loads(leaderboard(["cost/v1 macs", "knn/v1 top1", "knn/v1 top1"]))
    names = ["metrics.`knn/v1 top1`", "params.`method`", "params.`backbone`", "params.`epochs`"]
    assert view["selectedColumns"] == [*names, "metrics.`cost/v1 macs`"]
    assert (view["orderByKey"], view["orderByAsc"]) == ("metrics.`knn/v1 top1`", False)


def test_the_address_of_the_leaderboard_is_valid_before_the_first_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    monkeypatch.setattr(os, "execv", lambda *arguments: None)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
        ui.serve(port)
        taken.listen()
        with pytest.raises(ValueError, match=f"port {port} is in use.*--port {port + 1}"):
            ui.serve(port)
    (number,) = select(tmp_path, "select experiment_id from experiments where name = 'ssl-core'")[0]
    view = "workflowType=machine_learning&viewStateShareKey=leaderboard"
    assert capsys.readouterr().out == f"The leaderboard: http://127.0.0.1:{port}/#/experiments/{number}/runs?{view}\n"
    assert {"mlflow.experimentKind", LEADERBOARD} == {
        key for (key,) in select(tmp_path, "select key from experiment_tags")
    }


def test_an_artifact_of_the_experiment_is_on_the_parent(four: Path) -> None:
    (path,) = four.glob("mlruns/*/*/artifacts/card.md")
    assert path.parts[-3] == stages(four)["experiment"][0]


def test_the_database_writes_ahead(four: Path) -> None:
    assert select(four, "pragma journal_mode") == [("wal",)]


def test_a_resumed_stage_continues_its_run_without_repeating_steps(four: Path) -> None:
    run_id, _ = stages(four)["pretrain"]
    launch(four, "pretrain", "more", run_id).communicate(timeout=60)
    assert stages(four)["pretrain"] == (run_id, "FINISHED")
    assert select(four, "select count(*) from runs") == [(5,)]
    query = f"select step from metrics where key = 'loss' and run_uuid = '{run_id}' order by step"
    assert select(four, query) == [(step,) for step in range(1, 7)]


@pytest.mark.parametrize(
    ("tables", "message"),
    [
        pytest.param(["runs"], "the run 'tiny / tune' was deleted in MLflow; it is restored", marks=pytest.mark.long),
        (["runs", "experiments"], "the experiment 'ssl-core' was deleted in MLflow"),
    ],
)
def test_what_was_deleted_in_mlflow_is_restored(four: Path, tmp_path: Path, tables: list[str], message: str) -> None:
    shutil.copytree(four, tmp_path / "copy")
    connection = sqlite3.connect(tmp_path / "copy" / "mlflow.db")
    with connection:  # as MLflow's page does
        for table in tables:
            connection.execute(f"update {table} set lifecycle_stage = 'deleted'")
    connection.close()
    run_id = stages(four)["tune"][0]
    _, errors = launch(tmp_path / "copy", "tune", "finish", run_id).communicate(timeout=60)
    assert message in errors
    assert stages(tmp_path / "copy")["tune"] == (run_id, "FINISHED")
    states = dict(select(tmp_path / "copy", "select run_uuid, lifecycle_stage from runs"))
    assert states[run_id] == states[stages(four)["experiment"][0]] == "active"
    assert select(tmp_path / "copy", "select lifecycle_stage from experiments where name = 'ssl-core'") == [("active",)]


@pytest.mark.long
def test_artifacts_follow_a_copied_project_and_a_run_that_is_gone_is_made_anew(four: Path, tmp_path: Path) -> None:
    copied = tmp_path / "my proj \u00fc"
    shutil.copytree(four, copied)
    original = sorted(four.rglob("*"))
    _, errors = launch(copied, "linear", "finish").communicate(timeout=60)
    assert errors.count(f"this folder was {four}: artifact paths in mlflow.db now lead to {copied}/mlruns") == 1
    places = select(copied, "select artifact_uri from runs union select artifact_location from experiments")
    assert all(place.startswith(f"{copied}/mlruns/") for (place,) in places)
    assert sorted(four.rglob("*")) == original
    # Again, for a run that is not there
    _, errors = launch(copied, "new", "finish", "f" * 32).communicate(timeout=60)
    assert "this folder was" not in errors
    assert "is not in this database; the numbers go into another run" in errors
    assert stages(copied)["new"][1] == "FINISHED"


@pytest.mark.long
def test_clones_share_one_database(tmp_path: Path) -> None:
    """Also after the clone whose `mlruns/` has the artifacts is gone."""
    address = f"sqlite:///{tmp_path}/mlflow.db"
    clones = [tmp_path / "first", tmp_path / "second"]
    for clone in clones:
        clone.mkdir()
    processes = [launch(clone, "linear", "finish", MLFLOW_TRACKING_URI=address) for clone in clones]
    assert [process.communicate(timeout=120)[1] for process in processes] == ["", ""]
    assert select(tmp_path, "select count(*) from experiments where name = 'ssl-core'") == [(1,)]
    assert {stage: status for stage, (_, status) in stages(tmp_path).items()} == {
        "experiment": "FINISHED",
        "linear": "FINISHED",
    }
    (artifacts,) = tmp_path.glob("*/mlruns")
    shutil.rmtree(artifacts.parent)
    (left,) = (clone for clone in clones if clone.exists())
    assert launch(left, "linear", "finish", MLFLOW_TRACKING_URI=address).communicate(timeout=120)[1] == ""
    assert len(list(artifacts.glob("*/*/artifacts/card.md"))) == 1


def damage(database: Path) -> None:
    with open(database, "r+b") as file:
        file.write(b"x" * 5000)


def set_schema(database: Path) -> None:
    with closing(sqlite3.connect(database)) as connection, connection:
        connection.execute("update alembic_version set version_num = 'ffffffffffff'")


def lock(database: Path) -> sqlite3.Connection:
    connection = sqlite3.connect(database, isolation_level=None)
    connection.execute("begin exclusive")
    return connection


@pytest.mark.parametrize(
    ("spoil", "fault"),
    [
        (damage, "mlflow.db is damaged: move it away"),
        (set_schema, "mlflow.db was written by another version of MLflow: copy it, then run `mlflow db upgrade"),
        pytest.param(lock, "another program keeps mlflow.db locked: end it", marks=pytest.mark.long),
    ],
)
def test_a_database_that_cannot_be_used_costs_one_warning(four: Path, tmp_path: Path, spoil: Any, fault: str) -> None:
    shutil.copytree(four, tmp_path / "copy")
    held = spoil(tmp_path / "copy" / "mlflow.db")
    process = launch(tmp_path / "copy", "new", "finish")
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0
    assert errors.count("the run continues without it") == 1
    assert f"warning: MLflow tracking: {fault}" in errors
    if held is not None:
        held.close()


@pytest.mark.long
def test_a_database_that_is_removed_during_a_stage_is_reported(four: Path, tmp_path: Path) -> None:
    shutil.copytree(four, tmp_path / "copy")
    start, finish = STAGE.split("    if end ==", 1)
    # The run has an id as soon as the recorder has opened the database.
    remove = "    while run.id is None: os.sched_yield()\n    [os.unlink(path) for path in Path().glob('mlflow.db*')]\n"
    command = [sys.executable, "-c", f"{start}{remove}    if end =={finish}", "new", "finish", ""]
    result = subprocess.run(command, cwd=tmp_path / "copy", env=clean(), capture_output=True, text=True, timeout=120)
    assert result.returncode == 0
    assert result.stderr.count("mlflow.db was removed during this stage") == 1


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A folder on a file system of 8 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", folder], capture_output=True).returncode:
        pytest.skip("a file system of its own needs root")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


def fill(disk: Path) -> Path:
    """Write a file that leaves no room on `disk`; return it."""
    file = disk / "filler"
    with suppress(OSError), open(file, "wb", buffering=0) as stream:
        while stream.write(b"x" * 4096):
            pass
    return file


@pytest.mark.long
@pytest.mark.parametrize("existing", [True, False])
def test_a_full_disk_costs_one_warning_until_there_is_room(four: Path, small_disk: Path, existing: bool) -> None:
    if existing:
        shutil.copy(four / "mlflow.db", small_disk)
    filler = fill(small_disk)
    process = launch(small_disk, "new", "finish")
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0
    assert errors.count("the run continues without it") == 1
    assert re.search("warning: MLflow tracking: (no space left for|the disk of) mlflow.db.*: free some", errors)
    filler.unlink()
    process = launch(small_disk, "new", "finish")
    assert "the run continues without it" not in process.communicate(timeout=120)[1]
    assert stages(small_disk)["new"][1] == "FINISHED"
    query = f"select count(*) from metrics where key = 'loss' and run_uuid = '{stages(small_disk)['new'][0]}'"
    assert select(small_disk, query) == [(5,)]


class Protected(http.server.BaseHTTPRequestHandler):
    """A server that asks for a password and notes the answers."""

    answers: ClassVar[set[str | None]] = set()

    def do_GET(self) -> None:
        self.answers.add(self.headers["Authorization"])
        self.send_error(500 if self.headers["Authorization"] else 401)

    do_POST = do_GET

    def log_message(self, format: str, *args: object) -> None:
        pass


def test_a_password_in_the_address_is_sent_and_never_printed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Protected)
    threading.Thread(target=server.serve_forever, args=(0.01,)).start()
    address = f"http://me:s%40cret@127.0.0.1:{server.server_port}"
    environment = {**os.environ, "SSL_TRACKING": "", "MLFLOW_TRACKING_URI": address, "XDG_RUNTIME_DIR": str(tmp_path)}
    command = [sys.executable, "-c", STAGE, "knn", "finish", ""]
    stage = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60)
    server.shutdown()
    server.server_close()
    assert Protected.answers == {"Basic " + base64.b64encode(b"me:s@cret").decode()}
    assert "warning: MLflow tracking: " in stage.stderr
    assert "cret" not in stage.stderr
    (lock,) = (tmp_path / "ssl-core").iterdir()
    assert stat.S_IMODE(lock.stat().st_mode) == 0o600


@pytest.mark.parametrize(
    ("text", "masked"),
    [
        ("POST http://me:a@b@host:5000/api failed", "POST http://***@host:5000/api failed"),
        ("postgresql+psycopg://u:p@db/mlflow", "postgresql+psycopg://***@db/mlflow"),
        ("sqlite:////home/a@b/mlflow.db", "sqlite:////home/a@b/mlflow.db"),
    ],
)
def test_passwords_of_addresses_are_masked(text: str, masked: str) -> None:
    assert without_passwords(text) == masked


def test_the_lock_of_tracking_follows_no_link(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    lock = lock_file("http://host")
    (tmp_path / "precious").write_text("kept")
    lock.symlink_to(tmp_path / "precious")
    with pytest.raises(OSError, match=lock.name), locked("http://host"):
        pass
    assert (tmp_path / "precious").read_text() == "kept"


@pytest.fixture
def hanging_port() -> Iterator[int]:
    """A server that accepts connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


@pytest.fixture
def closed_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


@pytest.mark.parametrize("port", ["closed_port", pytest.param("hanging_port", marks=pytest.mark.long)])
def test_an_unreachable_server_costs_one_warning(
    port: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("SSL_TRACKING", raising=False)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{request.getfixturevalue(port)}")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    with tracking.start("pretrain", "tiny", digest="d", parameters={}) as run:
        begin = time.monotonic()
        for step in range(100):
            run.metrics({"loss": 1.0}, step=step)
        assert time.monotonic() - begin < 1
    assert time.monotonic() - begin < tracking.CLOSE_SECONDS + 2
    assert run.id is None
    assert run._recorder is not None
    run._recorder.wait(timeout=60)  # on a busy machine it imports MLflow for longer than the stage waits
    assert capfd.readouterr().err.count("warning") == 1


def test_a_stopped_recorder_never_blocks_a_step(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("SSL_TRACKING", raising=False)
    monkeypatch.chdir(tmp_path)
    run = tracking.start("pretrain", "tiny", digest="d", parameters={})
    assert run._recorder is not None
    run._recorder.send_signal(signal.SIGSTOP)
    begin = time.monotonic()
    for step in range(5_000):  # far more than the capacity of a pipe
        run.metrics({"loss": 1.0, "learning_rate": 0.1}, step=step)
    assert time.monotonic() - begin < 2
    run._recorder.kill()
    run._recorder.wait()
    with run:
        run.metrics({"loss": 1.0}, step=0)  # a recorder that has ended raises nothing


@pytest.mark.long
def test_jobs_of_slurm_write_files_that_are_merged_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    for stage, end in (("pretrain", "finish"), ("linear", "sigterm")):
        with launch(tmp_path, stage, end) as process:
            process.communicate()
    assert not (tmp_path / "mlflow.db").exists()
    assert len(list((tmp_path / "mlflow-jobs").glob("tiny.*.12.*.jsonl"))) == 2

    monkeypatch.chdir(tmp_path)
    for name in ("MLFLOW_TRACKING_URI", "SSL_TRACKING"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ValueError, match="merging writes to one SQLite file"):
        tracking.merge()
    running = tracking.start("knn", "tiny", digest="d" * 64, parameters={})
    monkeypatch.delenv("SLURM_JOB_ID")
    assert len(tracking.merge()) == 2
    running.__exit__(None, None, None)
    assert len(tracking.merge()) == 1
    assert not list((tmp_path / "mlflow-jobs").iterdir())
    runs = dict(select(tmp_path, "select name, status from runs where name like '%/%'"))
    assert runs == {"tiny / pretrain": "FINISHED", "tiny / linear": "KILLED", "tiny / knn": "FINISHED"}
    assert select(tmp_path, "select count(*) from metrics where key = 'loss'") == [(10,)]


def test_tracking_can_be_switched_off(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SSL_TRACKING", "off")
    monkeypatch.chdir(tmp_path)
    with tracking.start("pretrain", "tiny", digest="d", parameters={}) as run:
        run.metrics({"loss": 1.0}, step=1)
        assert run.id is None
    assert list(tmp_path.iterdir()) == []


def test_parameters_are_flat_short_and_keep_their_values() -> None:
    nested = {
        "training": {"epochs": 3, "milestones": [1, 2]},
        "subset": None,
        "views": {},
        "bad=key": True,
        "long": "x" * 9000,
    }
    flat = flatten(nested)
    assert flat.pop("long") == "x" * 499 + "…"
    assert flat == {
        "training.epochs": "3",
        "training.milestones": "[1, 2]",
        "subset": "null",
        "views": "{}",
        "bad_key": "true",
    }
