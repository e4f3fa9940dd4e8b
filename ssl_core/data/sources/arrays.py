"""Arrays of images and labels in an .npz file, as MedMNIST and Keras distribute data sets. Torch-free."""

import hashlib
import shutil
import tempfile
import zipfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ssl_core.config import nearest
from ssl_core.data.card import Arrays, ArraysSplit, Card
from ssl_core.data.records import OpenSource, Record, SourceSplit
from ssl_core.data.sources.file_list import File, Files
from ssl_core.data.sources.file_tree import ABSENT, stamp
from ssl_core.data.sources.labelled_files import LabelledFiles, Targets, number_classes, parse_target
from ssl_core.files import room_for
from ssl_core.mistakes import excerpt


def open_arrays(source: Arrays, card: Card, scratch: Path, stack: ExitStack) -> OpenSource:
    """List the images of each split; `stack` closes the copies of the arrays."""
    path = Path(source.path)
    if not path.is_file():
        raise ValueError(f"{path} {'is a folder' if path.is_dir() else ABSENT}")
    try:
        archive = stack.enter_context(zipfile.ZipFile(path))
    except zipfile.BadZipFile as error:
        raise ValueError(f"{path} is not an .npz file ({excerpt(error)}): get it again") from None
    arrays = Npz(path, archive, scratch, stack)
    images, splits = {}, {}
    for name, split in source.splits.items():
        images[name] = arrays.images(split.images.replace("{split}", name))
        splits[name] = _list_split(arrays, split, name, len(images[name]), scratch)
    opened = number_classes(card, splits)
    return OpenSource(opened.classes, {name: _with_images(opened.splits[name], images[name]) for name in images})


class Npz:
    """The arrays of an .npz file, each copied into an unlinked temporary file, so that memory does not hold them."""

    def __init__(self, path: Path, archive: zipfile.ZipFile, scratch: Path, stack: ExitStack) -> None:
        self.path = path
        self._archive, self._scratch, self._stack = archive, scratch, stack

    def images(self, name: str) -> np.ndarray:
        """Return images as (images, height, width) or (images, height, width, 3 or 4) of bytes."""
        array = self.array(name)
        if array.ndim == 4 and array.shape[3] not in (1, 3, 4) and array.shape[1] in (1, 3, 4):
            array = array.transpose(0, 2, 3, 1)  # channels first
        channels = array.shape[3] if array.ndim == 4 else 1
        if array.ndim not in (3, 4) or channels not in (1, 3, 4) or array.dtype != np.uint8:
            expected = "(images, height, width) or (images, height, width, 3) of uint8"
            raise ValueError(f"{self.path}: {name!r} is {array.shape} of {array.dtype}: expected {expected}")
        return array[..., 0] if array.ndim == 4 and channels == 1 else array

    def labels(self, name: str, count: int) -> list[Any]:
        """Return one label for each of `count` images."""
        array = self.array(name)
        if array.shape not in ((count,), (count, 1)):
            raise ValueError(f"{self.path}: {name!r} is {array.shape}: expected one label for each of {count} images")
        labels = np.asarray(array).reshape(-1)
        if labels.dtype.kind == "S":
            labels = labels.astype(str)
        elif labels.dtype.kind == "f" and np.array_equal(labels, np.round(labels)):
            labels = labels.astype(np.int64)
        return labels.tolist()

    def array(self, name: str) -> np.ndarray:
        """Return an array by its name; raise a one-line `ValueError` if it is missing or damaged."""
        names = [member.removesuffix(".npy") for member in self._archive.namelist()]
        if name not in names:
            raise ValueError(f"{self.path} has no array {name!r}{excerpt(nearest(name, names))}")
        file = self._stack.enter_context(tempfile.TemporaryFile(dir=self._scratch))  # noqa: SIM115 - closed by the stack
        try:
            with room_for(self._scratch), self._archive.open(f"{name}.npy") as packed:
                shutil.copyfileobj(packed, file, 1 << 22)
                file.flush()
            file.seek(0)
            version = np.lib.format.read_magic(file)
            read_header = np.lib.format.read_array_header_1_0
            if version != (1, 0):
                read_header = np.lib.format.read_array_header_2_0
            shape, is_fortran, dtype = read_header(file)
            if dtype.hasobject:
                raise ValueError("it holds Python objects")
            if 0 in shape:
                raise ValueError("it is empty")
            return np.memmap(file, dtype, "r", file.tell(), shape, "F" if is_fortran else "C")
        except (zipfile.BadZipFile, ValueError, EOFError) as error:
            raise ValueError(f"{self.path}: {name!r} cannot be read: {excerpt(error)}") from None


def _list_split(arrays: Npz, split: ArraysSplit, name: str, count: int, scratch: Path) -> LabelledFiles:
    targets = Targets()
    labels = [None] * count
    if split.labels is not None:
        labels = arrays.labels(split.labels.replace("{split}", name), count)
    for index, label in enumerate(labels):
        target = None if label is None else parse_target(label)
        if target == "":
            raise ValueError(f"{arrays.path}: label {index} of {name!r} is empty or NaN: correct the labels")
        targets.add(target)
    files = Files((File(f"{arrays.path.name}/{name}[{index}]") for index in range(count)), scratch)
    return LabelledFiles(files, targets, _unread, hashlib.sha256(stamp(arrays.path)).hexdigest())


def _unread(file: File) -> bytes:
    raise AssertionError(file)  # `_with_images` replaces the reader


def _with_images(split: SourceSplit, images: np.ndarray) -> SourceSplit:
    labels = split.labels
    assert labels is not None

    def read(index: int) -> Record:
        return Record(split.name(index), Image.fromarray(np.array(images[index])), int(labels[index]))

    return split._replace(read=read)
