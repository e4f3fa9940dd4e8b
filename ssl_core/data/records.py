"""The records that every kind of source returns. Torch-free."""

import os
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
from PIL import Image


class Record(NamedTuple):
    """One image of a source: a name for messages, the bytes of its file or its pixels, and its label.

    The label is -1 if there is none. A multi-label image has the label -1 and one byte per class in `labels`
    (`multilabels.py`).
    """

    name: str
    image: bytes | Image.Image
    label: int
    labels: bytes | None = None
    boxes: bytes | None = None  # of `boxes.Annotation.encode`


class SourceSplit(NamedTuple):
    """A split of a source. Images are read by index, in any order and from any process."""

    size: int
    name: Callable[[int], str]  # works even if `read` fails
    read: Callable[[int], Record]
    identity: str  # equal for equal content
    unread: Mapping[str, int] = MappingProxyType({})  # pictures whose format is not read, by extension
    labels: np.ndarray | None = None  # label id of each image, if they are known before the images are read


class OpenSource(NamedTuple):
    """An open source: the class names in the order of the label ids (None: no names) and the splits by name."""

    classes: tuple[str, ...] | None
    splits: dict[str, SourceSplit]


def printable(name: str) -> str:
    """Return a file name as valid UTF-8; bytes that are not UTF-8 become backslash escapes."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")
