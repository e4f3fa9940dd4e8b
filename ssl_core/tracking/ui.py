"""`ssl-core ui`: MLflow's page on this machine, opened on the leaderboard."""

import os
import socket
import sys
from pathlib import Path

from ssl_core.tracking.recorder import follow_folder, locked, open_experiment, own_database, use_credentials

HOST = "127.0.0.1"
VIEW = "workflowType=machine_learning&viewStateShareKey=leaderboard"


def serve(port: int) -> None:
    """Print the leaderboard's address and become MLflow's server; only print it if the runs are on another server.

    The MLflow experiment is created before the first run, so that the address is valid at once. Raises `ValueError` if
    the port is in use.
    """
    os.environ |= {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    uri = use_credentials(os.environ.get("MLFLOW_TRACKING_URI") or own_database())
    is_remote = uri.startswith(("http://", "https://"))
    if not is_remote:
        _check_port(port)
    server = uri.rstrip("/") if is_remote else f"http://{HOST}:{port}"
    print(f"The leaderboard: {server}/#/experiments/{_experiment_id(uri)}/runs?{VIEW}", flush=True)
    if not is_remote:  # one worker and no job executor: a sixth of the processes and memory of the default
        options = ["--host", HOST, "--port", str(port), "--workers", "1", "--backend-store-uri", uri]
        os.execv(sys.executable, [sys.executable, "-P", "-m", "mlflow", "ui", *options])


def _experiment_id(uri: str) -> str:
    from mlflow.tracking import MlflowClient

    with locked(uri):
        if uri == own_database():
            follow_folder(Path("mlflow.db").absolute())
        return open_experiment(MlflowClient(uri))


def _check_port(port: int) -> None:
    with socket.socket() as client:
        if client.connect_ex((HOST, port)) == 0:
            raise ValueError(
                f"port {port} is in use, perhaps by another `ssl-core ui`: choose one with --port {port + 1}"
            )
