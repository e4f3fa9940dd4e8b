"""Where images come from: every kind of source gives the same small record.

A source is listed first (names, labels, where the bytes lie) and then read by index, in any order and from any process:
sharding reads in a shuffled order. Torch-free until a data set of torchvision is opened.
"""

import csv
import hashlib
import inspect
import json
import operator
import os
import re
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from glob import glob
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from ssl_core.config import nearest
from ssl_core.data.card import (
    Annotations,
    Card,
    FolderSplit,
    ImageFolder,
    SklearnDigits,
    Table,
    TableSplit,
    Torchvision,
    WebDataset,
)
from ssl_core.data.image_files import EXTENSIONS, is_image
from ssl_core.data.sources.digits import Digits
from ssl_core.data.sources.file_list import File, Files
from ssl_core.data.sources.file_tree import ABSENT, Archive, Folder, stamp

MAX_CLASSES = 1_000_000  # class ids beyond are a mistake: the manifest counts each class
HASHED = 64  # images of a library's data set that are looked at to tell whether it changed, about

Target = str | int | None  # a class name, a class id, or no label


class Record(NamedTuple):
    """One image of a source: its name for messages, its file's bytes or its pixels, its label (-1: none).

    An image that may show several classes has a byte for each instead (`multilabels`).
    """

    name: str
    image: bytes | Image.Image
    label: int
    labels: bytes | None = None


class Samples(NamedTuple):
    """A split of a source, read by index; equal identities mean equal content."""

    size: int
    name: Callable[[int], str]  # known even if reading fails
    read: Callable[[int], Record]
    identity: str


class Opened(NamedTuple):
    """A source, ready to be read: class names in the order of label ids (None: unknown) and the splits."""

    classes: tuple[str, ...] | None
    splits: dict[str, Samples]


class Targets:
    """What is said of the classes of files, one after the other, four bytes each."""

    def __init__(self) -> None:
        self._codes: dict[Target, int] = {}
        self._found = array("i")

    def add(self, target: Target) -> None:
        """Say it of the next file."""
        self._found.append(self._codes.setdefault(target, len(self._codes)))

    @property
    def distinct(self) -> Iterable[Target]:
        """Whatever is said of any file."""
        return self._codes.keys()

    def labels(self, ids: Mapping[str, int]) -> np.ndarray:
        """Return the label of each file: a class name's id, a class id as it is, -1 for none."""
        ordered = [-1 if each is None else ids[each] if isinstance(each, str) else each for each in self._codes]
        return np.array(ordered, np.int64)[np.array(self._found, np.int32)]


class Listing(NamedTuple):
    """Images that are files somewhere, what is said of their classes, and how to get a file's bytes."""

    files: Files
    targets: Targets
    fetch: Callable[[File], bytes]
    stamp: str  # changes when the content changes


@contextmanager
def open_source(card: Card, *, scratch: Path) -> Iterator[Opened]:
    """List a card's source; `scratch` is where lists and a compressed tar are held while it is read.

    Raises a one-line `ValueError` if the source is missing, empty, corrupt or not what the card says.
    """
    with ExitStack() as stack:
        source = card.source
        if isinstance(source, Torchvision):
            opened = _torchvision(source, card)
        elif isinstance(source, SklearnDigits):
            opened = _digits(source)
        elif isinstance(source, ImageFolder):
            opened = _number(card, _image_folder(source, scratch, stack))
        elif isinstance(source, WebDataset):
            opened = _number(card, _webdataset(source, scratch, stack))
        elif isinstance(source, Table):
            opened = _number(card, {name: _table(source, split, scratch) for name, split in source.splits.items()})
        else:
            from ssl_core.data.sources.annotations import open_annotated  # it gives this file's records

            opened = open_annotated(source, card, scratch, stack)
        for name, samples in opened.splits.items():
            if samples.size == 0:
                raise ValueError(f"{card.name}: the split {name!r} has no images")
        yield opened


def _number(card: Card, listings: dict[str, Listing]) -> Opened:
    """Turn class names into label ids that all splits share: the card's order, else sorted."""
    targets = {target for listing in listings.values() for target in listing.targets.distinct if target is not None}
    names = sorted(target for target in targets if isinstance(target, str))
    if names and len(names) < len(targets):
        raise ValueError(f"{card.name}: labels are class names in one place ({names[0]!r}) and numbers in another")
    classes = card.classes or tuple(names) or None
    ids = {name: label for label, name in enumerate(classes or ())}
    for name in names:
        if name not in ids:
            raise ValueError(f"{card.name}: the class {name!r} is not among the card's classes{nearest(name, ids)}")
    numbers = [target for target in targets if isinstance(target, int)]
    most = len(classes) if classes else MAX_CLASSES
    if numbers and (min(numbers) < 0 or max(numbers) >= most):
        wrong = min(numbers) if min(numbers) < 0 else max(numbers)
        raise ValueError(f"{card.name}: the label {wrong} is outside 0..{most - 1}")
    return Opened(classes, {name: _samples(listing, ids, classes) for name, listing in listings.items()})


def _samples(listing: Listing, ids: dict[str, int], classes: tuple[str, ...] | None) -> Samples:
    labels = listing.targets.labels(ids)

    def read(index: int) -> Record:
        file = listing.files[index]
        return Record(printable(file.name), listing.fetch(file), int(labels[index]))

    digest = hashlib.sha256(repr((listing.stamp, classes)).encode())
    digest.update(labels.tobytes())
    for file in listing.files:
        digest.update(os.fsencode(file.name) + b"\0")
    return Samples(len(listing.files), lambda index: printable(listing.files[index].name), read, digest.hexdigest())


def printable(name: str) -> str:
    """Return a file's name as text that every file can hold; bytes that are no UTF-8 become escapes."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


# Folders, and tars of folders


def _image_folder(source: ImageFolder, scratch: Path, stack: ExitStack) -> dict[str, Listing]:
    path = Path(source.path)
    if source.type == "image_tar":
        tree = stack.enter_context(Archive.open(path, scratch=scratch, sha256=source.sha256))
    else:
        tree = Folder(path, scratch=scratch)
    return {name: _folder_split(tree, split, path) for name, split in source.splits.items()}


def _folder_split(tree: Folder | Archive, split: FolderSplit, path: Path) -> Listing:
    files = tree.files(split.folder)
    place = f"{path}/{split.folder}".rstrip("/")
    if not files:
        raise ValueError(f"{place} has no images ({' '.join(sorted(EXTENSIONS))})")
    notes, targets = split.annotations, Targets()
    annotated = {} if notes is None else _annotations(tree, notes)
    for file in files:
        if notes is None:
            targets.add(_class_folder(file.name, place) if split.labels == "folder" else None)
        elif file.name in annotated:
            targets.add(annotated[file.name])
        else:
            raise ValueError(f"{notes.file} says nothing about {place}/{file.name}: add a line or remove the image")
    return Listing(files, targets, partial(tree.fetch, folder=split.folder), tree.stamp)


def _class_folder(name: str, place: str) -> str:
    folder, _, rest = name.partition("/")
    if not rest:
        raise ValueError(f"{place}/{name} is in no class folder: put it into one, or say labels: none")
    return printable(folder)


def _annotations(tree: Folder | Archive, notes: Annotations) -> dict[str, str]:
    try:
        text = tree.read(notes.file).decode()
    except (OSError, UnicodeDecodeError) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or "no UTF-8"
        raise ValueError(f"annotations.file {notes.file} cannot be read: {reason}") from None
    classes = {}
    for number, row in enumerate(text.splitlines(), start=1):
        columns = row.split(notes.separator)
        if len(columns) <= max(notes.image_column, notes.class_column):
            raise ValueError(f"{notes.file} line {number} has {len(columns)} columns: check separator and columns")
        classes[columns[notes.image_column]] = columns[notes.class_column]
    return classes


# WebDataset tars, tables


def _webdataset(source: WebDataset, scratch: Path, stack: ExitStack) -> dict[str, Listing]:
    listings = {}
    for name, split in source.splits.items():
        paths = [Path(match) for pattern in _braces(split.tars) for match in sorted(glob(pattern)) or [pattern]]
        tars = [stack.enter_context(Archive.open(path, scratch=scratch)) for path in paths]
        targets = Targets()

        def found(tars: list[Archive] = tars, targets: Targets = targets) -> Iterator[File]:
            for number, tar in enumerate(tars):
                for file, target in _tar_samples(tar, source):
                    targets.add(target)
                    yield file._replace(name=f"{tar.path.name}/{file.name}", tar=number)

        def fetch(file: File, tars: list[Archive] = tars) -> bytes:
            return tars[file.tar].fetch(file)

        files = Files(found(), scratch)
        listings[name] = Listing(files, targets, fetch, " ".join(tar.stamp for tar in tars))
    return listings


def _braces(pattern: str) -> list[str]:
    from braceexpand import braceexpand  # comes with webdataset

    return list(braceexpand(pattern))


def _tar_samples(tar: Archive, source: WebDataset) -> Iterator[tuple[File, Target]]:
    members = {file.name: file for file in tar.scan()}  # of one tar only
    label, keys = source.label, set()
    for member, file in members.items():
        folder, _, base = member.rpartition("/")
        key, _, extension = base.partition(".")
        key = f"{folder}/{key}".lstrip("/")
        if not is_image(member) or source.image not in (None, extension):
            continue
        if key in keys:
            raise ValueError(f"{tar.path}: {key} has several images: say with image which extension is meant")
        keys.add(key)
        if label is None:
            yield file, None
            continue
        if f"{key}.{label}" not in members:
            raise ValueError(f"{tar.path}: {key} has no .{label}: name the label's extension, or say label: null")
        try:
            yield file, _target(tar.fetch(members[f"{key}.{label}"]).decode().strip())
        except UnicodeDecodeError:
            raise ValueError(f"{tar.path}: {key}.{label} is no text: write a class id or a class name") from None


def _table(source: Table, split: TableSplit, scratch: Path) -> Listing:
    path = Path(split.file)
    folder = Path(source.folder) if source.folder is not None else path.parent
    targets = Targets()
    stamps = hashlib.sha256()

    def found() -> Iterator[File]:
        for number, row in enumerate(_rows(path)):
            if number == 0:
                _check_columns(row, (source.image, source.label, *split.where), path)
            if all(str(row[column]) == str(value) for column, value in split.where.items()):
                file = File(str(_cell(row, source.image, path)))
                targets.add(None if source.label is None else _target(_cell(row, source.label, path)))
                stamps.update(stamp(folder / file.name))
                yield file

    files = Files(found(), scratch)
    return Listing(files, targets, lambda file: (folder / file.name).read_bytes(), stamps.hexdigest())


def _check_columns(row: dict[str, Any], wanted: Iterable[str | None], path: Path) -> None:
    columns = [column for column in row if column]
    for column in wanted:
        if column is not None and column not in columns:
            raise ValueError(f"{path} has no column {column!r}{nearest(column, columns)}")


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    if not path.is_file():
        raise ValueError(f"{path} {ABSENT}")
    try:
        if path.suffix == ".parquet":
            import pyarrow.parquet

            for batch in pyarrow.parquet.ParquetFile(path).iter_batches():
                yield from batch.to_pylist()
            return
        with open(path, newline="", encoding="utf-8-sig") as file:
            yield from csv.DictReader(file, strict=True)
    except (csv.Error, UnicodeDecodeError, ValueError) as error:  # pyarrow's errors are ValueErrors
        raise ValueError(f"{path} is no CSV or Parquet file: {' '.join(str(error).split())}") from None


def _cell(row: dict[str, Any], column: str, path: Path) -> Any:
    if row[column] in (None, ""):
        raise ValueError(f"{path}: a row has no {column!r}: {json.dumps(row, default=str)}")
    return row[column]


def _target(value: Any) -> Target:
    return int(value) if isinstance(value, int) or re.fullmatch(r"-?\d{1,18}", str(value)) else str(value)


# Data sets that come from libraries


def _library_samples(name: str, size: int, get: Callable[[int], tuple[Any, int]]) -> Samples:
    """Make samples of images that have no files to be told apart by: some of them are drawn and hashed instead."""

    def read(index: int) -> Record:
        return Record(f"{name}[{index}]", *get(index))

    digest = hashlib.sha256(str(size).encode())
    for index in range(0, size, max(1, size // HASHED)):
        try:
            _, image, label, *_ = read(index)
            content = image if isinstance(image, bytes) else image.tobytes()
        except (OSError, ValueError) as error:  # a broken image: the card says what becomes of it
            content, label = b"", error
        digest.update(content)
        digest.update(str(label).encode())
    return Samples(size, lambda index: f"{name}[{index}]", read, digest.hexdigest())


def _digits(source: SklearnDigits) -> Opened:
    digits = Digits(source)
    splits, start = {}, 0
    for name, split in source.splits.items():
        part = digits.order[start : start + split.images].tolist()
        if len(part) < split.images:
            raise ValueError(f"sklearn_digits has {len(digits.order)} images, fewer than its splits ask for")
        splits[name] = _library_samples("digits", len(part), lambda index, part=part: digits.draw(part[index]))
        start += split.images
    return Opened(tuple("0123456789"), splits)


def _torchvision(source: Torchvision, card: Card) -> Opened:
    splits = {}
    classes = card.classes
    for name, split in source.splits.items():
        dataset = _build(source, split.arguments)
        found = [label if isinstance(label, str) else ", ".join(label) for label in getattr(dataset, "classes", ())]
        classes = classes or tuple(found) or None  # their order is that of torchvision's label ids
        get = partial(_torchvision_item, dataset, source.dataset)
        splits[name] = _library_samples(f"{source.dataset}.{name}", len(dataset), get)
    return Opened(classes, splits)


def _build(source: Torchvision, arguments: dict[str, Any]) -> Any:
    """Make torchvision's data set; one that reads files through a loader gives their bytes, so JPEG stays JPEG."""
    import torchvision.datasets

    names = torchvision.datasets.__all__
    if source.dataset not in names:
        raise ValueError(f"torchvision has no data set {source.dataset!r}{nearest(source.dataset, names)}")
    kind: Any = getattr(torchvision.datasets, source.dataset)
    given = {**source.arguments, **arguments} | ({} if source.root is None else {"root": source.root})
    if "loader" in inspect.signature(kind).parameters or torchvision.datasets.DatasetFolder in kind.__mro__:
        given["loader"] = lambda path: Path(path).read_bytes()
    try:
        return kind(**given)
    except (TypeError, ValueError, RuntimeError, OSError, ImportError) as error:
        reason = f"{' '.join(str(error).split())} (given: {', '.join(sorted(given))})"
        raise ValueError(f"torchvision.datasets.{source.dataset}: {reason}") from None


def _torchvision_item(dataset: Any, name: str, index: int) -> tuple[bytes | Image.Image, int]:
    image, target = dataset[index][:2]
    if not isinstance(image, bytes | Image.Image):
        raise ValueError(f"torchvision.datasets.{name} gives a {type(image).__name__} for an image")
    try:
        return image, operator.index(target)
    except TypeError:
        raise ValueError(f"torchvision.datasets.{name} gives {target!r}, which is no class id") from None
