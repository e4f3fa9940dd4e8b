"""`ssl-core compare` prints reported numbers beside measured ones."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ssl_core.look import compare

CONFIG: dict[str, Any] = {
    "experiments": {"one": {}, "many": {"seeds": [0, 1, 2]}},
    "reported": {
        "one": {"source": "Table 1", "results": {"linear": 90.8, "knn": 80}},
        "many": {"source": "Table 2", "results": {"linear": 85.0}},
        "many-seed1": {"source": "Table 3", "results": {"linear": 85.0}},
    },
}


def measure(folder: Path, experiment: str, top1: float) -> None:
    path = folder / experiment / "linear.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    result = {"experiment": experiment, "evaluation": "linear", "protocol": "linear/v1", "dataset": "demo"}
    path.write_text(json.dumps({**result, "metrics": {"top1": top1, "top5": 99.0}}))


def lines(text: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.split("  ") if cell.strip()] for line in text.splitlines()]


def test_measured_numbers_are_beside_reported_ones_and_missing_ones_are_not_run(tmp_path: Path) -> None:
    measure(tmp_path, "one", 87.24)
    for seed, top1 in enumerate((85.0, 86.0, 88.0)):
        measure(tmp_path, f"many-seed{seed}", top1)
    header, *rows = lines(compare.run(CONFIG, tmp_path))
    deviation = np.std([85.0, 86.0, 88.0], ddof=1)
    assert header == ["experiment", "evaluation", "reported", "measured", "difference", "protocol", "source"]
    assert rows == [
        ["one", "linear", "90.8", "87.2", "-3.6", "linear/v1 top1", "Table 1"],
        ["one", "knn", "80.0", "not run", "Table 1"],
        ["many", "linear", "85.0", f"86.3 ± {deviation:.1f} (3)", "+1.3", "linear/v1 top1", "Table 2"],
        ["many-seed1", "linear", "85.0", "86.0", "+1.0", "linear/v1 top1", "Table 3"],
    ]


def test_a_number_may_belong_to_any_metric(tmp_path: Path) -> None:
    measure(tmp_path, "one", 87.24)
    claims = {"one": {"source": "Table 1", "results": {"linear.top5": 98.5}}}
    config = {**CONFIG, "evaluations": {"linear": {}}, "reported": claims}
    assert lines(compare.run(config, tmp_path))[1] == [
        "one", "linear.top5", "98.5", "99.0", "+0.5", "linear/v1 top5", "Table 1",
    ]  # fmt: skip


def test_missing_seeds_are_counted(tmp_path: Path) -> None:
    measure(tmp_path, "many-seed0", 85.0)
    assert lines(compare.run(CONFIG, tmp_path))[3][3] == "85.0 (1 of 3)"
    measure(tmp_path, "many-seed2", 86.0)
    assert lines(compare.run(CONFIG, tmp_path))[3][3] == "85.5 ± 0.7 (2 of 3)"


def test_a_configuration_without_reported_numbers_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nothing to compare: add published numbers in the section `reported`"):
        compare.run({"experiments": {"one": {}}}, tmp_path)
