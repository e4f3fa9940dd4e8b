"""A tiny project, its stages as processes that can be killed within milliseconds, and what an undisturbed run wrote."""

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
NAMESPACE = ("unshare", "--user", "--map-root-user", "--mount")  # in which an ordinary user may mount a small disk

IMAGES = 24  # a class in each of the SPLITS
CLASSES = ("circle", "square")
SPLITS = ("train", "test", "extra_a", "extra_b", "extra_c", "extra_d")  # each is a shard at least
SPEC = {
    "dataset": {"name": "tiny"},
    "backbone": {"name": "mobilenet_v3_small", "stem": "small"},
    "method": {"name": "ressl", "queue_size": 32, "projector_hidden": 32, "embedding_dim": 16, "warmup": 0.5},
    # A checkpoint at every look, which is every third step.
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


@dataclass(frozen=True)
class Ended:
    """How a stage ended: its exit status (negative: the signal that ended it), its output, and how long it took."""

    status: int
    output: str
    seconds: float


class Stage:
    """A stage that runs."""

    def __init__(self, answers: IO[str], log: Path) -> None:
        self.process = int(answers.readline())
        self._answers, self._log, self._begin = answers, log, time.monotonic()

    def send(self, number: int, *, group: bool) -> None:
        """Send a signal to the process, or to its whole group as a terminal does."""
        with suppress(ProcessLookupError):  # it has just ended, or is not yet at the head of its group
            (os.killpg if group else os.kill)(self.process, number)

    def wait(self) -> Ended:
        """Wait for the end."""
        status = os.waitstatus_to_exitcode(int(self._answers.readline()))
        return Ended(status, self._log.read_text(errors="replace"), time.monotonic() - self._begin)


class Warm:
    """Starts stages by forking `warm.py`; where the machine allows it, in a namespace with disks of its own."""

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
        self._say({"arguments": arguments, "folder": str(folder), "log": str(self.log)})
        return Stage(self._answers, self.log)

    def run(self, folder: Path, stage: str, *, more: Sequence[str] = ()) -> Ended:
        """Run a stage undisturbed."""
        return self.start(folder, stage, more=more).wait()

    def mount(self, folder: Path, size: str) -> Path:
        """Mount a small empty disk on `folder`; return where it can be seen from outside."""
        folder.mkdir(parents=True, exist_ok=True)
        self._say({"mount": ["-t", "tmpfs", "-o", f"size={size}", "none", str(folder)]})
        assert int(self._answers.readline()) == 0
        return Path(f"/proc/{self.process}/root{folder}")

    def close(self) -> None:
        """End the server."""
        self._commands.close()
        self.server.wait(timeout=300)
        self._answers.close()

    def _say(self, command: dict[str, Any]) -> None:
        self._commands.write(json.dumps(command) + "\n")
        self._commands.flush()


@pytest.fixture(scope="module")
def warm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Warm]:
    """Starts stages without their imports."""
    server = Warm(tmp_path_factory.mktemp("warm"))
    yield server
    server.close()


@pytest.fixture(scope="session")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project with a card and its images; nothing has run."""
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
    """A project before and after each stage, and how long the stage took."""

    before: dict[str, Path]
    after: dict[str, Path]
    seconds: dict[str, float]


@pytest.fixture(scope="module")
def undisturbed(warm: Warm, bare: Path, tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    """What the stages write when nothing goes wrong."""
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
    """Return all that a project's stages wrote by path, without what tells times."""
    files = {}
    for part in ("shards", "results", "checkpoints"):
        for path in sorted((folder / part).rglob("*")):
            if path.is_file() and path.name != ".state.jsonl":  # the order in which shards were finished
                files[str(path.relative_to(folder))] = _timeless(path)
    return files


def final(folder: Path) -> dict[str, bytes]:
    """Return what stands under its final name, and so must be whole."""
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
