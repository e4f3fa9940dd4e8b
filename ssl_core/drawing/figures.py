"""Figures that compare several experiments, from numbers and arrays that their evaluations wrote."""

import textwrap
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch
from matplotlib.patheffects import withStroke
from matplotlib.ticker import FuncFormatter, NullFormatter

from ssl_core.drawing.style import FAINT, INK, SOFT, colour_of, marker_of, panels, shorten, styled

SIZE = (6.4, 4.2)  # inches
TITLE = 64  # characters in a line
WIDE = 20  # x values whose largest is this many times the smallest are drawn on a logarithmic axis
LARGEST_DISC = 1200.0  # square points


class Disc(NamedTuple):
    """A network in the plane of Shi et al.'s Figure 1."""

    intra_class_alignment: float
    uniformity: float
    accuracy: float  # percent
    parameters: int


@styled
def draw_lines(
    series: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    *,
    title: str,
    x_label: str,
    y_label: str,
    points: bool = True,
) -> Figure:
    """Draw each series of (x, y) as a line from small to large x; `points` marks each value."""
    figure = Figure(figsize=SIZE, layout="constrained")
    axes = figure.add_subplot()
    axes.set_title(textwrap.fill(title, TITLE), pad=10, fontsize=11)
    for rank, (label, (across, up)) in enumerate(series.items()):
        order = np.argsort(across)
        marker = marker_of(rank) if points else None
        x, y = np.asarray(across, float)[order], np.asarray(up, float)[order]
        axes.plot(x, y, marker=marker, color=colour_of(rank), linewidth=1.6, markersize=5.5, label=label)
    everything = np.concatenate([np.asarray(across, float) for across, _ in series.values()])
    axes.set(xlabel=x_label, ylabel=y_label)
    if points and everything.min() > 0 and everything.max() > WIDE * everything.min():
        axes.set_xscale("log")
        axes.set_xticks(np.unique(everything))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    elif points and len(np.unique(everything)) <= 8:
        axes.set_xticks(np.unique(everything))
    axes.grid(color=FAINT, linewidth=0.5)
    axes.legend()
    return figure


class Setting(NamedTuple):
    """A measure of one setting, a number per seed."""

    values: Sequence[float]
    untrained: Sequence[float]  # of the same networks before training; empty where it was not measured
    pixels: float | None  # of the raw pixels
    difference: str  # from the first setting, on two lines


@styled
def draw_seeds(measures: Sequence[tuple[str, Mapping[str, Setting]]], *, title: str) -> Figure:
    """Draw one panel per measure: for each setting a point per seed, the mean, and the untrained networks hollow."""
    number = max(len(settings) for _, settings in measures)
    width = max(3.0, 1.15 * number)  # inches of a panel
    wrapped = textwrap.fill(title, int(TITLE / SIZE[0] * width * len(measures)))
    figure, grid = panels(len(measures), len(measures), (width, 3.4), wrapped)
    for axes, (label, settings) in zip(grid, measures, strict=True):
        for place, setting in enumerate(settings.values()):
            colour = colour_of(place)
            axes.scatter([place] * len(setting.values), setting.values, s=26, color=colour, zorder=3)
            hollow = [place + 0.25] * len(setting.untrained)
            axes.scatter(hollow, setting.untrained, s=20, facecolors="none", edgecolors=SOFT, linewidths=0.8)
            mean = float(np.mean(setting.values))
            axes.plot([place - 0.22, place + 0.22], [mean, mean], color=colour, linewidth=1.6)
        pixels = next((setting.pixels for setting in settings.values() if setting.pixels is not None), None)
        if pixels is not None:
            axes.axhline(pixels, color=INK, linestyle=":", linewidth=1)
            axes.text(1, pixels, "pixels", transform=axes.get_yaxis_transform(), ha="right", va="bottom", fontsize=7.5)
        names = [f"{textwrap.fill(name, 16)}\n{setting.difference}" for name, setting in settings.items()]
        axes.set_xticks(range(len(names)), names, fontsize=7.5)
        axes.set_xlim(-0.5, len(names) - 0.4)
        axes.set_title(label, fontsize=9)
        axes.grid(axis="y", color=FAINT, linewidth=0.5)
    return figure


@styled
def draw_plane(series: Mapping[str, Sequence[Disc]], *, title: str, colour_label: str) -> Figure:
    """Draw each network's intra-class alignment and uniformity as a disc; an arrow leads to the next of its series."""
    figure = Figure(figsize=(7.2, 5.0), layout="constrained")
    axes = figure.add_subplot()
    axes.set_title(textwrap.fill(title, TITLE), pad=10, fontsize=11)
    largest = max(disc.parameters for discs in series.values() for disc in discs)
    flat = [disc for discs in series.values() for disc in discs]
    scatter = axes.scatter(
        [disc.intra_class_alignment for disc in flat],
        [disc.uniformity for disc in flat],
        s=[LARGEST_DISC * disc.parameters / largest for disc in flat],
        c=[disc.accuracy for disc in flat],
        cmap="viridis",
        edgecolors=INK,
        linewidths=0.6,
        alpha=0.85,
    )
    for label, discs in series.items():
        for before, after in pairwise(discs):
            arrow = FancyArrowPatch(before[:2], after[:2], arrowstyle="-|>", mutation_scale=10, color=SOFT, linewidth=1)
            axes.add_patch(arrow)
        for number, disc in enumerate(discs):
            name = f"{shorten(label, 24)} {disc.accuracy:.1f}" if number == 0 else f"{disc.accuracy:.1f}"
            radius = (LARGEST_DISC * disc.parameters / largest / np.pi) ** 0.5
            axes.annotate(
                name,
                disc[:2],
                (0, radius + 3 if number == 0 else -radius - 3),
                textcoords="offset points",
                ha="center",
                va="bottom" if number == 0 else "top",
                fontsize=8,
                path_effects=[withStroke(linewidth=2, foreground="white")],
            )
    axes.margins(0.2)
    axes.set_axisbelow(True)
    axes.set(xlabel="intra-class alignment (smaller: tighter classes)", ylabel="uniformity (smaller: more spread)")
    axes.grid(color=FAINT, linewidth=0.5)
    figure.colorbar(scatter, ax=axes, pad=0.02).set_label(colour_label)
    return figure
