"""A copy of the project to run Snakemake in, with a stub of `ssl-core` that only writes the outputs of a stage."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.experiments.conftest import changed
from tests.warm_snakemake import run_snakemake

# Writes the outputs of each stage; the same arguments give the same content.
STUB = """#!/bin/sh
printf '%s\\n' "$*" >> calls.txt
stage=$1
while [ $# -gt 0 ]; do [ "$1" = --output ] && output=$2; shift; done
case $stage in
shard) mkdir -p "$output"; echo '{}' > "$output/manifest.json" ;;
pretrain) for file in backbone.safetensors model.safetensors pretrain.json history.csv; do
    mkdir -p "$output"; echo "$output" > "$output/$file"; done ;;
bags) mkdir -p "${output%/*}"; echo "$output" > "$output" ;;
sample-views) mkdir -p "${output%/*}"; echo > "$output" ;;
adopt) mkdir -p "${output%/*}"; echo "$output" > "$output" ;;
evaluate) mkdir -p "${output%.json}"; echo '{}' > "$output"; echo > "${output%.json}/pictures.npz" ;;
detect) mkdir -p "${output%.json}"; echo '{}' > "$output"; echo > "${output%.json}/detections.png" ;;
finetune) mkdir -p "${output%.json}"; echo '{}' > "$output"
    for file in backbone.safetensors classifier.safetensors cost.json; do echo > "${output%.json}/$file"; done ;;
cost|quantised|should-i-pretrain) echo '{}' > "$output" ;;
draw) for name in tsne triangles neighbours confusion spectrum; do
    echo > "$output/$name.png"; echo > "$output/$name.svg"; done ;;
export) mkdir -p "$output"; for file in backbone.safetensors backbone.onnx config.json README.md; do
    echo "$output" > "$output/$file"; done ;;
quantise|export-device|quantise-device|export-classifier) echo "$output" > "$output" ;;
curves) echo > "$output"; echo > "${output%.png}.svg" ;;
table) echo > "$output"; echo > "${output%.csv}.html" ;;
esac
"""

CARD = {
    "name": "tiny",
    "image_size": 16,
    "source": {"type": "image_folder", "path": "images", "splits": {"train": {}, "test": {}}},
}

CONFIG: dict[str, Any] = {
    "experiments": {
        "first": {
            "dataset": {"name": "tiny"},
            "backbone": {"name": "resnet18", "stem": "tiny"},
            "method": {"name": "ressl", "queue_size": 16},
        },
        "second": {
            "dataset": {"name": "tiny"},
            "backbone": {"name": "resnet18", "stem": "tiny"},
            "method": {"name": "other"},
        },
    },
    "evaluations": {"linear": {"protocol": "linear"}, "knn": {"protocol": "knn"}},
    "sweeps": {"heat": {"base": "first", "grid": {"method.student_temperature": [0.1, 0.2]}}},
}


class Project:
    """A copy of the project in a folder of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @property
    def config(self) -> dict[str, Any]:
        """The content of config.yaml."""
        return yaml.safe_load((self.folder / "config.yaml").read_text())

    def configure(self, config: dict[str, Any]) -> None:
        """Write `config.yaml`."""
        (self.folder / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))

    def change(self, path: str, value: Any) -> None:
        """Set one value of `config.yaml`."""
        self.configure(changed(path, value, self.config))

    def snakemake(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run Snakemake on the copy, with the package of the copy."""
        environment = _environment(self.folder) | {"PYTHONPATH": str(self.folder)}
        return run_snakemake(self.folder, "--cores", "2", "--nocolor", *arguments, environment=environment)

    def pending(self, *arguments: str) -> set[str]:
        """Return the first output of each job that would run; empty for "Nothing to be done"."""
        run = self.snakemake("-n", *arguments)
        assert run.returncode == 0, run.stdout + run.stderr
        outputs = re.findall(r"^ {4}output: ([^,\n]+)", run.stdout + run.stderr, flags=re.MULTILINE)
        assert bool(outputs) != ("Nothing to be done" in run.stdout + run.stderr), run.stdout + run.stderr
        return set(outputs)

    def calls(self) -> list[str]:
        """Return the arguments of every command that the rules ran."""
        return (self.folder / "calls.txt").read_text().splitlines()


def make_project(root: Path, folder: Path) -> Project:
    """Copy the project, with a stub for its stages, a second method beside ReSSL and a small data set."""
    shutil.copy(root / "Snakefile", folder)
    for name in ("workflow", "ssl_core"):
        shutil.copytree(root / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "ssl_core" / "methods" / "other.py").write_text("from ssl_core.methods.base import Method\n")
    schema_file = folder / "workflow" / "schemas" / "config.schema.json"
    schema = json.loads(schema_file.read_text())
    schema["$defs"]["experiment"]["properties"]["method"]["properties"]["name"]["enum"].append("other")
    schema_file.write_text(json.dumps(schema))
    (folder / "datasets").mkdir()
    (folder / "datasets" / "tiny.yaml").write_text(yaml.safe_dump(CARD))
    (folder / "bin").mkdir()
    (folder / "bin" / "ssl-core").write_text(STUB)
    (folder / "bin" / "ssl-core").chmod(0o755)
    project = Project(folder)
    project.configure(CONFIG)
    return project


@pytest.fixture(scope="session")
def template(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Project:
    """The project before any run."""
    return make_project(root, tmp_path_factory.mktemp("project"))


@pytest.fixture(scope="session")
def finished(template: Project, tmp_path_factory: pytest.TempPathFactory) -> Project:
    """The project after a complete run."""
    folder = tmp_path_factory.mktemp("finished") / "project"
    shutil.copytree(template.folder, folder)
    project = Project(folder)
    run = project.snakemake()
    assert run.returncode == 0, run.stdout + run.stderr
    return project


def copy_of(project: Project, folder: Path) -> Project:
    """Copy a project with the modification times of its files."""
    shutil.copytree(project.folder, folder)
    return Project(folder)


@pytest.fixture
def fresh(template: Project, tmp_path: Path) -> Project:
    """A copy of the project before any run."""
    return copy_of(template, tmp_path / "project")


@pytest.fixture
def done(finished: Project, tmp_path: Path) -> Project:
    """A copy of the project after a complete run."""
    return copy_of(finished, tmp_path / "project")


def start(folder: Path, *arguments: str) -> "subprocess.Popen[str]":
    """Start Snakemake in a folder, in a new process group."""
    return subprocess.Popen(
        ["snakemake", "--cores", "1", "--nocolor", *arguments],
        cwd=folder,
        env=_environment(folder),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def finish(folder: Path, *arguments: str) -> str:
    """Run Snakemake in a folder to a successful end and return its output."""
    run = run_snakemake(folder, "--cores", "1", "--nocolor", *arguments, environment=_environment(folder))
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout + run.stderr


def _environment(folder: Path) -> dict[str, str]:
    """Return the environment in which programs in bin/ of the folder come first."""
    path = os.pathsep.join([str(folder / "bin"), str(Path(sys.executable).parent), os.environ["PATH"]])
    return {**os.environ, "PATH": path}
