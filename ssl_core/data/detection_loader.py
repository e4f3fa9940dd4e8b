"""Images of different sizes with their boxes and masks, read from the shards for detectors.

Everything random is drawn from the seed and the position in the stream of images, so that neither the number of threads
nor of processes changes a batch, and the position alone continues a run.
"""

import io
import json
import os
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torchvision.transforms.v2 import functional
from torchvision.tv_tensors import BoundingBoxes, Mask

from ssl_core.config import Dataset
from ssl_core.data.boxes import check_boxes
from ssl_core.data.loader import draw_subset
from ssl_core.data.shards import BOXES, Manifest, member_position, read_index, sample_index, verify

AHEAD = 3  # batches that are prepared in advance
SEEDS = 2**62  # range of the seeds of an image's proposals


@dataclass(frozen=True, kw_only=True)
class Transform:
    """A random short side, or less where the long one would exceed `longest`, and random flips."""

    short_sides: tuple[int, ...]
    longest: int
    flip: float = 0.0


class Batch(NamedTuple):
    """Images as uint8 (3, height, width), and for each its target, index, seed and original (height, width).

    A target has boxes (n, 4), labels (n,) from 1, crowd (n,), area (n,) and, if the loader reads masks, masks (n,
    height, width). In training it refers to the resized image, in evaluation to the original one.
    """

    images: list[Tensor]
    targets: list[dict[str, Tensor]]
    indices: list[int]
    seeds: list[int]
    original_sizes: list[tuple[int, int]]


class _Place(NamedTuple):
    """The image and the boxes of a sample: their tar and their offsets and sizes in it."""

    tar: Path
    image: tuple[int, int]
    boxes: tuple[int, int]


class DetectionLoader:
    """Batches of a split. With `training` they are an endless shuffled stream, else one pass in order.

    In training, crowds are no targets, and images without other objects are left out. Difficult objects count in
    training; in evaluation they are crowds, so that detecting them is neither right nor wrong.
    """

    def __init__(
        self,
        manifest: Manifest,
        dataset: Dataset,
        transform: Transform,
        *,
        batch_size: int,
        training: bool,
        masks: bool,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        threads: int = 1,
    ) -> None:
        """Find the samples; `batch_size` is that of all processes together.

        Raises `ValueError` for shards without boxes or masks, and for too few images.
        """
        verify(manifest, dataset.split)
        check_boxes(manifest, dataset.split)
        self.batch_size, self.training, self.masks, self.transform = batch_size, training, masks, transform
        self.step = 0
        self._seed, self._rank, self._world_size, self._threads = seed, rank, world_size, threads
        self._places = _find_places(manifest, dataset)
        self._files = {place.tar: os.open(place.tar, os.O_RDONLY) for place in self._places.values()}
        if training:
            self._places = {number: place for number, place in self._places.items() if self._trains(place)}
        self._indices = sorted(self._places)
        self.num_images = len(self._indices)
        if training and self.num_images < batch_size:
            raise ValueError(
                f"{dataset.name}/{dataset.split} has {self.num_images} images with objects, fewer than a batch of "
                f"{batch_size}: lower batch_size"
            )
        self._pool = ThreadPoolExecutor(threads)
        self._waiting: deque[list[Future[Any]]] = deque()
        self._order: tuple[int, np.ndarray] = (-1, np.zeros(0))  # the last epoch and its permutation

    def __enter__(self) -> "DetectionLoader":
        return self

    def __exit__(self, *error: object) -> None:
        self._pool.shutdown(cancel_futures=True)
        for descriptor in self._files.values():
            with suppress(OSError):
                os.close(descriptor)

    def next(self) -> Batch:
        """Return this process's part of the next batch of the training stream."""
        while len(self._waiting) < AHEAD:
            first = (self.step + len(self._waiting)) * self.batch_size
            each = self.batch_size // self._world_size
            positions = range(first + self._rank * each, first + (self._rank + 1) * each)
            self._waiting.append([self._pool.submit(self._draw, position) for position in positions])
        batch = self._waiting.popleft()
        self.step += 1
        return _join([future.result() for future in batch])

    def epoch(self) -> Iterator[Batch]:
        """Iterate over the images in order, without flips, at the first of the short sides."""
        indices = iter(self._indices)
        waiting: deque[Future[Any]] = deque()
        batch = []
        for number in indices:
            waiting.append(self._pool.submit(self._read, number, self.transform.short_sides[0], False, 0))
            if len(waiting) >= AHEAD * self.batch_size:
                batch.append(waiting.popleft().result())
            if len(batch) == self.batch_size:
                yield _join(batch)
                batch = []
        while waiting:
            batch.append(waiting.popleft().result())
            if len(batch) == self.batch_size or not waiting:
                yield _join(batch)
                batch = []

    def state(self) -> dict[str, Any]:
        """Return the position in the stream."""
        return {"step": self.step}

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from `state()`."""
        self.step = state["step"]
        self._waiting.clear()

    def _draw(self, position: int) -> Any:
        """Read the image at a position of the stream with its random size and flip."""
        epoch, place = divmod(position, self.num_images)
        generator = np.random.default_rng((self._seed, position))
        side = int(generator.choice(self.transform.short_sides))
        flipped = generator.random() < self.transform.flip
        return self._read(self._permuted(epoch, place), side, flipped, int(generator.integers(SEEDS)))

    def _permuted(self, epoch: int, place: int) -> int:
        last, order = self._order
        if last != epoch:
            order = np.random.default_rng((self._seed, epoch, 1)).permutation(self.num_images)
            self._order = (epoch, order)
        return self._indices[order[place]]

    def _read(self, number: int, side: int, flipped: bool, seed: int) -> Any:
        """Return image, target, index, seed and original size of a sample."""
        place = self._places[number]
        with Image.open(io.BytesIO(self._bytes(place.tar, place.image))) as stored:
            image = functional.pil_to_tensor(ImageOps.exif_transpose(stored).convert("RGB"))
        original = (image.shape[1], image.shape[2])
        target = self._target(place, original)
        options: dict[str, Any] = {"size": [side], "max_size": self.transform.longest}
        image = functional.resize(image, **options)
        if self.training:
            target |= {key: functional.resize(target[key], **options) for key in RESIZED if key in target}
        if flipped:
            image = functional.horizontal_flip(image)
            target |= {key: functional.horizontal_flip(target[key]) for key in RESIZED if key in target}
        plain = {key: value.as_subclass(Tensor) for key, value in target.items()}
        return image, plain, number, seed, original

    def _target(self, place: _Place, size: tuple[int, int]) -> dict[str, Any]:
        objects = json.loads(self._bytes(place.tar, place.boxes))["objects"]
        if self.training:
            objects = [each for each in objects if not each.get("crowd")]
        boxes = torch.tensor([each["box"] for each in objects], dtype=torch.float32).reshape(-1, 4)
        areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
        ignored = [bool(each.get("crowd") or each.get("difficult")) for each in objects]
        target: dict[str, Any] = {
            "boxes": BoundingBoxes(boxes, format="XYXY", canvas_size=size),  # pyright: ignore[reportCallIssue]
            "labels": torch.tensor([each["label"] + 1 for each in objects], dtype=torch.int64),
            "crowd": torch.tensor(ignored, dtype=torch.bool),
            "area": torch.tensor([each.get("area", area) for each, area in zip(objects, areas.tolist(), strict=True)]),
        }
        if self.masks:
            target["masks"] = Mask(_decode_masks(objects, size))
        return target

    def _trains(self, place: _Place) -> bool:
        objects = json.loads(self._bytes(place.tar, place.boxes))["objects"]
        return any(not each.get("crowd") for each in objects)

    def _bytes(self, tar: Path, part: tuple[int, int]) -> bytes:
        offset, size = part
        return os.pread(self._files[tar], size, offset)


RESIZED = ("boxes", "masks")  # parts of a target that change with the image


def _find_places(manifest: Manifest, dataset: Dataset) -> dict[int, _Place]:
    """Return the places of the samples of a data set, or of its subset, by their index in the split."""
    split = manifest.split(dataset.split)
    chosen = None
    if dataset.subset is not None:
        chosen = set(draw_subset(split.images, dataset.subset, f"{dataset.name}/{dataset.split}").tolist())
    places = {}
    for tar in manifest.tars(dataset.split):
        for fields in read_index(tar):
            number = sample_index(fields)
            if chosen is None or number in chosen:
                position = member_position(fields, BOXES)
                assert position is not None, f"{tar} has no member {BOXES}"
                places[number] = _Place(tar, _extent(fields, 0), _extent(fields, position))
    return places


def _extent(fields: list[str], position: int) -> tuple[int, int]:
    return int(fields[4 * position + 1]), int(fields[4 * position + 2])


def _decode_masks(objects: list[dict[str, Any]], size: tuple[int, int]) -> Tensor:
    from pycocotools import mask as codec

    if not objects:
        return torch.zeros(0, *size, dtype=torch.uint8)
    missing = [each for each in objects if "mask" not in each]
    if missing:
        raise ValueError("some objects have no mask: set `masks: false`, or use annotations with masks")
    return torch.from_numpy(np.stack([codec.decode(each["mask"]) for each in objects]))


def _join(samples: list[Any]) -> Batch:
    return Batch(*map(list, zip(*samples, strict=True)))
