"""Images that show several classes at once: how that stands in the shards, and how it is read back. Torch-free.

The sample of such an image has the label -1, so that whatever needs one label an image refuses it, and a third member,
`00000042.labels.u8`: a byte a class, in the order of the manifest's classes. It goes where its image goes (shuffled,
left out, renumbered), and the manifest covers it by the tar's sha256. DALI reads the members it is asked for only.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np

from ssl_core.data import shards
from ssl_core.data.shards import Manifest, Shard, ShardWriter
from ssl_core.files import atomic

LABELS = "labels.u8"
ABSENT, PRESENT, DIFFICULT = 0, 1, 2  # difficult: only objects that the annotators marked so (VOC)


class LabelWriter(ShardWriter):
    """A shard's writer that also takes a byte a class in the place of one label."""

    def add_labels(self, number: int, extension: str, image: bytes, labels: bytes) -> None:
        """Append the image with dataset index `number` and what it shows of each class."""
        self.add(number, extension, image, -1)
        self._lines[-1] += " " + self._member(f"{number:08d}", LABELS, labels)


@contextmanager
def new_shard(path: Path) -> Iterator[LabelWriter]:
    """Give a writer; when its block ends well the index and then the tar appear by rename, else neither does."""
    with ExitStack() as stack:
        tar = stack.enter_context(atomic(path))
        writer = LabelWriter(tar, stack.enter_context(atomic(path.with_suffix(".idx"))), name=path.name)
        stack.callback(writer.abandon)
        yield writer


def renumber(path: Path, indices: Sequence[int]) -> Shard:
    """Write a shard, of one label an image or of several, again with these dataset indices in the images' order."""
    if not _has_labels(path):
        return shards.renumber(path, indices)
    with new_shard(path) as writer, open(path, "rb") as tar:
        for index, fields in zip(indices, _lines(path), strict=True):
            image, labels = (os.pread(tar.fileno(), int(fields[at + 1]), int(fields[at])) for at in (1, 9))
            writer.add_labels(index, fields[0], image, labels)
        return writer.close()


def has_labels(manifest: Manifest, split: str) -> bool:
    """Tell whether the images of a split have several labels each."""
    first = manifest.tars(split)[0]
    return first.with_suffix(".idx").is_file() and _has_labels(first)


def read_labels(manifest: Manifest, split: str) -> np.ndarray:
    """Return (images, classes) uint8 of ABSENT, PRESENT and DIFFICULT in the order of the images' indices.

    The images are not read. The split must be one that `has_labels`.
    """
    assert manifest.classes is not None
    labels = np.zeros((manifest.split(split).images, len(manifest.classes)), np.uint8)
    for path in manifest.tars(split):
        with open(path, "rb") as tar:
            for fields in _lines(path):
                labels[_index(fields)] = np.frombuffer(os.pread(tar.fileno(), int(fields[10]), int(fields[9])), "u1")
    return labels


def _has_labels(path: Path) -> bool:
    return next(_lines(path), [])[8:9] == [LABELS]  # none: no image of it could be used


def _lines(path: Path) -> Iterator[list[str]]:
    """Yield what the index says of each sample: extension, offset, size and name, once for each of its members."""
    with open(path.with_suffix(".idx"), encoding="ascii") as index:
        next(index)
        for line in index:
            yield line.split()


def _index(fields: list[str]) -> int:
    return int(fields[3][:8])
