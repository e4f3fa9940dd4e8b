"""The stage `figure`: a figure of the section `figures` from the results of its experiments."""

import math
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from safetensors import safe_open

from ssl_core.drawing.curves import TITLES, read_history
from ssl_core.drawing.figures import TITLE, Disc, Setting, draw_lines, draw_plane, draw_seeds
from ssl_core.drawing.representation import Neighbours, draw_neighbours, draw_points
from ssl_core.drawing.style import render
from ssl_core.experiments import figures
from ssl_core.files import read_json, write_bytes
from ssl_core.report.cost_picture import draw_costs
from ssl_core.report.results import Priced, Summary, headline, read_result, value
from ssl_core.report.ways import paired_difference
from ssl_core.stages.draw import read_arrays

STATISTICS = ("running_mean", "running_var", "num_batches_tracked")  # of BatchNorm, no parameters


def run(figure: str, *, spec: dict[str, Any], results: Path, output: Path) -> None:
    """Draw a figure by its settings `spec` as `output` (.svg) and, in the same folder, as .png.

    `results` is the folder of the experiments. Raises `ValueError` for results that lack what the figure shows.
    """
    section = figures.read(spec, f"figures.{figure}")
    drawn = DRAWN[section.draw](section, results)
    for extension, content in render(drawn).items():
        write_bytes(output.with_suffix(f".{extension}"), content)
    print(f"figure {figure} -> {output}")


def _lines(section: figures.Lines, results: Path) -> Figure:
    series = {}
    y_label = ""
    for label, experiments in section.series.items():
        if isinstance(section.x, str):
            across = [_setting(results / name / "pretrain.json", section.x) for name in experiments]
        else:
            across = list(section.x)
        scores = [_score(results / name / f"{section.evaluation}.json", section.metric) for name in experiments]
        series[label] = (across, [score for score, _ in scores])
        y_label = scores[0][1]
    return draw_lines(series, title=section.title, x_label=section.x_label, y_label=y_label)


def _seeds(section: figures.Seeds, results: Path) -> Figure:
    measures: list[tuple[str, Mapping[str, Setting]]] = []
    for measure in section.measures:
        evaluation, _, metric = measure.partition(".")
        settings: dict[str, Setting] = {}
        label = measure
        for name, experiments in section.series.items():
            paths = [results / experiment / f"{evaluation}.json" for experiment in experiments]
            label = _score(paths[0], metric or None)[1]
            settings[name] = _setting_of(paths, metric, settings)
            values = " ".join(f"{number:.4g}" for number in settings[name].values)
            print(f"{label}, {name}: {values}  {' '.join(settings[name].difference.split())}")
        measures.append((label, settings))
    return draw_seeds(measures, title=section.title)


def _setting_of(paths: Sequence[Path], metric: str, before: Mapping[str, Setting]) -> Setting:
    """Return a metric (empty: the headline) of one setting, a number per seed; `before` are the settings before it."""
    values = [_score(path, metric or None)[0] for path in paths]
    found = [read_result(path) for path in paths]
    decimals = 3 if metric else 1
    metric = metric or headline(found[0])
    untrained = [value(result, "untrained", metric) for result in found]
    known = [number for number in untrained if number is not None]
    difference = ""
    if before:
        difference = _difference(values, next(iter(before.values())).values, decimals=decimals)
    return Setting(values, known, value(found[0], "pixels", metric), difference)


def _difference(values: Sequence[float], first: Sequence[float], *, decimals: int) -> str:
    """Return the mean paired difference from `first`, and its 95 % interval on a second line."""
    mean, interval, _ = paired_difference(values, first, range(len(values)))
    text = f"{mean:+.{decimals}f}"
    if interval is not None:
        low, high = interval
        text += f"\n[{low:+.{decimals}f}, {high:+.{decimals}f}]"
    return text.replace("-", "−")


def _history(section: figures.History, results: Path) -> Figure:
    series = {}
    for label, experiment in section.series.items():
        path = results / experiment / "history.csv"
        history = read_history(path)
        if section.column not in history:
            raise ValueError(f"{path} has no column '{section.column}': it has {', '.join(history)}")
        measured = ~np.isnan(history[section.column])
        series[label] = (history["epoch"][measured].tolist(), history[section.column][measured].tolist())
    y_label = TITLES.get(section.column, section.column)
    return draw_lines(series, title=section.title, x_label="epoch", y_label=y_label, points=False)


def _costs(section: figures.Costs, results: Path) -> Figure:
    points, group = [], ""
    for label, experiment in section.series.items():
        seconds = _setting(results / experiment / "pretrain.json", "cost.seconds")
        score, group = _score(results / experiment / f"{section.evaluation}.json", None)
        points.append(Priced(label, Summary(seconds, None, 1), Summary(score, None, 1)))
    return draw_costs([], {group: points}, title=textwrap.fill(section.title, TITLE))


def _plane(section: figures.Plane, results: Path) -> Figure:
    series = {}
    label = ""
    for name, experiments in section.series.items():
        series[name] = []
        for experiment in experiments:
            folder = results / experiment
            accuracy, label = _score(folder / f"{section.evaluation}.json", None)
            measured = folder / f"{section.evaluation_metrics}.json"
            intra, uniformity = (_score(measured, key)[0] for key in ("intra_class_alignment", "uniformity"))
            parameters = _count_parameters(folder / "backbone.safetensors")
            series[name].append(Disc(intra, uniformity, accuracy, parameters))
    return draw_plane(series, title=section.title, colour_label=label)


def _points(section: figures.Points, results: Path) -> Figure:
    key, labels_key = {"tsne": ("points", "labels"), "triangles": ("triangles", "corner_labels")}[section.shows]
    points, notes = {}, {}
    first: Mapping[str, np.ndarray] = {}
    for label, experiment in section.series.items():
        path = results / experiment / section.evaluation / "pictures.npz"
        arrays = read_arrays(path)
        first = first or arrays
        if not np.array_equal(arrays[labels_key], first[labels_key]):
            raise ValueError(f"{path} has other images than that of the figure's first experiment: use one data set")
        points[label] = arrays[f"pretrained.{key}"]
        notes[label] = f"kNN {float(arrays['pretrained.top1']):.1f} %"
    classes = [str(name) for name in first["classes"]]
    return draw_points(points, first[labels_key], classes, title=section.title, notes=notes, columns=section.columns)


def _neighbours(section: figures.Neighbours, results: Path) -> Figure:
    path = results / section.experiment / section.evaluation / "pictures.npz"
    arrays = read_arrays(path)
    if "augmented.images" not in arrays:
        raise ValueError(f"{path} has no augmented queries: set evaluations.{section.evaluation}.query_views")
    nearest = Neighbours(arrays["augmented.neighbour_images"], arrays["augmented.neighbour_labels"])
    return draw_neighbours(
        arrays["augmented.images"],
        arrays["augmented.labels"],
        {"pretrained": nearest},
        [str(name) for name in arrays["classes"]],
        title=section.title,
        captions=[str(name) for name in arrays["augmented.policies"]],
    )


DRAWN = {
    "lines": _lines,
    "seeds": _seeds,
    "history": _history,
    "costs": _costs,
    "plane": _plane,
    "points": _points,
    "neighbours": _neighbours,
}


def _score(path: Path, metric: str | None) -> tuple[float, str]:
    """Return a metric (default: the headline) of an evaluation's JSON, and a label for it."""
    result = read_result(path)
    metric = metric or headline(result)
    number = value(result, "", metric)
    if number is None:
        raise ValueError(f"{path} has no metric '{metric}': it has {', '.join(result['metrics'])}")
    unit = ", %" if metric == headline(result) else ""
    return number, f"{result['protocol']} {metric}{unit}"


def _setting(path: Path, key: str) -> float:
    """Return the number at a dotted `key` of a JSON file; numbers select items of lists."""
    found = read_json(path)
    for part in key.split("."):
        if isinstance(found, list) and part.isdecimal() and int(part) < len(found):
            found = found[int(part)]
        else:
            found = found.get(part) if isinstance(found, dict) else None
    if not isinstance(found, int | float) or isinstance(found, bool):
        raise ValueError(f"{path} has no number at '{key}' (found {found!r}): correct the figure's `x`")
    return found


def _count_parameters(path: Path) -> int:
    """Count the parameters of a safetensors file from its header."""
    with safe_open(path, "np") as file:
        names = [name for name in file.keys() if not name.endswith(STATISTICS)]  # noqa: SIM118
        return sum(math.prod(file.get_slice(name).get_shape()) for name in names)
