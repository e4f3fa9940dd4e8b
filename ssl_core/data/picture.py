"""The picture of what each network sees: one row an image, one column a view."""

import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from ssl_core.data.loader import Batch
from ssl_core.data.views import POLICIES, Augmentation, View, Views
from ssl_core.files import atomic

CELL = 1.45  # inches of the largest view; others are smaller, but never less than half of it
GAP = 0.22  # inches between groups


def draw_views(
    batch: Batch, views: Views, path: Path, *, mean: Sequence[float], std: Sequence[float], rows: int = 8
) -> None:
    """Draw the first `rows` images of a batch as a PNG; `mean` and `std` (of pixels in 0..1) undo the normalisation."""
    columns = [(group, index) for group, view in views.items() for index in range(view.count)]
    rows = min(rows, len(batch.labels))
    largest = max(view.size for view in views.values())
    widths = [CELL * max(0.5, views[group].size / largest) for group, _ in columns]
    lefts = [sum(widths[:k]) + 0.06 * k + GAP * _groups_before(columns, k) for k in range(len(columns))]
    margin, header, cell = 0.2, 0.9, max(widths) + 0.06
    width, height = lefts[-1] + widths[-1] + 2 * margin, rows * cell + header + margin
    figure = Figure(figsize=(width, height), dpi=110, facecolor="white")
    for (group, index), left, side in zip(columns, lefts, widths, strict=True):
        pixels = _pixels(batch.views[group][index][:rows], mean, std)
        for row in range(rows):
            bottom = height - header - (row + 1) * cell + (cell - side) / 2
            place = ((margin + left) / width, bottom / height, side / width, side / height)
            axes = figure.add_axes(place)
            axes.imshow(pixels[row], interpolation="nearest")  # 16 px are shown as 16 px
            axes.set_axis_off()
    for group, view in views.items():
        of_group = [k for k, (name, _) in enumerate(columns) if name == group]
        left, right = lefts[of_group[0]], lefts[of_group[-1]] + widths[of_group[-1]]
        _title(figure, group, view, (margin + left) / width, (margin + right) / width, 1 - header / height)
    FigureCanvasAgg(figure)
    with atomic(path) as temporary:
        figure.savefig(temporary, format="png", metadata={"Software": None})


def _groups_before(columns: Sequence[tuple[str, int]], column: int) -> int:
    return len({group for group, _ in columns[: column + 1]}) - 1


def _pixels(images: torch.Tensor, mean: Sequence[float], std: Sequence[float]) -> np.ndarray:
    """Undo the normalisation of (rows, 3, size, size); return (rows, size, size, 3) in 0..1."""
    images = images.detach().float().cpu().permute(0, 2, 3, 1)
    return (images * torch.tensor(std) + torch.tensor(mean)).clamp(0, 1).numpy()


def _title(figure: Figure, group: str, view: View, left: float, right: float, bottom: float) -> None:
    """Write above a group its name and, in small print, size, crop, augmentation and who sees it."""
    width, inches = figure.get_figwidth() * (right - left), figure.get_figheight()
    crop = "center" if view.crop == "center" else f"area {view.area[0]:g}-{view.area[1]:g}"
    lines = [f"{view.size} px, {crop}", _augmentation_name(view.augmentation)]
    if view.seen_by != (group,):
        lines.append("seen by " + ", ".join(view.seen_by))
    lines = [part for line in lines for part in textwrap.wrap(line, width=max(12, int(width / 0.062)))]
    figure.text(left, bottom + 0.65 / inches, group, fontsize=10, fontweight="bold", va="bottom", ha="left")
    figure.text(left, bottom + 0.61 / inches, "\n".join(lines), fontsize=7, color="0.35", va="top", ha="left")


def _augmentation_name(augmentation: Augmentation) -> str:
    """Return the policy's name, or what is switched on where it is none of the named ones."""
    for name, policy in POLICIES.items():
        if policy == augmentation:
            return name
    parts = ("flip", "jitter", "grayscale", "blur", "solarize", "randaugment")
    return ", ".join(name for name in parts if getattr(augmentation, name) > 0)
