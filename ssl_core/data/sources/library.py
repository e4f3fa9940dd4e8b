"""Splits of data sets that a Python library provides: images by index, without files."""

import hashlib
from collections.abc import Callable

from PIL import Image

from ssl_core.data.records import Record, SourceSplit

HASHED = 64  # about this many images of a split are hashed to detect a changed data set

GetImage = Callable[[int], tuple[bytes | Image.Image, int]]  # index -> image, label


def library_split(name: str, size: int, get: GetImage) -> SourceSplit:
    """Return a split of `size` images; its identity is a hash of some of them, since they have no modification time."""

    def name_of(index: int) -> str:
        return f"{name}[{index}]"

    def read(index: int) -> Record:
        image, label = get(index)
        return Record(name_of(index), image, label)

    return SourceSplit(size, name_of, read, _identity(size, get))


def _identity(size: int, get: GetImage) -> str:
    digest = hashlib.sha256(str(size).encode())
    for index in range(0, size, max(1, size // HASHED)):
        try:
            image, label = get(index)
            content = image if isinstance(image, bytes) else image.tobytes()
        except (OSError, ValueError) as error:  # a broken image: sharding reports it, or skips it (on_error)
            content, label = b"", error
        digest.update(content)
        digest.update(str(label).encode())
    return digest.hexdigest()
