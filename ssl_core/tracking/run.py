"""Tracking in MLflow 3, beside the training and never in its way.

MLflow takes seconds to import, and a server may be away, refuse or hang. So a small side process (`recorder.py`) alone
talks to MLflow, and `Run` sends it messages through a pipe: a training step pays microseconds, whatever the server
does. When the training process dies, were it by SIGKILL, the pipe ends without a farewell and the recorder closes the
run as KILLED. `SSL_TRACKING=off` switches tracking off; MLFLOW_TRACKING_URI and MLFLOW_EXPERIMENT_NAME are honoured.
"""

import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

CLOSE_SECONDS = 20.0  # what the end of a stage may wait for the last numbers to arrive
INTERRUPTED_SECONDS = 3.0  # the same after Ctrl-C or SIGTERM


def is_off() -> bool:
    """Say whether the environment switches tracking off."""
    return os.environ.get("SSL_TRACKING", "").lower() in ("off", "0", "false", "no")


def start(
    stage: str,
    experiment: str,
    *,
    digest: str,
    parameters: dict[str, Any],
    run_id: str | None = None,
    tags: dict[str, str] | None = None,
) -> "Run":
    """Start, or continue, the run of one stage.

    `digest` is the experiment's version: every stage of a version gives the same, that of its pre-training, and so
    joins the same parent run. A stage that comes again with equal `parameters` continues its run; `run_id` (out of a
    checkpoint) continues that run and does not repeat the steps it already has.
    """
    if is_off():
        return Run(None)
    defaults = {"MLFLOW_HTTP_REQUEST_TIMEOUT": "5", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0"}  # the recorder retries
    command = [
        sys.executable,
        "-P",
        str(Path(__file__).with_name("recorder.py")),
    ]  # -P: the folder `datasets/` must not become a module
    environment = {**defaults, **os.environ, "OMP_NUM_THREADS": "1"}
    recorder = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0, env=environment)
    run = Run(recorder)
    run._send(
        "start",
        stage=stage,
        experiment=experiment,
        digest=digest,
        parameters=parameters,
        run_id=run_id,
        tags=tags or {},
    )
    return run


class Run:
    """The run of one stage; as a context manager it ends FINISHED, FAILED or KILLED. No method waits or raises."""

    def __init__(self, recorder: "subprocess.Popen[bytes] | None") -> None:
        self._recorder = recorder
        self._pipe = recorder.stdin if recorder else None
        self._answer = recorder.stdout if recorder else None
        self._id: str | None = None
        self._backlog = bytearray()  # what the pipe did not take at once; the recorder always reads, so nearly empty
        if self._pipe is not None:
            os.set_blocking(self._pipe.fileno(), False)

    @property
    def id(self) -> str | None:
        """MLflow's run id, None until MLflow has answered (seconds after the start)."""
        if self._id is None and self._answer is not None and select.select([self._answer], [], [], 0)[0]:
            self._id = self._answer.readline().decode().strip() or None
        return self._id

    def metrics(self, values: dict[str, float], *, step: int | None = None) -> None:
        """Record numbers of this stage, of a step or (no step) of the whole."""
        self._send("metrics", values={key: float(value) for key, value in values.items()}, step=step)

    def headline(self, values: dict[str, float], *, columns: Sequence[str] | None = None) -> None:
        """Record numbers on the parent run and its model; `columns` (else all) stand on the page of all experiments."""
        numbers = {key: float(value) for key, value in values.items()}
        self._send("headline", values=numbers, columns=list(numbers if columns is None else columns))

    def artifact(self, path: Path, *, folder: str | None = None, on_parent: bool = False) -> None:
        """Copy a file into the run, or its parent; it must stay where it is until the run has ended."""
        self._send("artifact", path=str(path.absolute()), folder=folder, on_parent=on_parent)

    def dataset(self, name: str, digest: str, *, num_images: int, source: Path, context: str = "training") -> None:
        """Name the data this stage reads; `digest` is the manifest's."""
        self._send("dataset", name=name, digest=digest, num_images=num_images, source=str(source), context=context)

    def model(self, path: Path, parameters: dict[str, Any]) -> None:
        """Register the backbone at `path` as a model that lives outside MLflow: nothing is copied."""
        self._send("model", path=str(path), parameters=parameters)

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if self._recorder is None:
            return
        killed = kind is not None and not issubclass(kind, Exception)  # KeyboardInterrupt, SystemExit
        self._send("end", status="KILLED" if killed else "FINISHED" if kind is None else "FAILED")
        deadline = time.monotonic() + (INTERRUPTED_SECONDS if killed else CLOSE_SECONDS)
        self._hang_up(deadline)
        with suppress(subprocess.TimeoutExpired):  # past the deadline the recorder ends by itself
            self._recorder.wait(max(0.0, deadline - time.monotonic()))
        self._id = self.id  # before its source closes
        if self._answer is not None:
            self._answer.close()
            self._answer = None

    def _send(self, kind: str, **content: Any) -> None:
        if self._pipe is not None:
            message = {"kind": kind, "time": int(time.time() * 1000), **content}
            self._backlog += json.dumps(message, default=str).encode() + b"\n"
            self._deliver(self._pipe)

    def _deliver(self, pipe: IO[bytes]) -> None:
        """Write what the pipe takes without waiting."""
        try:
            del self._backlog[: os.write(pipe.fileno(), self._backlog)]
        except BlockingIOError:
            pass
        except BrokenPipeError:  # the recorder is gone; training goes on
            self._backlog.clear()

    def _hang_up(self, deadline: float) -> None:
        """Deliver the rest until `deadline`, then close the pipe: the recorder's sign to end."""
        pipe, self._pipe = self._pipe, None
        if pipe is None:
            return
        while self._backlog and (left := deadline - time.monotonic()) > 0:
            select.select([], [pipe], [], left)
            self._deliver(pipe)
        pipe.close()
