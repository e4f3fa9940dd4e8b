"""The stage `curves`: what a pre-training's history.csv says, as a picture."""

import csv
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ssl_core.drawing.figures import COLOURS, FAINT, render, styled
from ssl_core.files import write_bytes

TITLES = {"embedding/spread": "spread of the embedding", "online/knn": "online kNN, % right"}
LINES = ("-", "--", ":", "-.")  # losses


def run(experiment: str, *, history: Path, output: Path) -> None:
    """Draw `history` as `output` (.png) and, beside it, as .svg.

    Raises `ValueError` for a history without a row.
    """
    columns = read_history(history)
    for kind, content in render(draw_curves(columns, title=f"Pre-training of {experiment}")).items():
        write_bytes(output.with_suffix(f".{kind}"), content)


def read_history(path: Path) -> dict[str, np.ndarray]:
    """Read the columns of a history as float64; NaN where nothing was measured."""
    with open(path, encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    if not rows:
        raise ValueError(f"{path} has no row: remove it and pre-train again")
    return {name: np.array([float(row[name] or "nan") for row in rows]) for name in rows[0]}


@styled
def draw_curves(history: Mapping[str, np.ndarray], *, title: str) -> Figure:
    """Draw the columns of a history over its epochs, all losses in one panel; NaN where nothing was measured."""
    columns = {name: values for name, values in history.items() if "/" in name and not np.isnan(values).all()}
    panels: dict[str, list[str]] = {}
    for name in columns:
        panel = "loss" if name.startswith("loss/") else TITLES.get(name, name.split("/")[-1].replace("_", " "))
        panels.setdefault(panel, []).append(name)
    rows = -(-len(panels) // 3)
    figure = Figure(figsize=(11, 0.4 + 2.5 * rows))
    figure.set_layout_engine("constrained", w_pad=0.1, h_pad=0.1)
    figure.suptitle(title, fontsize=11, x=0.012, ha="left")
    grid = figure.subplots(rows, 3, squeeze=False, sharex=True).ravel()
    for axes in grid[len(panels) :]:
        axes.remove()
    for axes, (panel, names) in zip(grid, panels.items()):
        axes.set_title(panel)
        for rank, name in enumerate(names):
            measured = ~np.isnan(columns[name])
            axes.plot(
                history["epoch"][measured],
                columns[name][measured],
                LINES[rank % len(LINES)],
                color=COLOURS[2 * rank % len(COLOURS)],
                marker="o" if 3 * measured.sum() <= len(measured) else None,
                markersize=3.5,
                linewidth=1.6,
                label=name.split("/")[-1],
            )
        if len(names) > 1:
            axes.legend()
        axes.grid(color=FAINT, linewidth=0.5)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.tick_params(labelbottom=True)
        axes.set_xlabel("epoch")
    return figure
