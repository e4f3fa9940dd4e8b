"""The table has the numbers of the evaluations, each under its own protocol."""

import base64
import csv
import io
import json
import re
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.text import Text
from PIL import Image

from ssl_core.report.cost_picture import draw_costs
from ssl_core.report.page import deviation_text
from ssl_core.report.results import Priced, Summary, collect, latencies, priced
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


def tabulate(folder: Path, *results: dict[str, Any], **options: Any) -> tuple[str, str]:
    """Run the stage on these results; return the text of the CSV file and of the page."""
    table.run(write(folder, *results), folder / "table.csv", **options)
    return (folder / "table.csv").read_text(), (folder / "table.html").read_text()


def test_csv_is_wide_with_both_baselines(tmp_path: Path) -> None:
    text, _ = tabulate(tmp_path, result("b", "linear", 89.916), result("a", "linear", 70.0), result("a", "knn", 86.5))
    assert text == (
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


def test_another_protocol_never_shares_the_column_of_linear(tmp_path: Path) -> None:
    cached = result("b", "linear", 91.0, protocol="linear_features/v1")
    first, second = read(tabulate(tmp_path, result("a", "linear", 89.0), cached)[0])
    assert (first["linear/v1 top1"], second["linear/v1 top1"]) == ("89.0", "")
    assert second["linear (linear_features/v1) top1"] == "91.0"


def test_another_data_set_is_another_row(tmp_path: Path) -> None:
    subset = {"name": "cifar10", "subset": {"images": 1000, "seed": 3}}
    text, _ = tabulate(tmp_path, result("a", "knn", 1.0), result("a", "knn", 2.0, dataset=subset))
    assert [row["experiment"] for row in read(text)] == ["a", "a"]


def test_a_sweep_has_its_values_as_columns_in_numeric_order(tmp_path: Path) -> None:
    grid = {"t/0.1": {"method.temperature": 0.1}, "t/0.02": {"method.temperature": 0.02}}
    text, _ = tabulate(tmp_path, result("t/0.1", "knn", 3.0), result("t/0.02", "knn", 4.0), grid=grid)
    rows = [line.split(",")[:4] for line in text.splitlines()]
    assert rows[0] == ["experiment", "dataset", "method.temperature", "knn/v1 top1"]
    assert [row[2:] for row in rows[1:]] == [["0.02", "4.0"], ["0.1", "3.0"]]


def test_the_page_loads_nothing_from_anywhere(tmp_path: Path) -> None:
    _, page = tabulate(tmp_path, result("a", "linear", 89.9))
    assert not re.search(r"https?:|src=|@import|url\(|<link", page)
    assert "<!--" not in page


def test_the_page_shows_numbers_gain_and_provenance_and_escapes_names(tmp_path: Path) -> None:
    _, page = tabulate(tmp_path, result("<a>", "linear", 89.9))
    for text in (">89.9<", ">+29.5<", ">60.4<", ">85.3<", "1437", "spec aaaaaaaaaaaa", "&lt;a&gt;"):
        assert text in page
    assert "<a>" not in page


def test_a_baseline_that_only_others_have_is_empty(tmp_path: Path) -> None:
    text, _ = tabulate(tmp_path, result("a", "knn", 1.0, baselines={}), result("b", "knn", 2.0))
    assert text.splitlines()[1:] == ["a,demo,1.0,99.0,,", "b,demo,2.0,99.0,60.4,85.28"]


def test_a_protocol_may_measure_something_in_place_of_top1(tmp_path: Path) -> None:
    numbers = {
        "metrics": {"best_nn_top1": 70.0, "by_k": {"5": 1.0}},
        "baselines": {"untrained": {"best_nn_top1": 50.0}},
    }
    text, page = tabulate(tmp_path, result("a", "knn", 0.0, **numbers))
    assert text == "experiment,dataset,knn/v1 best_nn_top1,knn/v1 untrained best_nn_top1\na,demo,70.0,50.0\n"
    assert ">+20.0<" in page


def test_a_file_that_is_not_an_evaluation_is_named(tmp_path: Path) -> None:
    (tmp_path / "bad.json").write_text('{"experiment": "a"}')
    with pytest.raises(ValueError, match=r"bad\.json is not an evaluation: it lacks evaluation, protocol"):
        table.run([tmp_path / "bad.json"], tmp_path / "table.csv")


def test_two_results_for_one_place_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"1\.json: a second knn/v1 of a on demo"):
        tabulate(tmp_path, result("a", "knn", 1.0), result("a", "knn", 2.0))


RUNS = {"a-seed0": (80.0, 50.0), "a-seed7": (86.1, 53.4), "a-seed3": (83.3, 49.9)}  # pre-trained, untrained
SEEDS = {"a": {"a-seed0": 0, "a-seed7": 7, "a-seed3": 3}}
COST: dict[str, Any] = {"headline": "images_per_second", "metrics": {"images_per_second": 12345.6, "ms": 0.081}}


def runs(**changes: Any) -> list[dict[str, Any]]:
    """One result per seed."""
    pixels = {"pixels": {"top1": 70.0}}
    return [
        result(name, "knn", top1, baselines={"untrained": {"top1": untrained}, **pixels}, **changes)
        for name, (top1, untrained) in RUNS.items()
    ]


def read(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(text.splitlines()))


def cells(page: str, row: int = 0) -> list[str]:
    """Return the texts of one row of the page's table, tags left out."""
    body = page.split("<tbody>")[1].split("</tbody>")[0].strip().splitlines()[row]
    return [re.sub(r"<[^>]+>", "", cell) for cell in re.findall(r"<t[dh][^>]*>(.*?)</t[dh]>", body)]


def test_seeds_are_one_row_of_mean_and_sample_deviation_and_one_row_each_in_the_csv(tmp_path: Path) -> None:
    text, _ = tabulate(tmp_path, *runs(), seeds=SEEDS)
    whole, *each = read(text)
    top1, untrained = np.array(list(RUNS.values())).T
    assert (whole["experiment"], whole["seeds"]) == ("a", "0 7 3")
    assert float(whole["knn/v1 top1"]) == pytest.approx(np.mean(top1), abs=5e-3)
    assert float(whole["knn/v1 top1 sd"]) == pytest.approx(np.std(top1, ddof=1), abs=5e-3)
    assert float(whole["knn/v1 untrained top1"]) == pytest.approx(np.mean(untrained), abs=5e-3)
    assert float(whole["knn/v1 untrained top1 sd"]) == pytest.approx(np.std(untrained, ddof=1), abs=5e-3)
    assert float(whole["knn/v1 pixels top1 sd"]) == 0
    assert [(row["experiment"], row["seeds"]) for row in each] == [("a-seed0", "0"), ("a-seed7", "7"), ("a-seed3", "3")]
    assert [float(row["knn/v1 top1"]) for row in each] == list(top1)
    assert [row["knn/v1 top1 sd"] for row in each] == ["", "", ""]


def test_the_page_shows_seeds_as_one_row_and_their_gain_in_pairs(tmp_path: Path) -> None:
    _, page = tabulate(tmp_path, *runs(), seeds=SEEDS)
    top1, untrained = np.array(list(RUNS.values())).T
    expected = f"{np.mean(top1):.1f} ± {np.std(top1, ddof=1):.1f} (3)"
    gain = f"{np.mean(top1 - untrained):+.1f} ± {np.std(top1 - untrained, ddof=1):.1f}"
    assert cells(page) == ["a", expected, gain, f"{np.mean(untrained):.1f}", "70.0"]
    for name, (own, _) in RUNS.items():  # in the small print
        assert f"<td>{name}</td><td>knn/v1</td><td>{own}</td>" in page


def test_a_deviation_has_as_many_digits_as_its_mean() -> None:
    assert deviation_text(Summary(41.6, 0.093, 3)) == "0.1"
    assert deviation_text(Summary(0.012, 0.0034, 3)) == "0.0034"


def test_an_experiment_without_seeds_keeps_its_plain_numbers_beside_others(tmp_path: Path) -> None:
    text, page = tabulate(tmp_path, *runs(), result("b", "knn", 90.0), seeds=SEEDS)
    last = read(text)[-1]
    assert (last["experiment"], last["seeds"], last["knn/v1 top1"], last["knn/v1 top1 sd"]) == ("b", "", "90.0", "")
    assert cells(page, 1)[:3] == ["b", "90.0", "+29.6"]


def test_one_seed_has_no_deviation(tmp_path: Path) -> None:
    text, page = tabulate(tmp_path, runs()[0], seeds={"a": {"a-seed0": 0}})
    assert (cells(page)[1], read(text)[0]["knn/v1 top1 sd"]) == ("80.0", "")


def test_a_sweep_of_an_experiment_with_seeds_has_one_row_per_point(tmp_path: Path) -> None:
    seeds = {f"t-{value}": {f"t-{value}-seed{seed}": seed for seed in (0, 1)} for value in (1, 2)}
    results = [result(name, "knn", 50.0) for point in seeds.values() for name in point]
    text, _ = tabulate(tmp_path, *results, grid={"t-1": {"x": 1}, "t-2": {"x": 2}}, seeds=seeds)
    rows = [(row["experiment"], row["seeds"], row["x"]) for row in read(text)]
    assert rows[:3] == [("t-1", "0 1", "1"), ("t-1-seed0", "0", "1"), ("t-1-seed1", "1", "1")]
    assert [row[0] for row in rows[3:]] == ["t-2", "t-2-seed0", "t-2-seed1"]


def test_a_reported_number_is_beside_the_measured_one_with_its_source(tmp_path: Path) -> None:
    claim = {"source": "ReSSL, <Table 2>", "epochs": 200, "hardware": "8 GPUs", "results": {"knn": 90.8}}
    others = (result("b", "knn", 1.0), result("a-seed0", "linear", 2.0))
    text, page = tabulate(tmp_path, *runs(), *others, seeds=SEEDS, reported={"a": claim})
    rows = {row["experiment"]: row for row in read(text)}
    assert (rows["a"]["knn/v1 reported top1"], rows["a"]["source"]) == ("90.8", "ReSSL, <Table 2>")
    assert (rows["b"]["knn/v1 reported top1"], rows["b"]["source"]) == ("", "")
    assert "linear/v1 reported top1" not in rows["a"]
    assert "90.8−7.7" in cells(page)  # measured 83.13
    assert "<td>a</td><td>ReSSL, &lt;Table 2&gt;</td><td>200</td><td>8 GPUs</td>" in page
    assert "Table 2>" not in page


def test_costs_with_different_headlines_have_separate_columns(tmp_path: Path) -> None:
    trained = result("a", "cost", 0.0, baselines={}, **COST)
    adopted = result("b", "cost", 0.0, baselines={}, headline="ms", metrics={"ms": 0.25})
    _, page = tabulate(tmp_path, trained, adopted)
    assert re.findall(r'<button type="button">([^<]*)', page) == ["experiment", "images per second", "ms"]
    assert [cells(page, row)[1:] for row in (0, 1)] == [["12,346", "0.081"], ["–", "0.2"]]


def test_a_cost_has_neither_bar_nor_gain(tmp_path: Path) -> None:
    cost = result("a", "cost", 0.0, baselines={}, **COST)
    text, page = tabulate(tmp_path, cost, result("a", "knn", 83.0), result("b", "knn", 84.0))
    assert cells(page) == ["a", "83.0", "+22.6", "60.4", "85.3", "12,346"]
    assert cells(page, 1)[-1] == "–"
    assert '<th colspan="1" class="group">cost/v1</th>' in page
    assert ">images per second</button>" in page
    assert page.count('class="bar"') == 2
    first, second = read(text)
    assert (first["cost/v1 images_per_second"], first["cost/v1 ms"], second["cost/v1 ms"]) == ("12345.6", "0.081", "")
    assert "cost/v1 untrained images_per_second" not in first


def test_settings_are_columns_and_pictures_are_beside_the_first_row_of_an_experiment(tmp_path: Path) -> None:
    resolved = {"method": {"name": "byol"}, "backbone": {"name": "resnet18"}, "training": {"epochs": 30}}
    settings, picture = tmp_path / "a" / "pretrain.json", tmp_path / "a" / "views.png"
    settings.parent.mkdir()
    settings.write_text(json.dumps({"experiment": "a", "resolved": resolved}))
    Image.new("RGB", (2000, 100)).save(picture)
    results = (
        result("a", "knn", 83.0),
        result("a", "linear", 84.0),
        result("a", "logistic", 84.0),
        result("b", "knn", 1.0),
    )
    text, page = tabulate(tmp_path, *results, settings=[settings], pictures=[picture])
    first, second = read(text)
    assert (first["method"], first["backbone"], first["epochs"]) == ("byol", "resnet18", "30")
    assert (second["method"], second["epochs"]) == ("", "")
    assert re.findall("<h2>(.*?)</h2>", page) == ["demo"]
    assert cells(page)[:5] == ["a", "byol", "resnet18", "30", "knn/v1"]
    assert cells(page, 1)[:5] == ["b", "–", "–", "–", "knn/v1"]
    (webp,) = re.findall(r'title="a: views" src="data:image/webp;base64,([^"]+)"', page)
    assert Image.open(io.BytesIO(base64.b64decode(webp))).size == (1000, 50)


def test_each_data_set_has_a_table_and_many_evaluations_are_below_each_other(tmp_path: Path) -> None:
    names = ["linear", "knn", "low_shot", "logistic"]
    many = [result(name, evaluation, 80.0) for name in "ab" for evaluation in names]
    elsewhere = result("a", "moved", 50.0, protocol="knn/v1", dataset="cifar10")
    cost = result("a", "cost", 0.0, baselines={}, **COST)
    _, page = tabulate(tmp_path, *many, elsewhere, cost)
    assert cells(page) == ["a", "50.0", "−10.4", "60.4", "85.3"]
    page = page.split("</table>", 1)[1]
    rows = [cells(page, number) for number in range(9)]
    assert rows[0] == ["a", "knn/v1", "top 1", "80.0", "+19.6", "60.4", "85.3"]
    assert [row[0] + row[1] for row in rows[:4]] == ["aknn/v1", "bknn/v1", "alinear/v1", "blinear/v1"]
    assert rows[8] == ["a", "cost/v1", "images per second", "12,346", "–", "–", "–"]


def test_accuracy_over_the_time_of_pretraining_is_drawn_where_two_experiments_were_timed(tmp_path: Path) -> None:
    def timed(name: str, seconds: float) -> dict[str, Any]:
        return result(name, "cost", 0.0, baselines={}, headline="seconds", metrics={"seconds": seconds})

    accuracies = [result(name, "knn", top1) for name, top1 in (("a", 83.0), ("b", 84.0), ("c", 85.0))]
    for times, count in ([], 0), ([timed("a", 60)], 0), ([timed("a", 60), timed("b", 90)], 1):
        assert tabulate(tmp_path, *accuracies, *times)[1].count("<img ") == count
    rows = collect([(Path(), each) for each in (*accuracies, *times)], grid={}, seeds={}, reported={})
    assert priced(rows) == {
        "knn/v1": [
            Priced("a", Summary(60, None, 1), Summary(83.0, None, 1)),
            Priced("b", Summary(90, None, 1), Summary(84.0, None, 1)),
        ]
    }


def test_names_in_the_picture_of_costs_never_overlap() -> None:
    results = [result(f"experiment_{index}", "knn", 80 + 0.01 * index) for index in range(12)]
    rows = collect([(Path(), each) for each in results], grid={}, seeds={}, reported={})
    points = [
        Priced(row.experiment, Summary(100, 5, 3), Summary(80 + 0.01 * index, 1, 3)) for index, row in enumerate(rows)
    ]
    figure = draw_costs(rows, {"knn/v1": points}, title="crowded")
    renderer = FigureCanvasAgg(figure).get_renderer()
    figure.draw(renderer)
    names = [text for text in figure.axes[0].texts if text.get_text().startswith("experiment")]
    boxes = [Text.get_window_extent(name, renderer) for name in names]  # without their lines to the points
    assert len(boxes) == 12
    assert not any(one.overlaps(other) for one, other in combinations(boxes, 2))


def test_8_bit_networks_are_beside_float32_in_the_table_and_in_a_picture_over_the_latency(tmp_path: Path) -> None:
    float32 = {"top1": 84.0, "latency_ms": 2.5}
    int8 = {"top1": 83.0, "latency_ms": 1.25}
    small = result("a", "quantised", 0.0, metrics=int8, baselines={"float32": float32})
    text, page = tabulate(tmp_path, small, result("a", "knn", 84.0))
    assert cells(page) == ["a", "84.0", "+23.6", "60.4", "85.3", "83.0", "84.0"]
    assert read(text)[0]["quantised/v1 float32 top1"] == "84.0"
    assert page.count("<img ") == 1
    rows = collect([(Path(), small)], grid={}, seeds={}, reported={})
    assert latencies(rows) == {
        "quantised/v1": [
            Priced("a int8", Summary(1.25, None, 1), Summary(83.0, None, 1)),
            Priced("a float32", Summary(2.5, None, 1), Summary(84.0, None, 1)),
        ]
    }
