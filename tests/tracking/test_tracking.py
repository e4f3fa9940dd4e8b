"""All messages reach MLflow, even from a killed stage, and no failure of MLflow affects the training."""

import json
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from ssl_core.tracking import run as tracking
from ssl_core.tracking.recorder import flatten

STAGE = """
import os, signal, sys
from pathlib import Path
from ssl_core.tracking import run as tracking
stage, end, run_id = sys.argv[1:]
with tracking.start(stage, "tiny", digest="d" * 64, parameters={"stage": stage}, run_id=run_id or None) as run:
    for step in range(1, 6):
        run.metrics({"loss": 10.0 - step}, step=step)
    if stage == "linear":
        run.headline({"linear/top1": 89.9, "linear/top5": 99.0}, columns=["linear/top1"])
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


def launch(folder: Path, stage: str, end: str, run_id: str = "") -> "subprocess.Popen[str]":
    """Start a stage; its standard error closes only when its recorder has ended."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("MLFLOW_", "SSL_TRACKING"))}
    command = [sys.executable, "-c", STAGE, stage, end, run_id]
    return subprocess.Popen(command, cwd=folder, env=environment, stderr=subprocess.PIPE, text=True)


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
    (view,) = select(four, "select value from experiment_tags where key = 'mlflow.sharedViewState.leaderboard'")[0]
    assert json.loads(view)["selectedColumns"] == ["metrics.`linear/top1`"]


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


@pytest.fixture
def hanging_port() -> Iterator[int]:
    """A server that accepts connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


@pytest.fixture
def closed_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


@pytest.mark.parametrize("port", ["closed_port", "hanging_port"])
def test_an_unreachable_server_costs_one_warning(
    port: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("SSL_TRACKING", raising=False)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{request.getfixturevalue(port)}")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    begin = time.monotonic()
    with tracking.start("pretrain", "tiny", digest="d", parameters={}) as run:
        for step in range(100):
            run.metrics({"loss": 1.0}, step=step)
        assert time.monotonic() - begin < 1
    assert time.monotonic() - begin < tracking.CLOSE_SECONDS + 1
    assert run.id is None
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
