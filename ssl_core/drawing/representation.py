"""The pictures of a representation, drawn from the arrays of the protocol `pictures`.

Each `draw_...` takes arrays and returns a figure.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import PolyCollection
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter, NullFormatter

from ssl_core.drawing.style import FAINT, INK, NETWORKS, SOFT, axes_at, colour_of, marker_of, set_title, shorten, styled

RIGHT, WRONG = "#009e73", "#d55e00"  # Okabe and Ito
SOLID, DASHED = (0, ()), (0, (3, 1.5))  # frames
NUMBERED_CLASSES = 25  # a confusion matrix of more classes has no numbers
NUMBERS = ("tsne_kl", "trustworthiness", "triangles_kl", "rankme", "effective_rank")  # in the notes
NAMED_CLASSES = 60  # and of more than this no names


class Neighbours(NamedTuple):
    """The nearest training images of each query by one network, nearest first."""

    images: np.ndarray  # (queries, k, height, width, 3), uint8 or 0..1
    labels: np.ndarray  # (queries, k)


def draw_all(data: Mapping[str, np.ndarray]) -> dict[str, Figure]:
    """Draw the arrays of `evaluations.pictures`; keys with a dot belong to the network before it."""
    networks = [name for name in NETWORKS if f"{name}.points" in data]
    classes = [str(name) for name in data["classes"]]

    def of(key: str) -> dict[str, np.ndarray]:
        return {name: data[f"{name}.{key}"] for name in networks}

    def notes(text: str) -> dict[str, str]:
        notes = {}
        for name in networks:
            numbers = {key: float(data[f"{name}.{key}"]) for key in NUMBERS}
            notes[name] = text.format(**numbers)
        return notes

    neighbours = {
        name: Neighbours(data[f"{name}.neighbour_images"], data[f"{name}.neighbour_labels"]) for name in networks
    }
    shown = next(iter(neighbours.values())).labels.shape[1]
    perplexity = float(data["perplexity"])
    accuracies = ", ".join(f"{NETWORKS[name][0]} {float(top1):.1f} %" for name, top1 in of("top1").items())
    return {
        "tsne": draw_points(
            of("points"),
            data["labels"],
            classes,
            title=f"t-SNE of {len(data['labels']):,} images of {data['data']}, perplexity {perplexity:g}",
            notes=notes("divergence {tsne_kl:.2f}, trustworthiness {trustworthiness:.3f}"),
        ),
        "triangles": draw_points(
            of("triangles"),
            data["corner_labels"],
            classes,
            title=(
                f"t-SNE of {len(data['corner_labels']):,} images of {data['data']}, each joined to its two augmented "
                "copies"
            ),
            notes=notes("divergence {triangles_kl:.2f}"),
        ),
        "neighbours": draw_neighbours(
            data["query_images"],
            data["query_labels"],
            neighbours,
            classes,
            title=f"Queries of {data['data']} and their {shown} nearest of {int(data['num_bank']):,} training images",
        ),
        "confusion": draw_confusion(
            data["confusion"],
            classes,
            title=f"Weighted {data['k']}-nearest-neighbour classifier on {data['data']}\n{accuracies}",
        ),
        "spectrum": draw_spectrum(
            of("spectrum"),
            notes("RankMe {rankme:.1f}, effective rank {effective_rank:.1f}"),
            title=f"Spectrum of {int(data['num_tests']):,} centered features of {data['data']}",
        ),
    }


@styled
def draw_points(
    points: Mapping[str, np.ndarray],
    labels: np.ndarray,
    classes: Sequence[str],
    *,
    title: str,
    notes: Mapping[str, str],
    columns: int = 2,
) -> Figure:
    """Draw each network's points (images, 2), or triangles (images, 3, 2) of an image and its two copies, by class.

    A network's panel has its name as title, and its note.
    """
    shown = np.unique(labels)
    names = [shorten(classes[int(label)], 18) for label in shown]
    across = min(4 if max(map(len, names)) > 12 else 5, len(shown))  # of the legend
    legend = 0.25 + 0.21 * -(-len(shown) // across)
    rows = -(-len(points) // columns)
    figure = Figure(figsize=(0.2 + 4.5 * max(2, min(columns, len(points))), 0.3 + 4.8 * rows + legend))
    height = figure.get_figheight()
    figure.text(0.02, 1 - 0.14 / height, title, fontsize=11, va="top")
    for number, (network, positions) in enumerate(points.items()):
        row, column = divmod(number, columns)
        axes = axes_at(figure, 0.2 + 4.5 * column, legend + 4.8 * (rows - 1 - row), 4.3, 4.3)
        name = NETWORKS[network][0] if network in NETWORKS else network
        axes.text(0, 1.06, name, transform=axes.transAxes, fontsize=10, fontweight="bold")
        axes.text(0, 1.015, notes[network], transform=axes.transAxes, color=SOFT, fontsize=8.5)
        low, high = (of.reshape(-1, 2) for of in (positions.min(axis=0), positions.max(axis=0)))
        low, high = low.min(axis=0), high.max(axis=0)
        middle, reach = (low + high) / 2, 0.54 * (high - low).max()
        (left, bottom), (right, top) = middle - reach, middle + reach
        axes.set(xticks=[], yticks=[], xlim=(left, right), ylim=(bottom, top))
        axes.spines[:].set(visible=True, color=FAINT)
        for rank, label in enumerate(shown):
            _scatter(axes, positions[labels == label], rank)
    handles = [
        Line2D([], [], linestyle="", marker=marker_of(rank), color=colour_of(rank), markersize=6)
        for rank, _ in enumerate(shown)
    ]
    figure.legend(handles, names, loc="lower left", bbox_to_anchor=(0.012, 0), ncols=across, handletextpad=0.2)
    return figure


@styled
def draw_neighbours(
    queries: np.ndarray,
    labels: np.ndarray,
    nearest: Mapping[str, Neighbours],
    classes: Sequence[str],
    *,
    title: str,
    captions: Sequence[str] = (),
) -> Figure:
    """Draw `queries` (queries, height, width, 3) and the nearest images of each network, one network above the other.

    A query's caption is its class, after its entry of `captions`. A neighbour of the query's class has a green frame
    and a tick; another has a dashed red frame and a cross.
    """
    k = next(iter(nearest.values())).labels.shape[1]
    side, column, row, gap, left, top = 0.72, 0.82, 0.94, 0.22, 1.9, 0.78
    block = row * len(nearest) + gap
    width, height = left + column * k + 0.55, top + block * len(queries)
    figure = Figure(figsize=(width, height))
    set_title(figure, title)
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
        low = base - (row * len(nearest) + side) / 2 + 0.1
        caption = captions[number] if captions else "query"
        _picture(figure, image, (0.15, low, side), f"{caption}: {shorten(classes[int(label)], 12)}")
        for line, (network, others) in enumerate(nearest.items()):
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
    """Draw counts (classes, classes), true by predicted class, as shares of each true class."""
    num = len(counts)
    shares = 100 * counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    side = float(np.clip(0.42 * num, 3.6, 8.4)) if num <= NUMBERED_CLASSES else 8.4 if num <= NAMED_CLASSES else 7.0
    names = [shorten(name, 18) for name in classes] if num <= NAMED_CLASSES else []
    longest = max(map(len, names), default=0)
    upright = longest > 2
    left, bottom = 0.6 + 0.072 * longest, 0.5 + (0.072 * longest if upright else 0.1)
    figure = Figure(figsize=(left + side + 0.9, bottom + side + 0.65))
    set_title(figure, title)
    axes = axes_at(figure, left, bottom, side, side)
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
    bar = axes_at(figure, left + side + 0.15, bottom, 0.14, side)
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
        seen = shares > 1e-8  # the precision of float32 features; dimensions below it are unused
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


def _scatter(axes: Axes, positions: np.ndarray, rank: int) -> None:
    """Draw one class: its points, or its triangles with a point at each image."""
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
    """Draw an image at (left, bottom, side) in inches with a frame and its name; `right` is None for a query."""
    width, height = figure.get_size_inches()
    left, bottom, side = place
    axes = axes_at(figure, left, bottom, side, side)
    axes.imshow(pixels, interpolation="nearest")  # without smoothing
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
