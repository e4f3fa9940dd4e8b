"""Tracking in MLflow 3 without delaying the training.

MLflow takes seconds to import, and a server may be unreachable, refuse requests or hang. So only a side process
(`recorder.py`) uses MLflow, and `Run` sends it messages through a pipe: a training step costs microseconds, whatever
the server does. If the training process dies, even by SIGKILL, the pipe closes without an end message, and the recorder
marks the run KILLED. `SSL_TRACKING=off` disables tracking; MLFLOW_TRACKING_URI and MLFLOW_EXPERIMENT_NAME are used.

Jobs of a cluster would write to one SQLite file from several hosts, which its locks do not survive on a network file
system. Without a server each job writes its messages into a file of its own; `merge` sends them to MLflow later.
"""

import fcntl
import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

FILES = Path("mlflow-jobs")  # messages of jobs of a cluster, one file per stage and job
CLOSE_SECONDS = 20.0  # longest wait for the last numbers at the end of a stage
INTERRUPTED_SECONDS = 3.0  # the same after Ctrl-C or SIGTERM


def is_off() -> bool:
    """Return whether the environment disables tracking."""
    return os.environ.get("SSL_TRACKING", "").lower() in ("off", "0", "false", "no")


def start(
    stage: str,
    experiment: str,
    *,
    digest: str,
    parameters: dict[str, Any],
    run_id: str | None = None,
) -> "Run":
    """Start, or continue, the run of one stage.

    `digest` is the experiment's version. Every stage passes the digest of the pre-training, so that all stages of a
    version have one parent run. A stage that runs again with equal `parameters` continues its run. `run_id`, from a
    checkpoint, continues that run without repeating the steps that it has.
    """
    if is_off():
        return Run()
    run = Run(file=_message_file(stage, experiment)) if _is_on_cluster() else Run(_start_recorder())
    version = f"{experiment}@{digest[:12]}"
    run._send("start", stage=stage, experiment=experiment, version=version, parameters=parameters, run_id=run_id)
    return run


def merge(folder: Path = FILES) -> list[Path]:
    """Send the messages in the files of `folder` to MLflow, one file after the other, and remove each; return them.

    A file of a running job stays, and one that MLflow does not accept. Raises ValueError if a job of SLURM calls this.
    """
    if _is_on_cluster():
        raise ValueError("merging writes to one SQLite file: run it on one host, outside of SLURM's jobs")
    merged = []
    for path in sorted(folder.glob("*.jsonl"), key=lambda path: path.stat().st_mtime):
        if _is_open(path):
            continue
        recorder = _start_recorder()
        recorder.communicate(b"".join(_messages(path)))
        if recorder.returncode == 0:
            path.unlink()
            merged.append(path)
    return merged


def _is_open(path: Path) -> bool:
    """Return whether a job still writes this file, which it has locked."""
    with open(path, "rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except OSError:  # a file system without locks
            return False
    return False


def _messages(path: Path) -> Iterator[bytes]:
    """Yield the complete lines of a file, without pictures that existed only during their stage."""
    for line in path.read_bytes().splitlines(keepends=True):
        if not line.endswith(b"\n"):  # the job was killed
            return
        message = json.loads(line)
        if message["kind"] != "artifact" or Path(message["path"]).is_file():
            yield line


def _is_on_cluster() -> bool:
    """Return whether this is a job of SLURM without an MLflow server."""
    address = os.environ.get("MLFLOW_TRACKING_URI", "")
    return "SLURM_JOB_ID" in os.environ and (not address or address.startswith("sqlite:"))


def _message_file(stage: str, experiment: str) -> IO[bytes]:
    FILES.mkdir(exist_ok=True)
    name = f"{experiment}.{stage}.{os.environ['SLURM_JOB_ID']}.{os.getpid()}.jsonl"
    return open(FILES / name, "wb", buffering=0)


def _start_recorder() -> "subprocess.Popen[bytes]":
    defaults = {"MLFLOW_HTTP_REQUEST_TIMEOUT": "5", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0"}  # the recorder retries
    script = str(Path(__file__).with_name("recorder.py"))
    command = [sys.executable, "-P", script]  # -P: the folder `datasets/` must not become a module
    environment = {**defaults, **os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0, env=environment)


class Run:
    """The run of one stage; the context manager ends it as FINISHED, FAILED or KILLED. No method blocks or raises."""

    def __init__(self, recorder: "subprocess.Popen[bytes] | None" = None, *, file: IO[bytes] | None = None) -> None:
        self._recorder = recorder
        self._pipe = recorder.stdin if recorder else file
        if file is not None:
            with suppress(OSError):  # a file system without locks
                fcntl.flock(file, fcntl.LOCK_EX)  # `merge` leaves it to this run
        self._answer = recorder.stdout if recorder else None
        self._id: str | None = None
        self._backlog = bytearray()  # bytes that the pipe did not accept yet; the recorder reads all the time
        if self._pipe is not None:
            os.set_blocking(self._pipe.fileno(), False)

    @property
    def id(self) -> str | None:
        """MLflow's run id; None until MLflow has answered, seconds after the start."""
        if self._id is None and self._answer is not None and select.select([self._answer], [], [], 0)[0]:
            self._id = self._answer.readline().decode().strip() or None
        return self._id

    def metrics(self, values: dict[str, float], *, step: int | None = None) -> None:
        """Record numbers of this stage, at a step or for the whole stage."""
        self._send("metrics", values={key: float(value) for key, value in values.items()}, step=step)

    def headline(self, values: dict[str, float], *, columns: Sequence[str] | None = None) -> None:
        """Record numbers on the parent run and its model; `columns` (None: all) appear in the list of runs."""
        numbers = {key: float(value) for key, value in values.items()}
        self._send("headline", values=numbers, columns=list(numbers if columns is None else columns))

    def artifact(self, path: Path, *, folder: str | None = None, on_parent: bool = False) -> None:
        """Copy a file into the run or its parent; the file must exist until the run has ended."""
        self._send("artifact", path=str(path.absolute()), folder=folder, on_parent=on_parent)

    def dataset(self, name: str, digest: str, *, num_images: int, source: Path, context: str = "training") -> None:
        """Record the data set of this stage; `digest` is that of the manifest."""
        self._send("dataset", name=name, digest=digest, num_images=num_images, source=str(source), context=context)

    def model(self, path: Path, parameters: dict[str, Any]) -> None:
        """Register the backbone at `path` as a model outside MLflow, without a copy."""
        self._send("model", path=str(path), parameters=parameters)

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if self._pipe is None:
            return
        status = _status(kind)
        self._send("end", status=status)
        deadline = time.monotonic() + (INTERRUPTED_SECONDS if status == "KILLED" else CLOSE_SECONDS)
        self._close_pipe(deadline)
        if self._recorder is not None:
            with suppress(subprocess.TimeoutExpired):  # after the deadline the recorder ends by itself
                self._recorder.wait(max(0.0, deadline - time.monotonic()))
        self._id = self.id  # the last chance to read it
        if self._answer is not None:
            self._answer.close()
            self._answer = None

    def _send(self, kind: str, **content: Any) -> None:
        if self._pipe is not None:
            message = {"kind": kind, "time": int(time.time() * 1000), **content}
            self._backlog += json.dumps(message, default=str).encode() + b"\n"
            self._deliver(self._pipe)

    def _deliver(self, pipe: IO[bytes]) -> None:
        """Write as much as the pipe accepts without blocking."""
        try:
            del self._backlog[: os.write(pipe.fileno(), self._backlog)]
        except BlockingIOError:
            pass
        except OSError:  # the recorder has ended, or the disk of a file is full; training continues
            self._backlog.clear()

    def _close_pipe(self, deadline: float) -> None:
        """Deliver the backlog until `deadline`, then close the pipe, which ends the recorder."""
        pipe, self._pipe = self._pipe, None
        if pipe is None:
            return
        while self._backlog and (left := deadline - time.monotonic()) > 0:
            select.select([], [pipe], [], left)
            self._deliver(pipe)
        pipe.close()


def _status(error: type[BaseException] | None) -> str:
    if error is None:
        return "FINISHED"
    return "FAILED" if issubclass(error, Exception) else "KILLED"  # KILLED: KeyboardInterrupt, SystemExit
