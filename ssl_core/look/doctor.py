"""Check this machine and print one line per check: it works, a warning, or a failure with a remedy."""

import importlib.util
import os
import platform
import shutil
import sqlite3
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal, NamedTuple

from ssl_core.mistakes import excerpt
from ssl_core.provenance import hardware, installed_version, num_cores
from ssl_core.terminal import Colour, coloured
from ssl_core.tracking import run as tracking
from ssl_core.tracking.recorder import without_passwords

PYTHONS = ((3, 11), (3, 13))  # the oldest and the newest tested version
SPACE = 5e9  # free bytes of disk that a run on small data may need
SHARED = 1e9  # free bytes of /dev/shm for several processes
MEMORY = 4e9  # free bytes of memory
PORT = 5000  # of `ssl-core ui`
DECODE = """
import io, numpy as np
from PIL import Image
from nvidia.dali import fn, pipeline_def
file = io.BytesIO()
Image.fromarray(np.full((8, 8, 3), 100, np.uint8)).save(file, "JPEG")
content = np.frombuffer(file.getvalue(), np.uint8)
@pipeline_def(batch_size=2, num_threads=1, device_id=None)
def graph():
    return fn.resize(fn.decoders.image(fn.external_source(lambda: [content, content])), size=(4, 4))
pipe = graph()
pipe.build()
assert np.array(pipe.run()[0].at(1)).shape == (4, 4, 3)
"""


COLOURS: dict[str, Colour] = {"ok": "green", "warning": "yellow", "fails": "red"}


class Finding(NamedTuple):
    """One line of the report."""

    state: Literal["ok", "warning", "fails"]
    subject: str
    message: str


def _judge(fine: bool, subject: str, message: str, advice: str, state: Literal["warning", "fails"]) -> Finding:
    """Return `message` if the check is fine, else `message` and the advice."""
    return Finding("ok", subject, message) if fine else Finding(state, subject, f"{message}{advice}")


def examine() -> bool:
    """Print all findings; return whether everything required works."""
    checks: list[Callable[[], Iterator[Finding]]] = [
        _python, _torch, _gpu, _dali, _processor, _memory, _disk, _shared_memory, _project, _database, _port, _programs,
    ]  # fmt: skip
    fine = True
    for check in checks:
        try:
            for finding in check():
                state = coloured(f"{finding.state:<8}", COLOURS[finding.state], sys.stdout)
                print(f"{state} {finding.subject:<15} {finding.message}", flush=True)
                fine &= finding.state != "fails"
        except Exception as error:  # any error: the other checks still run
            reason = excerpt(error) or type(error).__name__
            print(f"{coloured('fails   ', 'red', sys.stdout)} {check.__name__.strip('_'):<15} {reason}")
            fine = False
    print("everything required works" if fine else "repair what fails; `make install` renews the environment")
    return fine


def _python() -> Iterator[Finding]:
    tested = PYTHONS[0] <= sys.version_info[:2] <= PYTHONS[1]
    advice = ", but 3.11 to 3.13 are required: run make PYTHON=python3.12"
    yield _judge(tested, "Python", platform.python_version(), advice, "fails")


def _torch() -> Iterator[Finding]:
    import torch
    import torchvision

    product = torch.full((8, 8), 0.5) @ torch.full((8, 8), 2.0)
    message = f"{torch.__version__}, torchvision {torchvision.__version__}, multiplies matrices"
    yield _judge(bool((product == 8).all()), "torch", message, " wrongly", "fails")


def _gpu() -> Iterator[Finding]:
    import torch

    tool = shutil.which("nvidia-smi")
    if torch.cuda.is_available():
        for number in range(torch.cuda.device_count()):
            card = torch.cuda.get_device_properties(number)
            size = torch.ones(8, 8, device=f"cuda:{number}").sum().item()
            yield Finding("ok" if size == 64 else "fails", "GPU", f"{card.name}, {_size(card.total_memory)}")
    elif torch.version.cuda is None:
        yield Finding("warning", "GPU", "this torch is built without CUDA: runs use the processor")
    elif tool is None:
        yield Finding("ok", "GPU", "none (no nvidia-smi): runs use the processor")
    else:
        answer = subprocess.run([tool], capture_output=True, text=True, timeout=10)
        reason = "has no card" if answer.returncode else f"may be too old for CUDA {torch.version.cuda}: update it"
        yield Finding("warning", "GPU", f"torch sees none; the driver {reason}; runs use the processor")


def _dali() -> Iterator[Finding]:
    version = installed_version("nvidia-dali-cuda130") or installed_version("nvidia-dali-cuda120")
    if version is None:
        yield Finding("fails", "DALI", "not installed: run `make install`")
        return
    # In a process of its own, since a missing processor instruction kills the process.
    answer = subprocess.run([sys.executable, "-W", "ignore", "-c", DECODE], capture_output=True, text=True, timeout=60)
    if answer.returncode == 0:
        yield Finding("ok", "DALI", f"{version}, decodes and resizes two images")
    else:
        reason = (answer.stderr.strip().splitlines() or [f"it ends with status {answer.returncode}"])[-1]
        yield Finding("fails", "DALI", f"{version}: {reason}")


def _processor() -> Iterator[Finding]:
    import torch

    from ssl_core.training.precision import autocast_type

    cores, load = num_cores(), os.getloadavg()[0]
    yield Finding("ok", "processor", f"{hardware()}; load {load:.1f}" + (" (busy)" if load > cores else ""))
    limit = os.environ.get("OMP_NUM_THREADS")
    if limit is not None and limit.isdecimal() and int(limit) < cores:
        yield Finding("ok", "threads", f"OMP_NUM_THREADS={limit} of {cores} cores; the workflow sets it for each job")
    native = autocast_type("auto", torch.device("cuda" if torch.cuda.is_available() else "cpu")) is not None
    message = "native: precision auto uses it" if native else "not native: precision auto uses float32"
    yield Finding("ok", "bfloat16", message)


def _memory() -> Iterator[Finding]:
    import psutil

    memory = psutil.virtual_memory()
    free = f"{_size(memory.available)} of {_size(memory.total)} free"
    advice = ": a run needs 1 to 4 GB; lower batch_size if memory runs out"
    yield _judge(memory.available >= MEMORY, "memory", free, advice, "warning")


def _disk() -> Iterator[Finding]:
    for subject, place in (("disk", Path()), ("temporary files", Path(tempfile.gettempdir()))):
        free = shutil.disk_usage(place).free
        try:
            tempfile.TemporaryFile(dir=place).close()
        except OSError:
            advice = "change its owner or use another folder"
            yield Finding("fails", subject, f"{place.resolve()} is not writable: {advice}")
            continue
        message = f"{_size(free)} free in {place.resolve()}"
        yield _judge(free >= SPACE, subject, message, ": too little for large data sets", "warning")


def _shared_memory() -> Iterator[Finding]:
    place = Path("/dev/shm")
    free = shutil.disk_usage(place).free if place.is_dir() else 0
    advice = ": for several GPUs start the container with --shm-size 1g"
    yield _judge(free >= SHARED, "/dev/shm", f"{_size(free)} free", advice, "warning")


def _project() -> Iterator[Finding]:
    from ssl_core.data.remote_shards import find_local
    from ssl_core.data.shards import Manifest, verify
    from ssl_core.experiments.overlays import CONFIG, load_configuration

    if not CONFIG.exists():
        remedy = "run in the project's folder (`ssl-core init DIR` makes one)"
        yield Finding("warning", "project", f"no config.yaml here: {remedy}")
        return
    layers = load_configuration([])
    yield Finding("ok", "config.yaml", f"valid, {len(layers.settings['experiments'])} experiments")
    manifests = sorted(Path("shards").glob("*/manifest.json"))
    if not manifests:
        yield Finding("ok", "data sets", "none sharded yet; a run shards its data set")
    for path in manifests:
        try:
            manifest = Manifest.load(path)
            is_remote = layers.address is not None and find_local(path, manifest.splits) != path
            for split in () if is_remote else manifest.splits:
                verify(manifest, split)
            shards = f"shards at {layers.address}" if is_remote else "all shards of the right size"
            images = ", ".join(f"{name} {split.images}" for name, split in manifest.splits.items())
            yield Finding("ok", "data set", f"{manifest.dataset}: {images} images, {shards}")
        except ValueError as error:
            yield Finding("warning", "data set", str(error))


def _database() -> Iterator[Finding]:
    with tempfile.TemporaryDirectory() as folder:  # raises where SQLite cannot lock files (some network disks)
        connection = sqlite3.connect(Path(folder, "try.db"))
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("CREATE TABLE tried (number INTEGER)")
        connection.commit()
        connection.close()
    if tracking.is_off():
        yield Finding("ok", "tracking", "disabled by SSL_TRACKING")
        return
    address = os.environ.get("MLFLOW_TRACKING_URI") or "sqlite:///mlflow.db"
    if not address.startswith("sqlite:///"):
        yield from _server(address)
        return
    path = Path(address.removeprefix("sqlite:///"))
    if not path.exists():
        yield Finding("ok", "tracking", f"{path} is created by the first run")
        return
    connection = sqlite3.connect(f"file:{path}?mode=ro", uri=True, timeout=2)
    runs = connection.execute("SELECT COUNT(*) FROM runs").fetchone()[0]
    connection.close()
    yield Finding("ok", "tracking", f"{path} is readable, {runs} runs")


def _server(address: str) -> Iterator[Finding]:
    import requests

    name = without_passwords(address)
    if not address.startswith(("http://", "https://")):
        yield Finding("ok", "tracking", f"{name} (not tested)")
        return
    try:
        requests.get(f"{address.rstrip('/')}/health", timeout=3).raise_for_status()
        yield Finding("ok", "tracking", f"{name} answers")
    except requests.RequestException as error:
        reason = without_passwords(str(error))
        yield Finding("warning", "tracking", f"{name} does not answer ({reason}): runs continue without it")


def _port() -> Iterator[Finding]:
    import socket

    with socket.socket() as caller:
        caller.settimeout(1)
        taken = caller.connect_ex(("127.0.0.1", PORT)) == 0
    if taken:
        yield Finding("warning", f"port {PORT}", "in use, perhaps by `ssl-core ui` itself: run ssl-core ui --port 5001")
    else:
        yield Finding("ok", f"port {PORT}", "free for `ssl-core ui`")


def _programs() -> Iterator[Finding]:
    if shutil.which("sbatch") is None:
        yield Finding("ok", "SLURM", "not installed; only a cluster needs it")
    elif importlib.util.find_spec("snakemake_executor_plugin_slurm") is None:
        yield Finding("warning", "SLURM", "its plugin is missing: run `make install` on this host")
    else:
        yield Finding("ok", "SLURM", "sbatch and Snakemake's plugin are installed")
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "firefox"))), None)
    message = browser or "none on this machine; open tables, reports and MLflow from another"
    yield Finding("ok", "browser", message)


def _size(number: float) -> str:
    return f"{number / 1e9:.1f} GB"
