"""How the pictures look: one font, white ground, colours that colour-blind readers tell apart and never colour alone.

Each `draw_...` takes arrays and gives a figure; `render` makes a PNG and an SVG of it, the same bytes each time.
"""

import io
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import matplotlib.style
import numpy as np
from matplotlib import color_sequences
from matplotlib.axes import Axes
from matplotlib.collections import PolyCollection
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter, NullFormatter

DPI = 150
INK, SOFT, FAINT = "#1c2430", "#667080", "#c9cfd8"
# Petroff (2021), made for colour-blind readers; its last is too pale for small points on white
COLOURS = (*map(to_hex, color_sequences["petroff10"][:-1]), INK)
MARKERS = "o^sDvPX<>*"
RIGHT, WRONG = "#009e73", "#d55e00"  # Okabe and Ito
SOLID, DASHED = (0, ()), (0, (3, 1.5))  # frames
NETWORKS = {"pretrained": ("pre-trained", COLOURS[0], "-"), "untrained": ("untrained", COLOURS[6], "--")}
NUMBERED_CLASSES = 25  # up to here a confusion matrix has numbers
NAMED_CLASSES = 60  # and up to here names
STYLE = {
    "font.family": "DejaVu Sans",  # comes with matplotlib
    "font.size": 9,
    "text.color": INK,
    "text.parse_math": False,  # a class may be called $x$
    "axes.edgecolor": SOFT,
    "axes.labelcolor": INK,
    "axes.linewidth": 0.8,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.grid": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": SOFT,
    "ytick.color": SOFT,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
    "svg.hashsalt": "ssl-core",
}
styled = matplotlib.style.context(["default", STYLE])  # whatever a reader's matplotlibrc says


class Neighbours(NamedTuple):
    """What one network finds nearest to each query, nearest first."""

    images: np.ndarray  # (queries, k, height, width, 3), 0..1
    labels: np.ndarray  # (queries, k)


@styled
def render(figure: Figure) -> dict[str, bytes]:
    """Return the figure as a PNG of 150 dpi and an SVG, by extension."""
    pictures = {}
    for extension, metadata in (("png", {"Software": None}), ("svg", {"Date": None, "Creator": None})):
        buffer = io.BytesIO()
        figure.savefig(buffer, format=extension, dpi=DPI, metadata=metadata)
        pictures[extension] = buffer.getvalue()
    return pictures


@styled
def draw_points(
    points: Mapping[str, np.ndarray],
    labels: np.ndarray,
    classes: Sequence[str],
    *,
    title: str,
    notes: Mapping[str, str],
) -> Figure:
    """Draw each network's points (images, 2), or triangles (images, 3, 2) of an image and its two copies, by class."""
    shown = np.unique(labels)
    names = [shorten(classes[int(label)], 18) for label in shown]
    columns = min(4 if max(map(len, names)) > 12 else 5, len(shown))
    rows = -(-len(shown) // columns)
    legend = 0.25 + 0.21 * rows
    figure = Figure(figsize=(9.2, 5.1 + legend))
    height = figure.get_figheight()
    figure.text(0.02, 1 - 0.14 / height, title, fontsize=11, va="top")
    for number, (network, positions) in enumerate(points.items()):
        axes = figure.add_axes(((0.2 + 4.5 * number) / 9.2, legend / height, 4.3 / 9.2, 4.3 / height))
        axes.text(0, 1.06, NETWORKS[network][0], transform=axes.transAxes, fontsize=10, fontweight="bold")
        axes.text(0, 1.015, notes[network], transform=axes.transAxes, color=SOFT, fontsize=8.5)
        low, high = (of.reshape(-1, 2) for of in (positions.min(axis=0), positions.max(axis=0)))
        middle, reach = (low.min(0) + high.max(0)) / 2, 0.54 * (high.max(0) - low.min(0)).max()
        (left, bottom), (right, top) = middle - reach, middle + reach
        axes.set(xticks=[], yticks=[], xlim=(left, right), ylim=(bottom, top))
        axes.spines[:].set(visible=True, color=FAINT)
        for rank, label in enumerate(shown):
            _scatter(axes, positions[labels == label], rank)
    handles = [
        Line2D([], [], linestyle="", marker=marker_of(rank), color=colour_of(rank), markersize=6)
        for rank, _ in enumerate(shown)
    ]
    figure.legend(handles, names, loc="lower left", bbox_to_anchor=(0.012, 0), ncols=columns, handletextpad=0.2)
    return figure


@styled
def draw_neighbours(
    queries: np.ndarray, labels: np.ndarray, found: Mapping[str, Neighbours], classes: Sequence[str], *, title: str
) -> Figure:
    """Draw `queries` (queries, height, width, 3) and, one network above the other, what each finds nearest.

    A neighbour of the query's class is framed green with a tick, another red, dashed and with a cross.
    """
    k = next(iter(found.values())).labels.shape[1]
    side, column, row, gap, left, top = 0.72, 0.82, 0.94, 0.22, 1.9, 0.78
    block = row * len(found) + gap
    width, height = left + column * k + 0.55, top + block * len(queries)
    figure = Figure(figsize=(width, height))
    figure.text(0.15 / width, 1 - 0.14 / height, title, fontsize=11, va="top")
    marks = [
        Line2D([], [], color=colour, linestyle=style, linewidth=1.8)
        for colour, style in ((RIGHT, SOLID), (WRONG, DASHED))
    ]
    figure.legend(
        marks,
        ["✓ of the query's class", "✗ of another"],
        loc="upper left",
        ncols=2,
        bbox_to_anchor=(0.1 / width, 1 - 0.32 / height),
    )
    for number, (image, label) in enumerate(zip(queries, labels)):
        base = height - top - block * number
        low = base - (row * len(found) + side) / 2 + 0.1
        _picture(figure, image, (0.15, low, side), f"query: {shorten(classes[int(label)], 12)}")
        for line, (network, others) in enumerate(found.items()):
            bottom = base - row * line - side
            right = others.labels[number] == label
            figure.text(
                (left - 0.1) / width, (bottom + side / 2) / height, NETWORKS[network][0], ha="right", va="center"
            )
            figure.text((left + column * k) / width, (bottom + side / 2) / height, f"{right.sum()}/{k}", va="center")
            for place, other in enumerate(others.images[number]):
                name = shorten(classes[int(others.labels[number, place])], 11)
                _picture(figure, other, (left + column * place, bottom, side), name, right=bool(right[place]))
    return figure


@styled
def draw_confusion(counts: np.ndarray, classes: Sequence[str], *, title: str) -> Figure:
    """Draw counts (classes, classes), true class by predicted, as the share of each true class."""
    num = len(counts)
    shares = 100 * counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    side = float(np.clip(0.42 * num, 3.6, 8.4)) if num <= NUMBERED_CLASSES else 8.4 if num <= NAMED_CLASSES else 7.0
    names = [shorten(name, 18) for name in classes] if num <= NAMED_CLASSES else []
    longest = max(map(len, names), default=0)
    upright = longest > 2
    left, bottom = 0.6 + 0.072 * longest, 0.5 + (0.072 * longest if upright else 0.1)
    figure = Figure(figsize=(left + side + 0.9, bottom + side + 0.65))
    width, height = figure.get_size_inches()
    figure.text(0.15 / width, 1 - 0.14 / height, title, fontsize=11, va="top")
    axes = figure.add_axes((left / width, bottom / height, side / width, side / height))
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=100, interpolation="nearest", aspect="auto")
    axes.set(xlabel="predicted", ylabel="true")
    axes.spines[:].set(visible=True, color=FAINT)
    axes.tick_params(length=0)
    if names:
        size = min(8.5, 60 * side / num)
        axes.set_xticks(range(num), names, rotation=90 if upright else 0, fontsize=size)
        axes.set_yticks(range(num), names, fontsize=size)
    if num <= NUMBERED_CLASSES:
        size = min(9, 26 * side / num)
        for row, column in zip(*np.nonzero(counts)):
            share = shares[row, column]
            text = f"{share:.0f}" if share >= 0.5 else "<1"
            axes.text(column, row, text, ha="center", va="center", fontsize=size, color="white" if share > 55 else INK)
    bar = figure.add_axes(((left + side + 0.15) / width, bottom / height, 0.14 / width, side / height))
    figure.colorbar(image, cax=bar, ticks=[0, 25, 50, 75, 100]).set_label("% of the true class")
    bar.tick_params(length=0)
    bar.spines[:].set(visible=False)
    return figure


@styled
def draw_spectrum(spectra: Mapping[str, np.ndarray], notes: Mapping[str, str], *, title: str) -> Figure:
    """Draw each network's singular values, largest first, over their rank, as shares of the largest."""
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.add_subplot()
    axes.set_title(title, pad=10, fontsize=11)
    lowest = 0.1
    for network, values in spectra.items():
        name, colour, dashes = NETWORKS[network]
        shares = values / max(values[0], np.finfo(float).tiny)
        seen = shares > 1e-8  # float32 features have no more; what lies below is the dimensions not used
        lowest = min(lowest, shares[seen].min(initial=1))
        axes.plot(
            np.arange(1, len(values) + 1)[seen],
            shares[seen],
            dashes,
            color=colour,
            linewidth=1.8,
            label=f"{name}: {notes[network]}",
        )
    axes.set(yscale="log", xlabel="rank", ylabel="singular value / largest", ylim=(lowest / 1.5, 1.5))
    axes.set_xlim(1, max(max(map(len, spectra.values())), 2))
    axes.grid(color=FAINT, linewidth=0.5)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.legend(loc="upper right")
    return figure


def shorten(name: str, length: int) -> str:
    """Cut a long name, with an ellipsis as its last character."""
    return name if len(name) <= length else name[: length - 1] + "…"


def _scatter(axes: Axes, positions: np.ndarray, rank: int) -> None:
    """Draw one class: its points, or its triangles with a point at the image itself."""
    colour = colour_of(rank)
    if positions.ndim == 3:
        triangles = PolyCollection(
            list(positions), facecolors=(*to_rgb(colour), 0.18), edgecolors=colour, linewidths=0.7
        )
        axes.add_collection(triangles)
        positions = positions[:, 0]
    size = float(np.clip(1600 / max(1, len(positions)), 11, 24))
    axes.scatter(
        *positions.T, s=size, marker=marker_of(rank), color=colour, edgecolors="white", linewidths=0.3, zorder=2
    )


def _picture(
    figure: Figure,
    pixels: np.ndarray,
    place: tuple[float, float, float],
    name: str,
    *,
    right: bool | None = None,
) -> None:
    """Show an image at (left, bottom, side) in inches, framed, its name below; `right` is None for a query."""
    width, height = figure.get_size_inches()
    left, bottom, side = place
    axes = figure.add_axes((left / width, bottom / height, side / width, side / height))
    axes.imshow(pixels, interpolation="nearest")  # 16 px are shown as 16 px
    axes.set_axis_off()
    colour, line = INK, SOLID
    if right is not None:
        colour, line, name = (RIGHT, SOLID, f"✓ {name}") if right else (WRONG, DASHED, f"✗ {name}")
    frame = Rectangle(
        (0, 0), 1, 1, transform=axes.transAxes, fill=False, edgecolor=colour, linestyle=line, linewidth=1.8
    )
    axes.add_patch(frame).set_clip_on(False)
    ink, start, align = (INK, left, "left") if right is None else (colour, left + side / 2, "center")
    figure.text(start / width, (bottom - 0.05) / height, name, ha=align, va="top", fontsize=7, color=ink)


def colour_of(rank: int) -> str:
    """Give each of ten classes or experiments a colour."""
    return COLOURS[rank % len(COLOURS)]


def marker_of(rank: int) -> str:
    """Give the second ten classes other shapes than those of their colours in the first ten."""
    return MARKERS[(rank + rank // len(MARKERS)) % len(MARKERS)]
