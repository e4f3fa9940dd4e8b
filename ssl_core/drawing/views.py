"""The picture of the views that each network gets: one column per image, one row per view."""

import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from ssl_core.config import Dataset
from ssl_core.data.loader import Batch, Loader
from ssl_core.data.shards import Manifest
from ssl_core.data.views import POLICIES, Augmentation, View, Views
from ssl_core.files import atomic

IMAGES = 8  # drawn per data set or batch
CELL = 1.45  # inches of the largest view; others are smaller, but never less than half of it
GAP, MARGIN = 0.06, 0.2  # inches
HEADER = 0.65  # inches above each group of views


def draw_first_views(
    manifest: Manifest, dataset: Dataset, views: Views, path: Path, *, seed: int, threads: int = 1
) -> None:
    """Draw the views of the data set's first images, augmented by `seed`, as a PNG."""
    images = min(IMAGES, dataset.subset.images if dataset.subset else IMAGES)
    if dataset.subset is None:
        manifest = _first_shards(manifest, dataset.split, images)
    with Loader(manifest, dataset, views, batch_size=images, seed=seed, shuffle=False, threads=threads) as few:
        draw_views(few.next(), views, path, mean=manifest.mean, std=manifest.std)


def _first_shards(manifest: Manifest, name: str, images: int) -> Manifest:
    """Return the manifest with only the first shards of a split that hold so many images.

    DALI reads the index of every shard: half a minute and 6 GB for 14 million images (docs/benchmarks.md#size).
    """
    split = manifest.split(name)
    count = total = 0
    while total < images and count < len(split.shards):
        total += split.shards[count].images
        count += 1
    first = split.model_copy(update={"images": total, "shards": split.shards[:count]})
    return manifest.model_copy(update={"splits": {name: first}})


def draw_views(
    batch: Batch, views: Views, path: Path, *, mean: Sequence[float], std: Sequence[float], images: int = IMAGES
) -> None:
    """Draw the first `images` of a batch as a PNG; `mean` and `std` (of pixels in 0..1) undo the normalisation."""
    count = min(images, len(batch.labels))
    largest = max(view.size for view in views.values())
    sides = {group: CELL * max(0.5, view.size / largest) for group, view in views.items()}
    heights = {group: HEADER + view.count * (sides[group] + GAP) for group, view in views.items()}
    column_width = max(sides.values()) + GAP
    width = count * column_width - GAP + 2 * MARGIN
    height = sum(heights.values()) + MARGIN
    figure = Figure(figsize=(width, height), dpi=110, facecolor="white")
    top = height
    for group, view in views.items():
        _title(figure, group, view, top)
        for index, seen in enumerate(batch.views[group]):
            bottom = top - HEADER - (index + 1) * (sides[group] + GAP) + GAP
            for column, pixels in enumerate(_pixels(seen[:count], mean, std)):
                left = MARGIN + column * column_width
                axes = figure.add_axes((left / width, bottom / height, sides[group] / width, sides[group] / height))
                axes.imshow(pixels, interpolation="nearest")  # without smoothing
                axes.set_axis_off()
        top -= heights[group]
    FigureCanvasAgg(figure)
    with atomic(path) as temporary:
        figure.savefig(temporary, format="png", metadata={"Software": None})


def _pixels(images: torch.Tensor, mean: Sequence[float], std: Sequence[float]) -> np.ndarray:
    """Undo the normalisation of (rows, 3, size, size); return (rows, size, size, 3) in 0..1."""
    images = images.detach().float().cpu().permute(0, 2, 3, 1)
    return (images * torch.tensor(std) + torch.tensor(mean)).clamp(0, 1).numpy()


def _title(figure: Figure, group: str, view: View, top: float) -> None:
    """Write the name of a group above it and, in small print, its size, crop, augmentation and networks."""
    width, height = figure.get_figwidth(), figure.get_figheight()
    crop = "center" if view.crop == "center" else f"area {view.area[0]:g}-{view.area[1]:g}"
    parts = [f"{view.size} px, {crop}", _augmentation_name(view.augmentation)]
    if view.seen_by != (group,):
        parts.append("seen by " + ", ".join(view.seen_by))
    small = "\n".join(textwrap.wrap("; ".join(parts), width=max(12, int((width - 2 * MARGIN) / 0.062)))[:2])
    left = MARGIN / width
    figure.text(left, (top - 0.12) / height, group, fontsize=10, fontweight="bold", va="top", ha="left")
    figure.text(left, (top - 0.31) / height, small, fontsize=7, color="0.35", va="top", ha="left")


def _augmentation_name(augmentation: Augmentation) -> str:
    """Return the policy's name, or for an unnamed policy the augmentations in use."""
    for name, policy in POLICIES.items():
        if policy == augmentation:
            return name
    parts = ("flip", "jitter", "grayscale", "blur", "solarize", "randaugment")
    return ", ".join(name for name in parts if getattr(augmentation, name) > 0)
