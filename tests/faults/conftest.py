"""A tiny project, its stages as processes that start within milliseconds, and the output of an undisturbed run."""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import pytest
import yaml
from PIL import Image

WARM = Path(__file__).with_name("warm.py")
NAMESPACE = ("unshare", "--user", "--map-root-user", "--mount")  # here an unprivileged user may mount a small disk

IMAGES = 24  # per class and split
CLASSES = ("circle", "square")
SPLITS = ("train", "test", "extra_a", "extra_b", "extra_c", "extra_d")  # at least one shard each
SPEC = {
    "dataset": {"name": "tiny"},
    "backbone": {"name": "mobilenet_v3_small", "stem": "small"},
    "method": {"name": "ressl", "queue_size": 32, "projector_hidden": 32, "embedding_dim": 16, "warmup": 0.5},
    # Saves a checkpoint with every row of the history, which is every third step.
    "training": {"epochs": 8, "batch_size": 16, "warmup_epochs": 1, "checkpoint_minutes": 1e-6, "precision": "fp32"},
}
KNN = {"protocol": "knn", "dataset": {"name": "tiny"}, "k": 5}
MANIFEST = ["--manifest", "shards/tiny/manifest.json", "--code", "c" * 64]
COMMANDS = {
    "shard": ["datasets/tiny.yaml", "--output", "shards/tiny", "--threads", "2"],
    "pretrain": ["tiny", "--spec", json.dumps(SPEC), "--output", "results/tiny"],
    "evaluate": ["tiny", "knn", "--spec", json.dumps(KNN), "--output", "results/tiny/knn.json"],
}
COMMANDS["pretrain"] += [*MANIFEST, "--checkpoint", "checkpoints/tiny.pt"]
COMMANDS["evaluate"] += [*MANIFEST, "--backbone", "results/tiny/backbone.safetensors"]
STAGES = tuple(COMMANDS)


def write_project(
    folder: Path, root: Path, bare: Path, experiment: dict[str, Any], evaluations: dict[str, Any]
) -> None:
    """Write the tiny project with Snakefile and rules into `folder`."""
    shutil.copytree(bare, folder)
    shutil.copy(root / "Snakefile", folder)
    shutil.copytree(root / "workflow", folder / "workflow")
    configuration = {"experiments": {"tiny": experiment}, "evaluations": evaluations}
    (folder / "config.yaml").write_text(yaml.safe_dump(configuration))


@dataclass(frozen=True)
class Ended:
    """The exit status of a stage (negative: the number of the signal that ended it), its output and its duration."""

    status: int
    output: str
    seconds: float


class Stage:
    """A running stage."""

    def __init__(self, answers: IO[str], log: Path) -> None:
        self.process = int(answers.readline())
        self._answers, self._log, self._begin = answers, log, time.monotonic()

    def send(self, number: int, *, group: bool) -> None:
        """Send a signal to the process, or to its whole process group as a terminal does."""
        with suppress(ProcessLookupError):  # it has just ended or does not lead its group yet
            (os.killpg if group else os.kill)(self.process, number)

    def wait(self) -> Ended:
        """Wait until the stage ends."""
        status = os.waitstatus_to_exitcode(int(self._answers.readline()))
        return Ended(status, self._log.read_text(errors="replace"), time.monotonic() - self._begin)


class Warm:
    """Starts stages by forking `warm.py`, in a separate mount namespace where the machine allows one."""

    def __init__(self, scratch: Path) -> None:
        self.has_namespace = shutil.which(NAMESPACE[0]) is not None and subprocess.call([*NAMESPACE, "true"]) == 0
        environment = {**os.environ, "SSL_TRACKING": "off"}
        command = [*(NAMESPACE if self.has_namespace else ()), sys.executable, str(WARM)]
        self.log = scratch / "log.txt"
        self.server = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment, cwd=scratch
        )
        assert self.server.stdin is not None
        assert self.server.stdout is not None
        self._commands, self._answers = self.server.stdin, self.server.stdout
        self.process = int(self._answers.readline())

    def start(self, folder: Path, stage: str, *, more: Sequence[str] = ()) -> Stage:
        """Start a stage in the project `folder` with `more` arguments."""
        arguments = [stage, *COMMANDS[stage], *more]
        self._send({"arguments": arguments, "folder": str(folder), "log": str(self.log)})
        return Stage(self._answers, self.log)

    def run(self, folder: Path, stage: str, *, more: Sequence[str] = ()) -> Ended:
        """Run a stage undisturbed."""
        return self.start(folder, stage, more=more).wait()

    def mount(self, folder: Path, size: str) -> Path:
        """Mount a small empty disk on `folder`; return its path outside the namespace."""
        folder.mkdir(parents=True, exist_ok=True)
        self._send({"mount": ["-t", "tmpfs", "-o", f"size={size}", "none", str(folder)]})
        assert int(self._answers.readline()) == 0
        return Path(f"/proc/{self.process}/root{folder}")

    def close(self) -> None:
        """Stop the server."""
        self._commands.close()
        self.server.wait(timeout=300)
        self._answers.close()

    def _send(self, command: dict[str, Any]) -> None:
        self._commands.write(json.dumps(command) + "\n")
        self._commands.flush()


@pytest.fixture(scope="module")
def warm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Warm]:
    """A server that starts stages without the time for their imports."""
    server = Warm(tmp_path_factory.mktemp("warm"))
    yield server
    server.close()


@pytest.fixture(scope="session")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project with a card and its images, before any stage."""
    folder = tmp_path_factory.mktemp("bare")
    generator = np.random.default_rng(0)
    for split in SPLITS:
        for label, name in enumerate(CLASSES):
            place = folder / "images" / split / name
            place.mkdir(parents=True)
            for number in range(IMAGES):
                pixels = generator.integers(0, 128, (16, 16, 3), dtype=np.uint8) + np.uint8(100 * label)
                Image.fromarray(pixels).save(place / f"{number}.png")
    splits = {split: {"folder": split} for split in SPLITS}
    source = {"type": "image_folder", "path": "images", "splits": splits}
    (folder / "datasets").mkdir()
    card = {"name": "tiny", "image_size": 16, "source": source}
    (folder / "datasets" / "tiny.yaml").write_text(yaml.safe_dump(card))
    return folder


@dataclass(frozen=True)
class Undisturbed:
    """A project before and after each stage, and the duration of the stage."""

    before: dict[str, Path]
    after: dict[str, Path]
    seconds: dict[str, float]


@pytest.fixture(scope="module")
def undisturbed(warm: Warm, bare: Path, tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    """The project before and after each stage when nothing goes wrong."""
    folder, before, after, seconds = bare, {}, {}, {}
    for stage in STAGES:
        before[stage] = folder
        folder = after[stage] = tmp_path_factory.mktemp("undisturbed") / "project"
        shutil.copytree(before[stage], folder)
        ended = warm.run(folder, stage)
        assert ended.status == 0, ended.output
        seconds[stage] = ended.seconds
    return Undisturbed(before, after, seconds)


def contents(folder: Path) -> dict[str, bytes]:
    """Return all files written by the stages of a project by path, without the times in them."""
    files: dict[str, bytes] = {}
    for part in ("shards", "results", "checkpoints"):
        for path in sorted((folder / part).rglob("*")):
            if path.is_file() and path.name != ".state.jsonl":  # it lists shards in the order they were finished
                files[str(path.relative_to(folder))] = _timeless(path)
    return files


def final(folder: Path) -> dict[str, bytes]:
    """Return the files under their final names, which must be complete."""
    return {
        name: content
        for name, content in contents(folder).items()
        if not name.startswith("checkpoints") and not name.rpartition("/")[2].startswith(".")
    }


def _timeless(path: Path) -> bytes:
    if path.name != "pretrain.json":
        return path.read_bytes()
    report = json.loads(path.read_text())
    report.pop("cost")
    return json.dumps(report).encode()
