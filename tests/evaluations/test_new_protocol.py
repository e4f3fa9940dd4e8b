"""A new protocol in one file passes the contract tests after `make schema` and with a section in the documentation."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

TOY = '''
"""The share of test images of the most frequent class."""

from typing import Literal

from ssl_core.data.shards import Manifest, read_labels
from ssl_core.evaluations.base import ImageConfig, Log, Outcome, Subjects, find_test_split


class Config(ImageConfig):
    """No settings."""

    protocol: Literal["majority"] = "majority"


def run(config: Config, subjects: Subjects, manifest: Manifest, log: Log) -> Outcome:
    split = find_test_split(config, manifest)
    labels = read_labels(manifest, split)
    share = 100 * max(map(labels.count, labels)) / len(labels)
    settings = config.settings(image_size=subjects.image_size, how="fixed by the configuration")
    metrics = {name: {"top1": share} for name in subjects.networks}
    return Outcome("majority/v1", split, metrics, settings, num_train=0, num_test=len(labels))
'''


@pytest.mark.long
def test_a_protocol_in_one_file_passes_the_contract(root: Path, tmp_path: Path) -> None:
    for name in ("ssl_core", "tests", "workflow", "docs", "datasets"):
        shutil.copytree(root / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(root / "pyproject.toml", tmp_path)
    (tmp_path / "ssl_core/evaluations/majority.py").write_text(TOY)
    with open(tmp_path / "docs/evaluations.md", "a") as page:
        page.write("\n## `majority`: the most frequent class\n")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}

    def call(*command: str) -> str:
        run = subprocess.run(
            [sys.executable, "-m", *command], cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        assert run.returncode == 0, run.stdout + run.stderr
        return run.stdout

    program = "import json; from ssl_core.look.schema_generation import generate; print(json.dumps(generate()))"
    schema = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    (tmp_path / "workflow/schemas/config.schema.json").write_text(schema.stdout)
    report = call("pytest", "-q", "-k", "majority", "tests/evaluations/test_every_protocol.py")
    assert "15 passed" in report
