"""An MLflow server hangs, refuses, dies and comes back: no training step waits, and all numbers arrive in the end."""

import os
import signal
import socket
import sqlite3
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from ssl_core.tracking import run as tracking
from tests.waiting import wait_until

pytestmark = [pytest.mark.long, pytest.mark.timeout(600)]
STEPS = 200


class Server:
    """`mlflow server` on a free port, as a process group that can be stopped and killed."""

    def __init__(self, folder: Path) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self.folder = folder
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def uri(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Start and wait for the first answer."""
        environment = {key: value for key, value in os.environ.items() if not key.startswith("MLFLOW_")}
        command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port)]
        command += ["--workers", "1", "--backend-store-uri", f"sqlite:///{self.folder / 'mlflow.db'}"]
        with open(self.folder / "server.log", "ab") as log:
            self.process = subprocess.Popen(
                command,
                cwd=self.folder,
                env={**environment, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"},
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        wait_until(self.answers)

    def answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.uri}/health", timeout=5) as answer:
                return answer.status == 200
        except OSError:
            return False

    def send(self, number: int) -> None:
        """Send a signal to all processes of the server."""
        assert self.process is not None
        os.killpg(self.process.pid, number)

    def kill(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.send(signal.SIGKILL)
            self.process.wait()

    def losses(self) -> list[tuple[int, float]]:
        """Return the steps and losses in the database, and check that the run has finished."""
        connection = sqlite3.connect(self.folder / "mlflow.db")
        statuses = connection.execute("select distinct status from runs").fetchall()
        rows = connection.execute("select step, value from metrics where key = 'loss' order by step").fetchall()
        connection.close()
        assert statuses == [("FINISHED",)]
        return rows


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    server = Server(tmp_path)
    monkeypatch.delenv("SSL_TRACKING", raising=False)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)
    yield server
    if server.process is not None and server.process.poll() is None:
        server.send(signal.SIGCONT)
    server.kill()


def test_all_numbers_arrive_whatever_the_server_did_meanwhile(
    server: Server, capfd: pytest.CaptureFixture[str]
) -> None:
    slowest = 0.0
    with tracking.start("pretrain", "tiny", digest="d", parameters={"a": 1}) as run:  # the server has not started yet

        def log(steps: range) -> None:
            nonlocal slowest
            for step in steps:
                begin = time.monotonic()
                run.metrics({"loss": float(step)}, step=step)
                slowest = max(slowest, time.monotonic() - begin)

        log(range(50))
        wait_until(lambda: "warning" in capfd.readouterr().err)
        server.start()
        log(range(50, 80))
        wait_until(lambda: run.id is not None)  # after RETRY_SECONDS
        server.send(signal.SIGSTOP)  # it accepts connections and never answers
        log(range(80, 120))
        time.sleep(8)  # longer than the time limit of a request
        server.send(signal.SIGCONT)
        log(range(120, 150))
        server.kill()
        log(range(150, STEPS))
        time.sleep(4)  # until a request has failed
        server.start()
    assert server.losses() == [(step, float(step)) for step in range(STEPS)]
    assert slowest < 0.5
    assert "warning" not in capfd.readouterr().err  # only the first failure warns


def test_a_server_that_dies_for_good_costs_a_warning_and_the_end_is_in_time(
    server: Server, capfd: pytest.CaptureFixture[str]
) -> None:
    server.start()
    with tracking.start("pretrain", "tiny", digest="d", parameters={"a": 1}) as run:
        wait_until(lambda: run.id is not None)
        server.kill()
        for step in range(STEPS):
            run.metrics({"loss": float(step)}, step=step)
        begin = time.monotonic()
    assert time.monotonic() - begin < tracking.CLOSE_SECONDS + 1
    assert capfd.readouterr().err.count("warning") == 1
