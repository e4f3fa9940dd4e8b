"""The objects of an image: boxes, classes, flags and masks, as sources return them and as shards hold them. Torch-free.

The sample of an annotated image has the member `00000042.boxes`, one JSON object:

    {"size": [640, 480], "objects": [{"box": [12.5, 30, 101, 77.5], "label": 3, "crowd": 1, "difficult": 1, "area": 914,
                                      "mask": {"size": [480, 640], "counts": "..."}}]}

Boxes are left, top, right, bottom in pixels of the stored image, upright by its EXIF orientation, and inside it. `mask`
is COCO's run-length code, whose size is height, width. `crowd` and `difficult` are left out where they are 0, `area`
and `mask` where the source has none.
"""

import io
import json
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from ssl_core.data.image_files import FORMATS, read_orientation
from ssl_core.data.shards import BOXES, Manifest, member_position, read_index, read_member, sample_index

Objects = list[dict[str, Any]]
Size = tuple[int, int]  # width, height

FAR = 10  # sides of the image
TOLERANCE = 1.0  # pixels by which the rounding of a source may take a box over the edge
CLOCKWISE = 5  # orientations of EXIF from here on exchange width and height


class Annotation(NamedTuple):
    """The objects of an image as its source describes them, and the size of the image, if the source states it.

    An object has the keys of the member, and `name` for messages. The label None is an unknown class. A mask is any of
    COCO's forms: polygons, counts, or run-length code.
    """

    size: Size | None
    objects: Objects

    def encode(self) -> bytes:
        """Return the annotation as JSON, a compact form for lists of many images."""
        return json.dumps([self.size, self.objects]).encode()


class Fitted(NamedTuple):
    """The content of the member, and the objects that are not in it."""

    member: bytes
    objects: Objects
    unused: list[tuple[str, str]]  # name and reason


def fit_objects(annotation: bytes, original: Size, stored: Size) -> Fitted:
    """Scale the objects of an image from its `original` size to the `stored` one, and check each of them.

    Raises `ValueError` if the source states another size: its boxes then refer to another image, or to this one before
    the rotation that EXIF asks for.
    """
    size, objects = json.loads(annotation)
    if size is not None and tuple(size) != original:
        raise ValueError(
            f"its annotation is for an image of {size[0]}x{size[1]} pixels, the upright image has "
            f"{original[0]}x{original[1]}: correct the annotation"
        )
    kept: Objects = []
    unused = []
    for described in objects:
        try:
            kept.append(_fit(described, original, stored))
        except ValueError as error:
            unused.append((described["name"], str(error)))
    member = json.dumps({"size": stored, "objects": kept}, separators=(",", ":")).encode()
    return Fitted(member, kept, unused)


def upright_size(content: bytes) -> Size:
    """Return the width and height of an image file as decoders show it, from its header."""
    image = Image.open(io.BytesIO(content), formats=FORMATS)
    width, height = image.size
    return (height, width) if read_orientation(image) >= CLOCKWISE else (width, height)


def read_objects(manifest: Manifest, split: str) -> list[dict[str, Any]]:
    """Return the members of a split's images in the order of their indices, without reading the images.

    Raises `ValueError` if the shards have no boxes.
    """
    check_boxes(manifest, split)
    members: list[dict[str, Any]] = [{}] * manifest.split(split).images
    for path in manifest.tars(split):
        with open(path, "rb") as tar:
            for fields in read_index(path):
                position = member_position(fields, BOXES)
                assert position is not None, f"{path} has no member {BOXES}"
                members[sample_index(fields)] = json.loads(read_member(tar, fields, position))
    return members


def check_boxes(manifest: Manifest, split: str) -> None:
    """Raise `ValueError` if the shards of a split have no boxes."""
    if manifest.split(split).objects is None:
        raise ValueError(
            f"the shards of '{manifest.dataset}' have no boxes: the card needs a source of type voc or coco; if it "
            f"has one, they are of an earlier version: remove {manifest.folder} and shard {manifest.dataset} again"
        )


def _fit(described: Mapping[str, Any], original: Size, stored: Size) -> dict[str, Any]:
    """Return an object for the member; raise `ValueError` with the reason if it cannot be used."""
    if described["label"] is None:
        raise ValueError("its class is unknown")
    scale = np.array([stored[0] / original[0], stored[1] / original[1]])
    fitted: dict[str, Any] = {"box": _fit_box(described["box"], original, scale), "label": described["label"]}
    fitted |= {flag: 1 for flag in ("crowd", "difficult") if described.get(flag)}
    if described.get("area") is not None:
        fitted["area"] = described["area"] * float(scale.prod())
    if described.get("mask"):
        fitted["mask"] = _fit_mask(described["mask"], described["box"], original, stored)
    return fitted


def _fit_box(box: Any, size: Size, scale: np.ndarray) -> list[float]:
    """Check a box (left, top, right, bottom) against the image, cut what `TOLERANCE` allows, and scale it."""
    corners = np.asarray(box, dtype=np.float64)
    shown = f"its box {np.round(corners, 2).tolist()}"
    if corners.shape != (4,) or not np.isfinite(corners).all():
        raise ValueError(f"its box {box} is not four numbers")
    if (corners[2:] <= corners[:2]).any():
        raise ValueError(f"{shown} has no area")
    limits = np.array([*size, *size])
    if (corners < -TOLERANCE).any() or (corners > limits + TOLERANCE).any():
        raise ValueError(f"{shown} is not inside the image of {size[0]}x{size[1]} pixels")
    inside = corners.clip(0, limits)
    if (inside[2:] <= inside[:2]).any():
        raise ValueError(f"{shown} has no area inside the image of {size[0]}x{size[1]} pixels")
    return (inside * np.tile(scale, 2)).tolist()


def _size_and_counts(mask: Any) -> tuple[Any, Any]:
    return (mask.get("size"), mask.get("counts")) if isinstance(mask, dict) else (None, None)


def _check_points(polygons: list[Any], size: Size) -> None:
    """Raise `ValueError` for points that are no numbers, or so far away that drawing them would exhaust the memory."""
    try:
        points = np.concatenate([np.asarray(polygon, np.float64).reshape(-1) for polygon in polygons])
    except (TypeError, ValueError):
        raise ValueError("a polygon of its mask is not a list of numbers") from None
    if not (np.abs(points) <= FAR * max(size)).all():  # also refuses NaN
        raise ValueError("a polygon of its mask is far outside of the image")


def _runs(code: str) -> list[int]:
    """Return the runs of COCO's compressed run-length code, which pycocotools decodes without checking them."""
    runs: list[int] = []
    position = 0
    while position < len(code):
        run, shift, byte = 0, 0, 0x20
        while byte & 0x20:
            byte = ord(code[position]) - 48 if position < len(code) else 0
            run |= (byte & 0x1F) << shift
            shift += 5
            position += 1
        if byte & 0x10:
            run -= 1 << shift
        runs.append(run + runs[-2] if len(runs) > 2 else run)
    return runs


def _fit_mask(mask: Any, box: list[float], original: Size, stored: Size) -> dict[str, Any]:
    """Return a mask as run-length code of the stored size."""
    from pycocotools import mask as codec  # only data sets with masks need it

    width, height = original
    code: Any
    if isinstance(mask, list):
        _check_points(mask, original)
        if any(len(polygon) < 6 or len(polygon) % 2 for polygon in mask):
            raise ValueError("a polygon of its mask is not three or more points")
        code = codec.merge(codec.frPyObjects(mask, height, width))
    else:
        size, counts = _size_and_counts(mask)
        if not isinstance(size, list) or len(size) != 2 or not isinstance(counts, list | str):
            raise ValueError("its mask is neither polygons nor a run-length code with size and counts")
        if size != [height, width]:
            raise ValueError(f"its mask has {size[1]}x{size[0]} pixels, the image {width}x{height}")
        runs = counts if isinstance(counts, list) else _runs(counts)
        if any(not isinstance(run, int) or run < 0 for run in runs) or sum(runs) != width * height:
            raise ValueError(f"the runs of its mask do not cover the image of {width}x{height} pixels")
        code = codec.frPyObjects(mask, height, width) if isinstance(counts, list) else mask
    if not codec.area(code):
        raise ValueError("its mask has no pixel")
    left, top, wide, high = codec.toBbox(code)
    after = left >= box[2] + TOLERANCE or top >= box[3] + TOLERANCE
    before = left + wide <= box[0] - TOLERANCE or top + high <= box[1] - TOLERANCE
    if after or before:
        raise ValueError("its mask is outside its box")
    if stored != original:
        pixels = Image.fromarray(codec.decode(code)).resize(stored, Image.Resampling.NEAREST)
        code = codec.encode(np.asfortranarray(pixels))
    counts = code["counts"]
    return {
        "size": [int(side) for side in code["size"]],
        "counts": counts.decode() if isinstance(counts, bytes) else counts,
    }
