"""Small data sets of coloured rectangles in the official layouts of PASCAL VOC and COCO."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml
from PIL import Image

CLASSES = ("blue", "green", "red")
COLOURS = {"red": (220, 40, 40), "green": (40, 220, 40), "blue": (40, 40, 220)}


class Rectangle(NamedTuple):
    name: str
    box: tuple[int, int, int, int]  # left, top, right, bottom; the right and bottom pixels are outside


def draw(number: int, size: tuple[int, int] = (64, 48)) -> tuple[Image.Image, list[Rectangle]]:
    """Return image `number` and its rectangles: one to three, which may overlap."""
    generator = np.random.default_rng(number)
    pixels = generator.normal(110, 12, (size[1], size[0], 3))
    rectangles = []
    for _ in range(1 + number % 3):
        name = CLASSES[generator.integers(3)]
        width, height = (int(side) for side in generator.integers(12, 28, 2))
        left, top = int(generator.integers(size[0] - width)), int(generator.integers(size[1] - height))
        pixels[top : top + height, left : left + width] = COLOURS[name]
        rectangles.append(Rectangle(name, (left, top, left + width, top + height)))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8)), rectangles


def write_voc(folder: Path, lists: Mapping[str, Iterable[int]], *, size: tuple[int, int] = (64, 48)) -> Path:
    """Write a year of VOC; image i is `00000i.jpg`. The last object of each fifth image is difficult."""
    for part in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    for name, numbers in lists.items():
        (folder / f"ImageSets/Main/{name}.txt").write_text("".join(f"{number:06d}\n" for number in numbers))
        for number in numbers:
            image, rectangles = draw(number, size)
            image.save(folder / f"JPEGImages/{number:06d}.jpg", quality=95)
            objects = "".join(_voc_object(rectangle, number % 5 == 0) for rectangle in rectangles)
            shape = f"<size><width>{size[0]}</width><height>{size[1]}</height><depth>3</depth></size>"
            (folder / f"Annotations/{number:06d}.xml").write_text(f"<annotation>{shape}{objects}</annotation>")
    return folder


def _voc_object(rectangle: Rectangle, difficult: bool) -> str:
    left, top, right, bottom = rectangle.box
    corners = f"<xmin>{left + 1}</xmin><ymin>{top + 1}</ymin><xmax>{right}</xmax><ymax>{bottom}</ymax>"
    flags = f"<difficult>{int(difficult)}</difficult>"
    return f"<object><name>{rectangle.name}</name>{flags}<bndbox>{corners}</bndbox></object>"


def coco_content(numbers: Iterable[int], *, size: tuple[int, int] = (64, 48)) -> dict[str, Any]:
    """Return the file of instances, with polygons as masks."""
    images, annotations = [], []
    for number in numbers:
        images.append({"id": number, "file_name": f"{number:012d}.jpg", "width": size[0], "height": size[1]})
        for rectangle in draw(number, size)[1]:
            left, top, right, bottom = rectangle.box
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": number,
                    "category_id": 1 + CLASSES.index(rectangle.name),
                    "bbox": [left, top, right - left, bottom - top],
                    "area": (right - left) * (bottom - top),
                    "iscrowd": 0,
                    "segmentation": [[left, top, right, top, right, bottom, left, bottom]],
                }
            )
    categories = [{"id": number + 1, "name": name} for number, name in enumerate(CLASSES)]
    return {"images": images, "annotations": annotations, "categories": categories}


def write_coco(folder: Path, splits: Mapping[str, Iterable[int]], *, size: tuple[int, int] = (64, 48)) -> Path:
    """Write the layout of COCO 2017, for example with the splits train and val."""
    (folder / "annotations").mkdir(parents=True, exist_ok=True)
    for name, numbers in splits.items():
        (folder / f"{name}2017").mkdir()
        for number in numbers:
            draw(number, size)[0].save(folder / f"{name}2017/{number:012d}.jpg", quality=95)
        write_instances(folder, name, coco_content(numbers, size=size))
    return folder


def write_instances(folder: Path, split: str, content: Any) -> None:
    (folder / f"annotations/instances_{split}2017.json").write_text(json.dumps(content))


def write_card(path: Path, source: Mapping[str, Any], **keys: Any) -> Path:
    """Write a card of the name of its file."""
    card = {"name": path.stem, "source": source, "image_size": 64, "mean": [0.5] * 3, "std": [0.25] * 3}
    path.write_text(yaml.safe_dump(card | keys))
    return path


def coco_source(folder: Path, *splits: str) -> dict[str, Any]:
    sections = {
        name: {"folder": f"{name}2017", "annotations": f"annotations/instances_{name}2017.json"} for name in splits
    }
    return {"type": "coco", "path": str(folder), "splits": sections}
