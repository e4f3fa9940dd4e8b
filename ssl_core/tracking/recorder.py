"""The side process of `run.py`: executes its messages in MLflow and survives every error of MLflow.

There is one MLflow experiment, with one parent run per version of an experiment, which has the headline numbers, and
one child run per stage. Messages that a failing server does not accept are kept and sent again. This file runs as a
script, so it imports nothing of the package.
"""

import fcntl
import hashlib
import itertools
import json
import logging
import os
import queue
import re
import signal
import sqlite3
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import IO, Any
from urllib.parse import unquote, urlsplit, urlunsplit

EXPERIMENT = "ssl-core"  # name of the MLflow experiment if MLFLOW_EXPERIMENT_NAME is not set
BATCH_SECONDS = 2.0  # between two writes of metrics
RETRY_SECONDS = 30.0  # before the next request to a server that failed
SYSTEM_SECONDS = 15.0  # between two readings of CPU and memory
PENDING_MESSAGES = 100_000  # kept for an unreachable server, about 50 MB
# MLflow's page reads its kind and a view of the runs (...&viewStateShareKey=leaderboard) from tags of the experiment.
KIND = ("mlflow.experimentKind", "custom_model_development")
LEADERBOARD = "mlflow.sharedViewState.leaderboard"
PARAMETERS = {"method": ("method", "name"), "backbone": ("backbone", "name"), "epochs": ("training", "epochs")}
COST = "cost/"  # the prefix of metrics that are the leaderboard's last columns
SQLITE = "sqlite:///"
ARTIFACT_PATHS = (  # the columns of MLflow's database that contain absolute paths
    ("experiments", "artifact_location"),
    ("runs", "artifact_uri"),
    ("logged_models", "artifact_location"),
)
# What SQLite, SQLAlchemy and MLflow report of a project's own database -> the fault and a remedy.
DATABASE_FAULTS = {
    "is not a database": "mlflow.db is damaged: move it away to start a new one",
    "is malformed": "mlflow.db is damaged: move it away to start a new one",
    "out-of-date database schema": "mlflow.db was written by another version of MLflow: copy it, then run "
    "`mlflow db upgrade sqlite:///mlflow.db`, or move it away",
    "database is locked": "another program keeps mlflow.db locked: end it",
    "database or disk is full": "no space left for mlflow.db: free some",
    "disk I/O error": "the disk of mlflow.db is full or broken: free some space",  # a full one, in WAL mode
    "readonly database": "mlflow.db cannot be written: change its owner or mode",
}
PARAMETER_LENGTH = 500  # MLflow allows 6000; the artifact configuration.yaml has the full values

Message = dict[str, Any]


def flatten(section: dict[str, Any], prefix: str = "") -> dict[str, str]:
    """Turn nested parameters into dotted keys and short texts for MLflow."""
    flat: dict[str, str] = {}
    for key, value in section.items():
        name = re.sub(r"[^\w.\-/: ]", "_", f"{prefix}{key}")[:250]  # characters that MLflow accepts in a key
        if isinstance(value, dict) and value:
            flat |= flatten(value, f"{name}.")
        else:
            text = value if isinstance(value, str) else json.dumps(value, default=str)
            flat[name] = text if len(text) <= PARAMETER_LENGTH else text[: PARAMETER_LENGTH - 1] + "…"
    return flat


def _note(text: str) -> None:
    print(f"warning: MLflow tracking: {without_passwords(text)}", file=sys.stderr, flush=True)


def without_passwords(text: str) -> str:
    """Return `text` without the user names and passwords of its addresses."""
    return re.sub(r"://[^/\s]*@", "://***@", text)


def use_credentials(uri: str) -> str:
    """Move the password of an HTTP address into the variables from which MLflow reads it; return the address."""
    address = urlsplit(uri)
    if address.scheme not in ("http", "https") or address.username is None:
        return uri
    os.environ["MLFLOW_TRACKING_USERNAME"] = unquote(address.username)
    os.environ["MLFLOW_TRACKING_PASSWORD"] = unquote(address.password or "")
    return urlunsplit(address._replace(netloc=address.netloc.rpartition("@")[2]))


class Recorder:
    """Executes messages in order, keeps those that a failing server did not accept, and tries again."""

    def __init__(self, uri: str) -> None:
        self.uri = uri
        self.pending: deque[Message] = deque(maxlen=PENDING_MESSAGES)
        self.opening: Message | None = None  # the start message, until it was executed
        self.ended = False  # whether MLflow has the end of the run
        self.status = "KILLED"  # of the run without an end message
        self.last_time: int | None = None  # of a message, in milliseconds
        self.retry_at = 0.0
        self.warned = False
        self.system_at = 0.0

    def follow(self, messages: "queue.SimpleQueue[Message | None]") -> None:
        """Execute messages until the stream ends."""
        ended = False
        while not ended:
            ended = self._collect(messages)
            if not ended:
                self._read_system()
            if ended or time.monotonic() >= self.retry_at:
                self._attempt(ended)

    def _collect(self, messages: "queue.SimpleQueue[Message | None]") -> bool:
        """Collect messages for BATCH_SECONDS, or until the start message; return True when the stream has ended."""
        deadline = time.monotonic() + BATCH_SECONDS
        while (left := deadline - time.monotonic()) > 0:
            try:
                message = messages.get(timeout=left)
            except queue.Empty:
                return False
            if message is None:
                return True
            self.last_time = message["time"]
            if message["kind"] == "start":
                self.opening = message
                return False
            if message["kind"] == "end":
                self.status = message["status"]
            else:
                self.pending.append(message)
        return False

    def _attempt(self, ended: bool) -> None:
        """Execute the pending messages; a failing server causes one warning and a pause."""
        try:
            if self.opening is not None:
                self._start(self.opening)
                self.opening = None
            self._execute_pending()
            if ended:
                self._end()
        except Exception as error:  # MLflow may raise anything
            self.retry_at = time.monotonic() + RETRY_SECONDS
            self._warn_once(error)

    def _warn_once(self, error: Exception) -> None:
        if not self.warned:
            reason = " ".join(str(error).split()) or type(error).__name__
            known = (fault for words, fault in DATABASE_FAULTS.items() if words in reason)
            _note(f"{next(known, reason[:300])}; the run continues without it")
        self.warned = True

    def _execute_pending(self) -> None:
        """Execute messages in order; drop those that the server refuses for good, keep those that failed."""
        while self.pending:
            messages = self._next_batch()
            try:
                self._execute(messages)
            except Exception as error:
                if not _refused(error):
                    raise
                self._warn_once(error)
            for _ in messages:
                self.pending.popleft()

    def _next_batch(self) -> list[Message]:
        """Return the first message, with all metrics messages that follow if it is one."""
        metrics = list(itertools.takewhile(lambda message: message["kind"] == "metrics", self.pending))
        return metrics or [self.pending[0]]

    def _execute(self, messages: list[Message]) -> None:
        match messages[0]["kind"]:
            case "metrics":
                self._metrics(messages)
            case "headline":
                self._headline(messages[0])
            case "artifact":
                run_id = self.parent_id if messages[0]["on_parent"] else self.run_id
                self.client.log_artifact(run_id, messages[0]["path"], messages[0]["folder"])
            case "dataset":
                self._dataset(messages[0])
            case "model":
                self._model(messages[0])

    def _start(self, message: Message) -> None:
        from mlflow.tracking import MlflowClient

        logging.disable(logging.CRITICAL)
        with locked(self.uri):
            if self.uri == own_database():
                follow_folder(Path("mlflow.db").absolute())
            self.client = MlflowClient(self.uri)
            self.experiment_id = open_experiment(self.client)
            self._open_parent(message)
            self._open_child(message)
        with suppress(BrokenPipeError):  # the stage has ended
            os.write(sys.stdout.fileno(), f"{self.run_id}\n".encode())

    def _open_parent(self, message: Message) -> None:
        parent = self._find(f"tags.version = '{message['version']}' and tags.stage = 'experiment'")
        if parent is None:
            parent = self._create(message, message["experiment"], {"stage": "experiment"})
        self.parent_id = parent.info.run_id
        self.model_id = parent.data.tags.get("model")
        self.client.update_run(self.parent_id, status="RUNNING")
        if message["stage"] == "pretrain" and not parent.data.params:
            self._log_parameters(self.parent_id, message["parameters"])
            self._log_parameters(self.parent_id, _parameter_columns(message["parameters"]))

    def _open_child(self, message: Message) -> None:
        from mlflow.entities import LoggedModelInput

        self.stage = stage = message["stage"]
        canonical = json.dumps(message["parameters"], sort_keys=True, default=str)
        options = hashlib.sha256(canonical.encode()).hexdigest()[:12]
        run = self._resumed(message["run_id"])
        self.last_steps = {metric.key: metric.step for metric in run.data._metric_objs} if run else {}
        run = run or self._find(
            f"tags.`mlflow.parentRunId` = '{self.parent_id}' and tags.stage = '{stage}' and tags.options = '{options}'"
        )
        if run is None:
            tags = {"stage": stage, "options": options, "mlflow.parentRunId": self.parent_id}
            run = self._create(message, f"{message['experiment']} / {stage}", tags)
            self._log_parameters(run.info.run_id, message["parameters"])
            self.client.log_dict(run.info.run_id, message["parameters"], "configuration.yaml")
        self.run_id, self.start_time = run.info.run_id, run.info.start_time
        self.client.update_run(self.run_id, status="RUNNING")
        if self.model_id and stage != "pretrain":
            self.client.log_inputs(self.run_id, models=[LoggedModelInput(self.model_id)])

    def _resumed(self, run_id: str | None) -> Any:
        """Return the run of a checkpoint; None if the database lacks it, for example after `mlflow gc`."""
        try:
            return self._restored(self.client.get_run(run_id)) if run_id else None
        except Exception as error:
            if not _refused(error):
                raise
            _note(f"the run {run_id} of the checkpoint is not in this database; the numbers go into another run")
            return None

    def _find(self, condition: str) -> Any:
        """Return the first run that fulfils the condition; a deleted one, restored, if there is no other."""
        from mlflow.entities import ViewType

        for view in (ViewType.ACTIVE_ONLY, ViewType.DELETED_ONLY):
            runs = self.client.search_runs([self.experiment_id], condition, view, 1, ["start_time ASC"])
            if runs:
                return self._restored(runs[0])
        return None

    def _restored(self, run: Any) -> Any:
        if run.info.lifecycle_stage == "deleted":
            self.client.restore_run(run.info.run_id)
            _note(f"the run '{run.info.run_name}' was deleted in MLflow; it is restored, since its stage runs again")
        return run

    def _create(self, message: Message, name: str, tags: dict[str, str]) -> Any:
        from mlflow.tracking.context.registry import resolve_tags

        source = f"ssl-core {message['stage']} {message['experiment']}"
        tags |= {"experiment": message["experiment"], "version": message["version"]}
        tags = resolve_tags({"mlflow.source.name": source, "mlflow.source.type": "LOCAL", **tags})
        return self.client.create_run(self.experiment_id, start_time=message["time"], run_name=name, tags=tags)

    def _log_parameters(self, run_id: str, parameters: dict[str, Any]) -> None:
        from mlflow.entities import Param

        self.client.log_batch(run_id, params=[Param(*pair) for pair in flatten(parameters).items()])

    def _metrics(self, messages: list[Message]) -> None:
        from mlflow.entities import Metric

        metrics = []
        for message in messages:
            step = message["step"]
            for key, value in message["values"].items():
                if step is None or step > self.last_steps.get(key, -1):
                    metrics.append(Metric(key, value, message["time"], step or 0))
        self.client.log_batch(self.run_id, metrics=metrics)

    def _headline(self, message: Message) -> None:
        from mlflow.entities import Metric

        metrics = []
        for key, value in message["values"].items():
            metrics.append(Metric(key, float(f"{value:.4g}"), message["time"], 0, model_id=self.model_id))
        self.client.log_batch(self.parent_id, metrics=metrics)
        if self.stage != "pretrain":  # losses of different methods cannot be compared
            with locked(self.uri):
                self._widen_leaderboard(message["columns"])

    def _widen_leaderboard(self, new: list[str]) -> None:
        """Add metrics to the columns of the leaderboard."""
        old = self.client.get_experiment(self.experiment_id).tags.get(LEADERBOARD)
        view = leaderboard([*metric_columns(old), *new])
        if view != old:
            self.client.set_experiment_tag(self.experiment_id, LEADERBOARD, view)

    def _dataset(self, message: Message) -> None:
        from mlflow.entities import Dataset, DatasetInput, InputTag

        dataset = Dataset(
            name=message["name"],
            digest=message["digest"][:12],  # MLflow's limit is 36
            source_type="local",
            source=json.dumps({"uri": message["source"]}),
            profile=json.dumps({"num_rows": message["num_images"]}),
        )
        data = [DatasetInput(dataset, [InputTag("mlflow.data.context", message["context"])])]
        self.client.log_inputs(self.run_id, datasets=data)
        if self.stage == "pretrain":
            self.client.log_inputs(self.parent_id, datasets=data)

    def _model(self, message: Message) -> None:
        from mlflow.entities import LoggedModelOutput

        if self.model_id:  # an earlier run registered it
            return
        model = self.client.create_logged_model(
            self.experiment_id,
            name=Path(message["path"]).parent.name,
            source_run_id=self.run_id,
            tags={"mlflow.model.isExternal": "true", "path": message["path"]},
            params=flatten(message["parameters"]),
            model_type="backbone",
        )
        self.client.finalize_logged_model(model.model_id, "READY")
        self.model_id = model.model_id
        self.client.log_outputs(self.run_id, [LoggedModelOutput(model.model_id, step=0)])
        self.client.set_tag(self.parent_id, "model", model.model_id)

    def _read_system(self) -> None:
        """Record CPU and memory every SYSTEM_SECONDS, under MLflow's own names."""
        if self.opening is not None or time.monotonic() < self.system_at:
            return
        import psutil

        self.system_at = time.monotonic() + SYSTEM_SECONDS
        now = int(time.time() * 1000)
        values = {
            "system/cpu_utilization_percentage": psutil.cpu_percent(),
            "system/system_memory_usage_megabytes": psutil.virtual_memory().used / 1e6,
        }
        step = max(0, now - self.start_time) // 1000  # seconds since the start of the run, also after a resume
        self.pending.append({"kind": "metrics", "time": now, "values": values, "step": step})

    def _end(self) -> None:
        self.client.set_terminated(self.run_id, self.status, self.last_time)
        self.client.set_terminated(self.parent_id, self.status, self.last_time)
        if self.uri.startswith(SQLITE) and not Path(self.uri.removeprefix(SQLITE)).exists():
            _note("mlflow.db was removed during this stage, whose numbers are in history.csv only")
        self.ended = True


def _refused(error: Exception) -> bool:
    """Return whether a request can never succeed (a 4xx answer, a missing file); other errors are worth a retry."""
    from mlflow.exceptions import MlflowException

    if isinstance(error, MlflowException):
        return 400 <= error.get_http_status_code() < 500  # an unreachable server is INTERNAL_ERROR, 500
    return isinstance(error, FileNotFoundError | TypeError | ValueError)


def open_experiment(client: Any) -> str:
    """Return the id of the MLflow experiment, which is created or restored, and which has a leaderboard afterwards."""
    name = os.environ.get("MLFLOW_EXPERIMENT_NAME", EXPERIMENT)
    experiment = client.get_experiment_by_name(name)
    tags = dict([KIND, (LEADERBOARD, leaderboard([]))])
    if experiment is None:
        return client.create_experiment(name, tags=tags)
    if experiment.lifecycle_stage == "deleted":
        client.restore_experiment(experiment.experiment_id)
        _note(f"the experiment '{name}' was deleted in MLflow; it is restored for this run")
    for key in tags.keys() - experiment.tags.keys():
        client.set_experiment_tag(experiment.experiment_id, key, tags[key])
    return experiment.experiment_id


def leaderboard(metrics: list[str]) -> str:
    """Return the view of MLflow's page: accuracies, parameters, then costs; only experiments, the best first.

    Without `metrics` it has all runs: MLflow's page calls an empty list "filtered" if there is a filter.
    """
    unique = list(dict.fromkeys(metrics))
    accuracies = [f"metrics.`{name}`" for name in unique if not name.startswith(COST)]
    costs = [f"metrics.`{name}`" for name in unique if name.startswith(COST)]
    columns = [*accuracies, *(f"params.`{name}`" for name in PARAMETERS), *costs]
    view: dict[str, Any] = {"selectedColumns": columns, "columnOrder": columns}
    if accuracies:
        view |= {"searchFilter": "tags.stage = 'experiment'", "orderByKey": accuracies[0], "orderByAsc": False}
    return json.dumps(view)


def _parameter_columns(settings: dict[str, Any]) -> dict[str, Any]:
    """Return the parameters that are columns of the leaderboard, under short names."""
    values = {name: settings.get(section, {}).get(key) for name, (section, key) in PARAMETERS.items()}
    return {name: value for name, value in values.items() if value is not None}


def metric_columns(view: str | None) -> list[str]:
    """Return the metrics among the columns of a view."""
    columns = json.loads(view or "{}").get("selectedColumns", [])
    return [column[len("metrics.`") : -1] for column in columns if column.startswith("metrics.`")]


def own_database() -> str:
    """Return the address of the project's own database, in the working directory."""
    return f"sqlite:///{Path('mlflow.db').absolute()}"


def follow_folder(database: Path) -> None:
    """Let the artifact paths in `database` follow a project folder that was copied, moved or renamed.

    MLflow stores absolute paths: without this a copy would write into the original's folder. A database that is a link
    belongs to another folder and keeps its paths.
    """
    if not database.is_file() or database.is_symlink():
        return
    folder = database.with_name("mlruns")
    with closing(sqlite3.connect(database, timeout=20)) as connection, connection:
        for old in _artifact_folders(connection):
            if old == folder or (old.exists() and folder.exists() and old.samefile(folder)):
                continue
            for table, column in ARTIFACT_PATHS:
                connection.execute(
                    f"update {table} set {column} = ? || substr({column}, ?) where substr({column}, 1, ?) = ?",
                    (str(folder), len(str(old)) + 1, len(str(old)) + 1, f"{old}/"),
                )
            _note(f"this folder was {old.parent}: artifact paths in {database.name} now lead to {folder}")


def _artifact_folders(connection: Any) -> set[Path]:
    """Return the folders `mlruns` of MLflow's default artifact locations, `<folder>/mlruns/<experiment id>`."""
    folders = set()
    with suppress(connection.OperationalError):  # no tables yet
        for number, location in connection.execute("select experiment_id, artifact_location from experiments"):
            path = Path(location or "")
            if path.is_absolute() and path.name == str(number) and path.parent.name == "mlruns":
                folders.add(path.parent)
    return folders


@contextmanager
def locked(uri: str) -> Iterator[None]:
    """Hold a lock on the tracking store: two processes must not create the same database at once."""
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC  # a link could lead to a file of somebody
    descriptor = os.open(lock_file(uri), flags, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        if uri.startswith(SQLITE):
            with closing(sqlite3.connect(uri.removeprefix(SQLITE), timeout=20)) as connection:
                connection.execute("PRAGMA journal_mode=WAL")  # the MLflow page can read during writing
        yield
    finally:
        os.close(descriptor)  # releases the lock


def lock_file(uri: str) -> Path:
    """Return the lock file of a store: beside a SQLite database, else in the user's runtime or cache folder."""
    if uri.startswith(SQLITE):
        database = Path(uri.removeprefix(SQLITE))
        return database.with_name(f"{database.name}.lock")
    parent = os.environ.get("XDG_RUNTIME_DIR") or os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(parent) / "ssl-core"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    return folder / f"{hashlib.sha256(uri.encode()).hexdigest()[:12]}.lock"


def _read(stream: IO[bytes], messages: "queue.SimpleQueue[Message | None]") -> None:
    for line in stream:
        messages.put(json.loads(line))
    messages.put(None)


def main() -> None:
    """Record the messages on standard input, one JSON object per line."""
    os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"  # read when mlflow is imported
    for name in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # for the training process, whose end is recorded
        signal.signal(name, signal.SIG_IGN)
    messages: queue.SimpleQueue[Message | None] = queue.SimpleQueue()
    threading.Thread(target=_read, args=(sys.stdin.buffer, messages), daemon=True).start()
    uri = use_credentials(os.environ.get("MLFLOW_TRACKING_URI") or own_database())
    os.environ["MLFLOW_TRACKING_URI"] = uri
    recorder = Recorder(uri)
    recorder.follow(messages)
    sys.exit(not recorder.ended)


if __name__ == "__main__":
    main()
