"""The curves of a pre-training, drawn from its history.csv."""

import csv
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ssl_core.drawing.style import COLOURS, FAINT, panels, styled

# Titles of panels; the title of another column is its name without the group.
TITLES = {
    "embedding/spread": "spread of the embedding",
    "embedding/rankme": "RankMe of the embedding",
    "embedding/effective_rank": "RankMe of the embedding",  # in histories of earlier versions
    "online/knn": "online kNN, % right",
    "instance/top1": "instance discrimination, % right",
}
LINES = ("-", "--", ":", "-.")  # of losses
COLUMNS = 3


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
    groups: dict[str, list[str]] = {}
    for name in columns:
        groups.setdefault(_panel(name), []).append(name)
    figure, grid = panels(len(groups), COLUMNS, (11 / COLUMNS, 2.5), title, sharex=True)
    for axes, (panel, names) in zip(grid, groups.items(), strict=True):
        axes.set_title(panel)
        _draw_panel(axes, history["epoch"], {name: columns[name] for name in names})
    return figure


def _panel(column: str) -> str:
    """Return the title of the panel that shows a column."""
    if column.startswith("loss/"):
        return "loss"
    return TITLES.get(column, column.split("/")[-1].replace("_", " "))


def _draw_panel(axes: Axes, epochs: np.ndarray, columns: Mapping[str, np.ndarray]) -> None:
    """Draw a line per column, with points where few values were measured."""
    for rank, (name, values) in enumerate(columns.items()):
        measured = ~np.isnan(values)
        axes.plot(
            epochs[measured],
            values[measured],
            LINES[rank % len(LINES)],
            color=COLOURS[2 * rank % len(COLOURS)],
            marker="o" if 3 * measured.sum() <= len(measured) else None,
            markersize=3.5,
            linewidth=1.6,
            label=name.split("/")[-1],
        )
    if len(columns) > 1:
        axes.legend()
    axes.grid(color=FAINT, linewidth=0.5)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.tick_params(labelbottom=True)
    axes.set_xlabel("epoch")
