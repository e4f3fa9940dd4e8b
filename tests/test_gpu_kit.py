"""The kit for a machine with a GPU runs on the CPU, and docs/gpu.md is the page of its numbers."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest


def run(root: Path, *command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *command], cwd=root, env=os.environ, capture_output=True, text=True)


@pytest.fixture
def page(root: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(root / "benchmarks")
    import gpu_page  # pyright: ignore[reportMissingImports]

    return gpu_page


def test_the_page_is_that_of_its_numbers(page: Any) -> None:
    numbers = json.loads(page.NUMBERS.read_text()) if page.NUMBERS.is_file() else None
    assert page.PAGE.read_text(encoding="utf-8") == page.page(numbers)


@pytest.mark.long
def test_the_tests_run_on_the_cpu(root: Path) -> None:
    finished = run(root, "-m", "pytest", "-q", "tests/gpu", "--device", "cpu", "--quick")
    assert finished.returncode == 0, finished.stdout
    assert " passed" in finished.stdout


@pytest.mark.long
def test_the_benchmark_runs_on_the_cpu(root: Path, page: Any, tmp_path: Path) -> None:
    output = tmp_path / "gpu.json"
    finished = run(root, "benchmarks/gpu.py", "--device", "cpu", "--quick", "--output", str(output))
    assert finished.returncode == 0, finished.stderr
    results = json.loads(output.read_text())
    rows = [*results["cifar10"], *results["training"], *results["operators"]]
    assert [row for row in rows if "error" in row] == []
    assert results["left_out"] == []
    assert all(row["name"] in page.page(results) for row in rows)
