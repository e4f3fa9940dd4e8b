"""Each figure of the papers' recipes is drawn from made-up results; tests/workflow/test_figures.py trains for them."""

import csv
import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.text import Text
from safetensors.numpy import save_file

from ssl_core.experiments import figures, sweeps
from ssl_core.methods.base import resolve
from ssl_core.stages import figure
from tests.test_recipes import PUBLISHED, laid_over

CLASSES = 10
SHOWN = [(path, name) for path in PUBLISHED for name in laid_over(path).get("figures", {})]


def write(results: Path, file: str, experiments: dict[str, Any]) -> None:
    """Write a made-up file of results."""
    path = results / file
    path.parent.mkdir(parents=True, exist_ok=True)
    experiment = file.split("/")[0]
    number = zlib.crc32(experiment.encode()) % 1000 / 1000  # in 0..1
    if path.name == "pretrain.json":
        resolved = resolve(experiments[experiment])
        images = resolved.dataset.subset.images if resolved.dataset.subset else 1_281_167
        content = {"resolved": resolved.model_dump(mode="json", serialize_as_any=True), "num_images": images}
        path.write_text(json.dumps({**content, "cost": {"seconds": 3600 + 9e4 * number}}))
    elif path.name == "history.csv":
        with open(path, "w", newline="") as opened:
            writer = csv.writer(opened)
            writer.writerow(["step", "epoch", "loss/total", "instance/top1"])
            writer.writerows([step, step / 10, 5, step * number] for step in range(1, 101))
    elif path.name == "backbone.safetensors":
        save_file({"a": np.zeros((10, 1 + int(9 * number))), "norm.running_mean": np.zeros(99)}, path)
    elif path.suffix == ".json":
        measured = {"intra_class_alignment": 0.9 + number, "alignment": number, "uniformity": -3 + number}
        measured["top1"] = 50 + 40 * number
        names = {"experiment": experiment, "evaluation": path.stem, "protocol": "linear/v1", "dataset": "demo"}
        path.write_text(json.dumps({**names, "metrics": measured, "headline": "top1"}))
    else:
        np.savez(path, **arrays(number))  # pyright: ignore[reportArgumentType]


def arrays(number: float) -> dict[str, Any]:
    """Return made-up arrays of the protocol `pictures`."""
    generator = np.random.default_rng(int(1000 * number))
    return {
        "classes": np.array([f"class {label}" for label in range(CLASSES)]),
        "labels": np.arange(100) % CLASSES,
        "pretrained.points": generator.normal(size=(100, 2)),
        "corner_labels": np.arange(20) % CLASSES,
        "pretrained.triangles": generator.normal(size=(20, 3, 2)),
        "pretrained.top1": np.array(50.0),
        "augmented.policies": np.array(["weak", "contrastive"] * 3),
        "augmented.images": generator.integers(0, 255, (6, 4, 4, 3), dtype=np.uint8),
        "augmented.labels": np.repeat(np.arange(3), 2),
        "augmented.neighbour_images": generator.integers(0, 255, (6, 10, 4, 4, 3), dtype=np.uint8),
        "augmented.neighbour_labels": np.arange(60).reshape(6, 10) % CLASSES,
    }


@pytest.mark.parametrize(("path", "name"), SHOWN, ids=[name for _, name in SHOWN])
def test_a_figure_of_a_paper_is_drawn_whole_with_all_its_series(path: Path, name: str, tmp_path: Path) -> None:
    configuration = laid_over(path)
    spec = configuration["figures"][name]
    section = figures.read(spec, name)
    for file in section.files():
        write(tmp_path, file, sweeps.experiments(configuration))
    drawn = figure.DRAWN[section.draw](section, tmp_path)
    canvas = FigureCanvasAgg(drawn)
    canvas.draw()
    inside = drawn.get_tightbbox(canvas.get_renderer())
    assert inside is not None
    assert min(inside.x0, inside.y0) >= -0.01
    assert inside.x1 <= drawn.get_figwidth() + 0.01
    assert inside.y1 <= drawn.get_figheight() + 0.01
    texts = " | ".join(" ".join(text.get_text().split()) for text in drawn.findobj(Text) if isinstance(text, Text))
    assert section.title in texts
    for label in dict(section).get("series", ["weak", "contrastive"]):
        assert label[:19] in texts


LINES = {
    "draw": "lines", "title": "T", "evaluation": "knn", "series": {"A": ["b", "a"], "B": ["a"]}, "x": "resolved.size.1",
    "x_label": "size",
}  # fmt: skip


def results(folder: Path) -> Path:
    for name, size, score in (("a", 3, 70.0), ("b", 1, 60.0)):
        (folder / name).mkdir()
        (folder / name / "pretrain.json").write_text(json.dumps({"resolved": {"size": [0, size]}}))
        names = {"experiment": name, "evaluation": "knn", "protocol": "knn/v1", "dataset": "demo"}
        (folder / name / "knn.json").write_text(json.dumps({**names, "metrics": {"top1": score, "top5": 99}}))
    return folder


def test_a_line_joins_the_metric_of_its_experiments_from_small_to_large_settings(tmp_path: Path) -> None:
    folder = results(tmp_path)
    (axes,) = figure.DRAWN["lines"](figures.read(LINES, "f"), folder).axes
    first, second = axes.lines
    np.testing.assert_array_equal(first.get_xydata(), [[1, 60], [3, 70]])
    np.testing.assert_array_equal(second.get_xydata(), [[3, 70]])
    assert axes.get_ylabel() == "knn/v1 top1, %"


SEEDS = {"draw": "seeds", "title": "T", "measures": ["knn"], "series": {"A": ["a0", "a1"], "B": ["b0", "b1"]}}


def test_settings_show_each_seed_and_the_paired_difference_from_the_first(tmp_path: Path) -> None:
    for name, score in {"a0": 60.0, "a1": 70.0, "b0": 61.0, "b1": 72.0}.items():
        (tmp_path / name).mkdir()
        names = {"experiment": name, "evaluation": "knn", "protocol": "knn/v1", "dataset": "demo"}
        content = {**names, "metrics": {"top1": score}, "baselines": {"pixels": {"top1": 20.0}}}
        (tmp_path / name / "knn.json").write_text(json.dumps(content))
    (axes,) = figure.DRAWN["seeds"](figures.read(SEEDS, "f"), tmp_path).axes
    points = [collection.get_offsets()[:, 1].tolist() for collection in axes.collections[::2]]
    assert points == [[60, 70], [61, 72]]
    # Differences 1 and 2: mean 1.5, standard error 0.5, Student's t at one degree of freedom 12.71.
    assert axes.get_xticklabels()[1].get_text() == "B\n+1.5\n[−4.9, +7.9]"
    (pixels,) = [line for line in axes.lines if list(line.get_ydata()) == [20, 20]]
    assert pixels.get_linestyle() == ":"


def test_settings_with_different_numbers_of_seeds_are_refused() -> None:
    with pytest.raises(ValueError, match="give one per seed, as many in each"):
        figures.read({**SEEDS, "series": {"A": ["a0", "a1"], "B": ["b0"]}}, "f")


def test_a_figure_becomes_an_svg_and_a_png_the_same_each_time(tmp_path: Path) -> None:
    folder = results(tmp_path)

    def draw(name: str) -> list[bytes]:
        figure.run("mine", spec=LINES, results=folder, output=tmp_path / name / "mine.svg")
        return [(tmp_path / name / f"mine.{kind}").read_bytes() for kind in ("svg", "png")]

    assert draw("first") == draw("again")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": "resolved.sise"}, "no number at 'resolved.sise' (found None): correct the figure's `x`"),
        ({"metric": "map"}, "knn.json has no metric 'map': it has top1, top5"),
        ({"evaluation": "linear"}, "linear.json does not exist"),
    ],
)
def test_results_without_what_a_figure_shows_are_one_line(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    folder = results(tmp_path)
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the message is compared
        figure.run("mine", spec={**LINES, **changes}, results=folder, output=tmp_path / "mine.svg")
    assert message in str(caught.value)


def test_values_of_x_are_as_many_as_experiments() -> None:
    with pytest.raises(ValueError, match="series 'B' has 1 experiments, x 2 values: give as many"):
        figures.read({**LINES, "x": [1, 2]}, "figures.f")
