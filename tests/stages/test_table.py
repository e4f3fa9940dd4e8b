"""The table says what the evaluations' JSON say, each number under its own protocol."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from ssl_core.stages import table


def result(experiment: str, evaluation: str, top1: float, **changes: Any) -> dict[str, Any]:
    return {
        "experiment": experiment,
        "evaluation": evaluation,
        "protocol": f"{evaluation}/v1",
        "dataset": "demo",
        "split": "test",
        "metrics": {"top5": 99.0, "top1": top1},
        "baselines": {"untrained": {"top1": 60.4}, "pixels": {"top1": 85.278}},
        "hyperparameters": {"learning_rate": 0.1, "chosen": "split of train"},
        "num_train": 1437,
        "num_test": 360,
        "seed": 0,
        "digests": {"spec": "a" * 64, "code": "b" * 64},
        "versions": {"torch": "2"},
        "hardware": "CPU",
    } | changes


def write(folder: Path, *results: dict[str, Any]) -> list[Path]:
    paths = [folder / f"{index}.json" for index in range(len(results))]
    for path, content in zip(paths, results, strict=True):
        path.write_text(json.dumps(content))
    return paths


def test_csv_is_wide_with_both_baselines(tmp_path: Path) -> None:
    paths = write(tmp_path, result("b", "linear", 89.916), result("a", "linear", 70.0), result("a", "knn", 86.5))
    table.run(paths, tmp_path / "table.csv")
    assert (tmp_path / "table.csv").read_text() == (
        "experiment,dataset,knn/v1 top1,knn/v1 top5,knn/v1 untrained top1,knn/v1 pixels top1,"
        "linear/v1 top1,linear/v1 top5,linear/v1 untrained top1,linear/v1 pixels top1\n"
        "a,demo,86.5,99.0,60.4,85.28,70.0,99.0,60.4,85.28\n"
        "b,demo,,,,,89.92,99.0,60.4,85.28\n"
    )


def test_the_order_of_the_files_changes_nothing(tmp_path: Path) -> None:
    paths = write(tmp_path, result("b", "linear", 1.0), result("a", "knn", 2.0), result("a", "linear", 3.0))
    table.run(paths, tmp_path / "one.csv")
    table.run(paths[::-1], tmp_path / "two.csv")
    assert (tmp_path / "one.csv").read_bytes() == (tmp_path / "two.csv").read_bytes()
    pages = [(tmp_path / f"{name}.html").read_text().replace(f">{name}<", "><") for name in ("one", "two")]
    assert pages[0] == pages[1]


def test_another_protocol_never_stands_in_the_column_of_linear(tmp_path: Path) -> None:
    cached = result("b", "linear", 91.0, protocol="linear_features/v1")
    table.run(write(tmp_path, result("a", "linear", 89.0), cached), tmp_path / "table.csv")
    header, first, second = (line.split(",") for line in (tmp_path / "table.csv").read_text().splitlines())
    assert dict(zip(header, first, strict=True))["linear/v1 top1"] == "89.0"
    assert dict(zip(header, second, strict=True))["linear/v1 top1"] == ""
    assert dict(zip(header, second, strict=True))["linear (linear_features/v1) top1"] == "91.0"


def test_another_data_set_is_another_row(tmp_path: Path) -> None:
    subset = {"name": "cifar10", "subset": {"images": 1000, "seed": 3}}
    table.run(write(tmp_path, result("a", "knn", 1.0), result("a", "knn", 2.0, dataset=subset)), tmp_path / "t.csv")
    rows = [line.split(",")[:3] for line in (tmp_path / "t.csv").read_text().replace("images, ", "").splitlines()[1:]]
    assert [row[0] for row in rows] == ["a", "a"]


def test_a_sweep_has_its_values_as_columns_in_numeric_order(tmp_path: Path) -> None:
    paths = write(tmp_path, result("t/0.1", "knn", 3.0), result("t/0.02", "knn", 4.0))
    grid = {"t/0.1": {"method.temperature": 0.1}, "t/0.02": {"method.temperature": 0.02}}
    table.run(paths, tmp_path / "t.csv", grid=grid)
    rows = [line.split(",")[:4] for line in (tmp_path / "t.csv").read_text().splitlines()]
    assert rows[0] == ["experiment", "dataset", "method.temperature", "knn/v1 top1"]
    assert [row[2:] for row in rows[1:]] == [["0.02", "4.0"], ["0.1", "3.0"]]


def test_the_page_loads_nothing_from_anywhere(tmp_path: Path) -> None:
    table.run(write(tmp_path, result("a", "linear", 89.9)), tmp_path / "table.csv")
    page = (tmp_path / "table.html").read_text()
    assert not re.search(r"https?:|src=|@import|url\(|<link", page)
    assert "<!--" not in page


def test_the_page_shows_numbers_gain_and_provenance_and_escapes_names(tmp_path: Path) -> None:
    table.run(write(tmp_path, result("<a>", "linear", 89.9)), tmp_path / "table.csv")
    page = (tmp_path / "table.html").read_text()
    for text in (">89.9<", ">+29.5<", ">60.4<", ">85.3<", "1437", "spec aaaaaaaaaaaa", "&lt;a&gt;"):
        assert text in page
    assert "<a>" not in page


def test_what_was_not_measured_is_empty(tmp_path: Path) -> None:
    table.run(write(tmp_path, result("a", "linear", 89.9, baselines={})), tmp_path / "table.csv")
    assert (tmp_path / "table.csv").read_text().splitlines()[1] == "a,demo,89.9,99.0,,"


def test_a_protocol_may_measure_something_in_place_of_top1(tmp_path: Path) -> None:
    numbers = {
        "metrics": {"best_nn_top1": 70.0, "by_k": {"5": 1.0}},
        "baselines": {"untrained": {"best_nn_top1": 50.0}},
    }
    table.run(write(tmp_path, result("a", "knn", 0.0, **numbers)), tmp_path / "table.csv")
    assert (tmp_path / "table.csv").read_text() == (
        "experiment,dataset,knn/v1 best_nn_top1,knn/v1 untrained best_nn_top1,knn/v1 pixels best_nn_top1\n"
        "a,demo,70.0,50.0,\n"
    )
    assert ">+20.0<" in (tmp_path / "table.html").read_text()


def test_a_file_that_is_no_evaluation_is_named(tmp_path: Path) -> None:
    (tmp_path / "bad.json").write_text('{"experiment": "a"}')
    with pytest.raises(ValueError, match=r"bad\.json is no evaluation: it lacks evaluation, protocol"):
        table.run([tmp_path / "bad.json"], tmp_path / "table.csv")


def test_two_results_for_one_place_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"1\.json: a second knn/v1 of a on demo"):
        table.run(write(tmp_path, result("a", "knn", 1.0), result("a", "knn", 2.0)), tmp_path / "table.csv")
