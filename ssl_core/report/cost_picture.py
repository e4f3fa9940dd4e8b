"""Accuracy over the time of pre-training (Cao & Wu, Figure 1) or over the latency, one point per network."""

from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke

from ssl_core.drawing.style import COLOURS, FAINT, INK, SOFT, colour_of, marker_of, panels, shorten, styled
from ssl_core.report.results import Priced, Row, baselines, headline, summarise

UNITS = (("hours", 3600), ("minutes", 60), ("seconds", 1))
LINES = {"untrained": (COLOURS[6], "--"), "pixels": (INK, ":")}
LINE_HEIGHT = 11.0  # points between two labels


@styled
def draw_costs(rows: Sequence[Row], priced: Mapping[str, Sequence[Priced]], *, title: str) -> Figure:
    """Draw one panel per evaluation of one data set; `priced` comes from `results.priced`.

    Error bars are standard deviations over seeds; lines are the baselines, averaged over the experiments.
    """
    most = _largest(priced)
    unit, length = next((unit for unit in UNITS if most >= 2 * unit[1]), UNITS[-1])
    return _draw(rows, priced, title=title, label=f"{unit} of pre-training", length=length)


@styled
def draw_latencies(priced: Mapping[str, Sequence[Priced]], *, title: str) -> Figure:
    """Draw one panel per evaluation of 8-bit networks; `priced` comes from `results.latencies`."""
    return _draw([], priced, title=title, label="ms per image", length=1)


def _draw(
    rows: Sequence[Row], priced: Mapping[str, Sequence[Priced]], *, title: str, label: str, length: float
) -> Figure:
    """Draw the accuracies over the costs, which are divided by `length`."""
    most = _largest(priced)
    figure, grid = panels(len(priced), min(2, len(priced)), (5.5, 3.9), title)
    names = sorted({point.name for points in priced.values() for point in points})
    for axes, (group, points) in zip(grid, priced.items(), strict=True):
        axes.set(title=group, xlabel=label, ylabel="%")
        _lines(axes, rows, group)
        for point in points:
            rank = names.index(point.name)
            axes.errorbar(
                point.cost.mean / length,
                point.accuracy.mean,
                xerr=(point.cost.deviation or 0) / length,
                yerr=point.accuracy.deviation or 0,
                fmt=marker_of(rank),
                color=colour_of(rank),
                markersize=6,
                elinewidth=1,
            )
        axes.set_xlim(0, 1.3 * most / length)  # room for the last name
        axes.grid(color=FAINT, linewidth=0.5)
    figure.draw_without_rendering()  # fixes the positions of the points
    figure.set_layout_engine("none")
    for axes, points in zip(grid, priced.values(), strict=True):
        _name(axes, {shorten(p.name, 20): (p.cost.mean / length, p.accuracy.mean) for p in points})
    return figure


def _largest(priced: Mapping[str, Sequence[Priced]]) -> float:
    return max(point.cost.mean for points in priced.values() for point in points)


def _lines(axes: Axes, rows: Sequence[Row], group: str) -> None:
    for name in baselines(rows, group):
        with_group = [row for row in rows if group in row.results]
        summaries = [row.summary(group, name, headline(row.results[group][0])) for row in with_group]
        over_all = summarise(summary and summary.mean for summary in summaries)
        if over_all is None:
            continue
        colour, dashes = LINES[name]
        axes.axhline(over_all.mean, color=colour, linestyle=dashes, linewidth=1.2)
        axes.text(
            0.01, over_all.mean, name, transform=axes.get_yaxis_transform(), va="bottom", fontsize=8, color=colour
        )


def _name(axes: Axes, points: dict[str, tuple[float, float]]) -> None:
    """Write each point's name to its right, lower where another name is in the way."""
    scale = 72 / axes.figure.dpi
    taken: list[tuple[float, float, float]] = []  # left, right, height of names, in points
    for name, place in sorted(points.items(), key=lambda item: -item[1][1]):
        across, up = axes.transData.transform(place) * scale
        left, right, height = across + 7, across + 9 + 4.6 * len(name), up
        for other_left, other_right, other in sorted(taken, key=lambda name: -name[2]):
            if left < other_right and other_left < right and abs(height - other) < LINE_HEIGHT:
                height = other - LINE_HEIGHT
        taken.append((left, right, height))
        arrow = {"arrowstyle": "-", "color": SOFT, "linewidth": 0.5} if height < up - LINE_HEIGHT / 2 else None
        axes.annotate(
            name,
            place,
            (7, height - up),
            textcoords="offset points",
            fontsize=8,
            va="center",
            arrowprops=arrow,
            path_effects=[withStroke(linewidth=2, foreground="white")],  # else error bars cross the name
        )
