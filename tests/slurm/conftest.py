"""A cluster for all tests of this folder, and a project with a tiny training and its local results."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from ssl_core.experiments import user_folder
from tests.waiting import wait_until

from .cluster import Cluster, obstacle

CONFIG = {
    "experiments": {
        "tiny": {
            "dataset": {"name": "demo", "subset": {"images": 96}},
            "backbone": {"name": "mobilenet_v3_small", "stem": "small"},
            "method": {"name": "ressl", "queue_size": 32, "projector_hidden": 32, "embedding_dim": 16, "warmup": 0.5},
            # Saves a checkpoint with every row of the history, which is every sixth step of 48.
            "training": {
                "epochs": 8,
                "batch_size": 16,
                "warmup_epochs": 1,
                "checkpoint_minutes": 1e-6,
                "precision": "fp32",
            },
        }
    },
    "evaluations": {"knn": {"protocol": "knn", "k": 5}},
}
THREADS = ("--set-threads", "shard=1", "pretrain=1", "evaluate=1")
PROFILE = ("--workflow-profile", "workflow/profiles/slurm", "--slurm-init-seconds-before-status-checks", "8")
NO_GPU = ("pretrain:gpu=0", "evaluate:gpu=0")  # the nodes' GPUs are /dev/null and /dev/zero
TRAINED = "results/tiny/backbone.safetensors"
RESULT = "results/tiny/knn.json"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    reason = obstacle() if config.getoption("--slurm") else "SLURM: run `make test-slurm`"
    for item in items:
        if reason and item.get_closest_marker("slurm"):
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Two nodes with accounting."""
    cluster = Cluster(tmp_path_factory.mktemp("cluster"))
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.close()


@dataclass(frozen=True)
class Writer:
    """The process that trains, and its job."""

    process: int
    job: str


@dataclass(frozen=True)
class Project:
    """A user's folder."""

    folder: Path

    def untrained(self, folder: Path) -> "Project":
        """Return a copy with the shards only."""
        shutil.copytree(self.folder, folder)
        for name in ("results", "logs"):
            shutil.rmtree(folder / name)
        return Project(folder)

    def change_training(self, **settings: int) -> None:
        """Change settings of the training."""
        path = self.folder / "config.yaml"
        content = yaml.safe_load(path.read_text())
        content["experiments"]["tiny"]["training"] |= settings
        path.write_text(yaml.safe_dump(content))

    def damage_shards(self) -> None:
        """Make a mistake that only the stage notices."""
        for tar in (self.folder / "shards" / "demo").rglob("*.tar"):
            with open(tar, "ab") as file:
                file.write(b"x")

    def start(self, *arguments: str) -> "subprocess.Popen[str]":
        """Start Snakemake in the folder; its output goes to output.txt."""
        programs = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
        with open(self.folder / "output.txt", "w") as output:
            return subprocess.Popen(
                ["snakemake", "--nocolor", *arguments, *THREADS],
                cwd=self.folder,
                env={**os.environ, "PATH": programs},
                stdout=output,
                stderr=subprocess.STDOUT,
                text=True,
            )

    def submit(self, target: str, *arguments: str) -> "subprocess.Popen[str]":
        """Start Snakemake with the profile, without GPUs; `--set-resources` among `arguments` replaces that."""
        return self.start(target, *PROFILE, "--set-resources", *NO_GPU, *arguments)

    def finish(self, workflow: "subprocess.Popen[str]") -> tuple[int, str]:
        """Wait for the end of a workflow; return its status and output."""
        return workflow.wait(280), (self.folder / "output.txt").read_text()

    def pause_training(self) -> Writer:
        """Stop the training after its first checkpoint: it is slow without costing a processor."""
        wait_until((self.folder / "checkpoints" / "tiny.pt").exists, seconds=120)
        content = json.loads((self.folder / "checkpoints" / "tiny.lock").read_text())
        writer = Writer(int(content["process"].split(":")[1]), content["job"])
        os.kill(writer.process, signal.SIGSTOP)
        return writer

    def log(self) -> str:
        """Return the log of the training."""
        return (self.folder / "logs" / "pretrain" / "tiny.log").read_text()

    def weights(self) -> list[bytes]:
        """Return the backbone and the history."""
        return [
            (self.folder / "results" / "tiny" / name).read_bytes() for name in ("backbone.safetensors", "history.csv")
        ]


@pytest.fixture(scope="session")
def local(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """The project after a run on this host."""
    folder = tmp_path_factory.mktemp("projects") / "local"
    user_folder.create(folder)
    (folder / "config.yaml").write_text(yaml.safe_dump(CONFIG))
    project = Project(folder)
    status, output = project.finish(project.start("--cores", "1", RESULT))
    assert status == 0, output
    return project


@pytest.fixture
def project(local: Project, tmp_path: Path) -> Project:
    """The project with its shards, before the training."""
    return local.untrained(tmp_path / "project")
