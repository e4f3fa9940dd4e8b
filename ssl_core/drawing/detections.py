"""Test images with the boxes that a detector found, their classes and scores."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torchvision.transforms.v2 import functional
from torchvision.utils import draw_bounding_boxes

from ssl_core.files import atomic

SIDE = 320  # pixels of the longer side of an image
COLUMNS = 4
GAP = 8  # pixels around an image
COLOURS = ("#e6194b", "#3cb44b", "#4363d8", "#f58231", "#911eb4", "#008080", "#9a6324", "#808000")  # by class


def draw_detections(arrays: Mapping[str, np.ndarray], classes: Sequence[str], path: Path) -> None:
    """Write a PNG with the images `image_0`, `image_1`, ... and their `boxes_`, `labels_` (from 1) and `scores_`."""
    numbers = range(sum(key.startswith("image_") for key in arrays))
    columns = max(1, min(COLUMNS, len(numbers)))
    rows = max(1, -(-len(numbers) // columns))
    cell = SIDE + GAP
    page = Image.new("RGB", (columns * cell + GAP, rows * cell + GAP), "white")
    for number in numbers:
        image, boxes, labels, scores = (arrays[f"{key}_{number}"] for key in ("image", "boxes", "labels", "scores"))
        drawn = _draw(image, boxes, labels, scores, classes)
        page.paste(functional.to_pil_image(drawn), (GAP + number % columns * cell, GAP + number // columns * cell))
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic(path) as temporary:
        page.save(temporary, "PNG")


def _draw(
    image: np.ndarray, boxes: np.ndarray, labels: np.ndarray, scores: np.ndarray, classes: Sequence[str]
) -> torch.Tensor:
    """Return the image (3, height, width), enlarged to `SIDE`, with its boxes."""
    scale = SIDE / max(image.shape[1:])
    size = [max(1, round(side * scale)) for side in image.shape[1:]]
    enlarged = functional.resize(torch.from_numpy(image), size)
    if not len(boxes):
        return enlarged
    names = [f"{classes[int(label) - 1]} {score:.2f}" for label, score in zip(labels, scores, strict=True)]
    colours = [COLOURS[int(label) % len(COLOURS)] for label in labels]
    options: dict[str, Any] = {"colors": colours, "width": 2, "fill_labels": True, "label_colors": "white"}
    return draw_bounding_boxes(enlarged, torch.from_numpy(boxes) * scale, labels=names, **options)
