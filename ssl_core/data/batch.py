"""A batch of views, and a source of batches; importing this needs no DALI."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


@dataclass
class Batch:
    """The views of one batch of images, with their labels and indices."""

    views: dict[str, list[Tensor]]  # group -> `count` tensors (batch, 3, size, size), normalised float32, channels_last
    labels: Tensor  # (batch,) int64, -1 where unknown
    indices: Tensor  # (batch,) int64, 0..num_images - 1: the position in the sorted subset or split


class BatchSource(Protocol):
    """The part of `Loader` that methods use to prepare their memory before training."""

    @property
    def normalisation(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and standard deviation per channel, of pixels in 0..1."""
        ...

    def epoch(self) -> Iterator[Batch]:
        """Iterate over one whole epoch."""
        ...
