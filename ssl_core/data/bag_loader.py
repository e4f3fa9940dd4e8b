"""Batches of pairs: an image and one of its neighbours, which is drawn anew in each epoch (docs/decisions, 18).

A neighbour may be in any shard, so both images are read by their offsets, in an order that the run's seed permutes.
"""

import functools
import hashlib
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ssl_core.config import Dataset
from ssl_core.data import pipeline
from ssl_core.data.loader import Loader
from ssl_core.data.shards import Manifest
from ssl_core.data.views import Views
from ssl_core.provenance import file_digest

PREFIX = "neighbour_"  # of the groups of views that show the neighbour
# In a line of an index: offset and size of the image, dataset index, offset of label and dataset index.
PLACE = re.compile(r"^\S+ (\d+) (\d+) (\d{8})\S+ meta\.i64 (\d+) ", re.MULTILINE)
META_BYTES = 16


class BagLoader(Loader):
    """A shuffling `Loader` whose groups `neighbour_*` are views of an image from the bag of the batch's image.

    Labels and indices are those of the image, not of its neighbour. Raises `ValueError` for bags of another data set.
    """

    def __init__(self, manifest: Manifest, dataset: Dataset, views: Views, *, bags: Path, **options: Any) -> None:
        """Prepare the loader; `bags` is the file of the stage `bags`, `options` are those of `Loader`."""
        super().__init__(manifest, dataset, views, **options)
        table = _load(bags, self.num_images)
        self._content.append(file_digest(bags))
        places = np.zeros((self.num_images, 4), dtype=np.int64)
        position = None if self._position is None else self._position.numpy()
        for number, index in enumerate(self._plan.indices):
            found = PLACE.findall(Path(index).read_text(encoding="ascii"))
            offset, size, image, meta = np.array(found, dtype=np.int64).T
            rows = image if position is None else position[image]
            places[rows] = np.stack([np.full(len(rows), number), offset, size, meta], axis=1)
        self._read = _Pairs(self._plan, places, table, batch_size=self.batch_size, runs=self._runs_per_epoch)
        self._neighbours = tuple(group for group in views if group.startswith(PREFIX))

    @functools.cached_property
    def _identity(self) -> dict[str, Any]:
        options: dict[str, Any] = {"batch_size": self.batch_size, "num_threads": 1, "device_id": None, "seed": 0}
        graph = pipeline.pair_graph(self._plan, self._read, self._neighbours, **options).serialize()
        return {**super()._identity, "graph": hashlib.sha256(graph).hexdigest()}

    def _run(self) -> Any:
        if self._pipeline is None:
            self._pipeline = pipeline.build_pairs(
                self._plan,
                self._read,
                self._neighbours,
                batch_size=self.batch_size,
                threads=self._threads,
                device_id=torch.cuda.current_device() if self._plan.gpu else None,
                checkpoint=self._checkpoint,
            )
        return super()._run()


class _Pairs:
    """Reads the files of a batch of pairs; the number of the run decides which."""

    def __init__(
        self, plan: pipeline.Plan, places: np.ndarray, bags: np.ndarray, *, batch_size: int, runs: int
    ) -> None:
        self.plan, self.places, self.bags, self.batch_size, self.runs = plan, places, bags, batch_size, runs
        self._part: tuple[int, np.ndarray] = (-1, np.zeros(0))  # the last epoch and its images

    def __call__(self, info: Any) -> tuple[list[np.ndarray], list[np.ndarray], list[np.ndarray]]:
        """Return the images' files, their neighbours' files, and the images' labels and dataset indices."""
        epoch, run = divmod(info.iteration, self.runs)
        part = self._images_of(epoch)
        numbers = np.arange(run * self.batch_size, (run + 1) * self.batch_size)
        rows = part[numbers % len(part)]  # the incomplete batch at the end of an epoch is filled up and dropped
        generator = np.random.default_rng([self.plan.seed_of("neighbour"), info.iteration])
        drawn = generator.integers(self.bags.shape[1], size=len(rows))
        files, metas = self._files(rows)
        neighbours, _ = self._files(self.bags[rows, drawn])
        return files, neighbours, metas

    def _images_of(self, epoch: int) -> np.ndarray:
        """Return this rank's part of an epoch's permutation."""
        last, part = self._part
        if last != epoch:
            plan, images = self.plan, len(self.places)
            order = np.random.default_rng([plan.seed, epoch]).permutation(images)
            start, end = (images * rank // plan.world_size for rank in (plan.rank, plan.rank + 1))
            part = order[start:end]
            self._part = (epoch, part)
        return part

    def _files(self, rows: np.ndarray) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """Return the files of images, and label and dataset index of each; both are next to each other in the tar."""
        files, metas = [], []
        for tar, offset, size, meta in self.places[rows].tolist():
            descriptor = os.open(self.plan.tars[tar], os.O_RDONLY)
            try:
                content = os.pread(descriptor, meta + META_BYTES - offset, offset)
            finally:
                os.close(descriptor)
            files.append(np.frombuffer(content, np.uint8, count=size))
            metas.append(np.frombuffer(content[meta - offset :], "<i8", count=2))
        return files, metas


def _load(path: Path, images: int) -> np.ndarray:
    """Return the rows of each image's neighbours (images, bag size); they stay on disk."""
    table = np.load(path, mmap_mode="r")
    if table.shape[0] != images or not 0 <= table.min() <= table.max() < images:
        raise ValueError(f"{path} has the bags of {len(table)} images, expected {images}: remove it and run again")
    return table
