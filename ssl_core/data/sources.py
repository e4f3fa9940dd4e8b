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
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from glob import glob
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from ssl_core.config import nearest
from ssl_core.data.card import Card, FolderSplit, ImageFolder, SklearnDigits, Table, TableSplit, Torchvision, WebDataset
from ssl_core.data.digits import Digits
from ssl_core.data.images import EXTENSIONS, is_image
from ssl_core.data.trees import ABSENT, Archive, Folder, stamp

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


class Listing(NamedTuple):
    """Images that are files somewhere: names, what is said of their classes, and how to get the bytes of the i-th."""

    names: Sequence[str]
    targets: Sequence[Target]
    fetch: Callable[[int], bytes]
    stamp: str  # changes when the content changes


@contextmanager
def open_source(card: Card, *, scratch: Path) -> Iterator[Opened]:
    """List a card's source; `scratch` is where a compressed tar is held while it is read.

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
            opened = _number(card, {name: _table(source, split) for name, split in source.splits.items()})
        else:
            from ssl_core.data.annotated import open_annotated  # it gives this file's records

            opened = open_annotated(source, card, scratch, stack)
        for name, samples in opened.splits.items():
            if samples.size == 0:
                raise ValueError(f"{card.name}: the split {name!r} has no images")
        yield opened


def _number(card: Card, listings: dict[str, Listing]) -> Opened:
    """Turn class names into label ids that all splits share: the card's order, else sorted."""
    targets = {target for listing in listings.values() for target in listing.targets if target is not None}
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
    labels = np.array([-1 if t is None else ids[t] if isinstance(t, str) else t for t in listing.targets], np.int64)

    def read(index: int) -> Record:
        return Record(shown(index), listing.fetch(index), int(labels[index]))

    def shown(index: int) -> str:
        return printable(listing.names[index])

    digest = hashlib.sha256(repr((listing.stamp, classes)).encode())
    digest.update(labels.tobytes())
    for name in listing.names:
        digest.update(os.fsencode(name) + b"\0")
    return Samples(len(listing.names), shown, read, digest.hexdigest())


def printable(name: str) -> str:
    """Return a file's name as text that every file can hold; bytes that are no UTF-8 become escapes."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


# Folders, and tars of folders


def _image_folder(source: ImageFolder, scratch: Path, stack: ExitStack) -> dict[str, Listing]:
    path = Path(source.path)
    if source.type == "image_tar":
        tree = stack.enter_context(Archive.open(path, scratch=scratch, sha256=source.sha256))
    else:
        tree = Folder(path)
    return {name: _folder_split(tree, split, path) for name, split in source.splits.items()}


def _folder_split(tree: Folder | Archive, split: FolderSplit, path: Path) -> Listing:
    names = tree.files(split.folder)
    place = f"{path}/{split.folder}".rstrip("/")
    if not names:
        raise ValueError(f"{place} has no images ({' '.join(sorted(EXTENSIONS))})")
    if split.annotations is not None:
        targets = _annotated(tree, split, names, place)
    elif split.labels == "folder":
        targets = [_class_folder(name, place) for name in names]
    else:
        targets = [None] * len(names)

    def fetch(index: int) -> bytes:
        return tree.read(f"{split.folder}/{names[index]}".lstrip("/"))

    return Listing(names, targets, fetch, tree.stamp)


def _class_folder(name: str, place: str) -> str:
    folder, _, rest = name.partition("/")
    if not rest:
        raise ValueError(f"{place}/{name} is in no class folder: put it into one, or say labels: none")
    return printable(folder)


def _annotated(tree: Folder | Archive, split: FolderSplit, names: list[str], place: str) -> list[Target]:
    notes = split.annotations
    assert notes is not None
    classes = {}
    for number, row in enumerate(tree.read(notes.file).decode().splitlines(), start=1):
        columns = row.split(notes.separator)
        if len(columns) <= max(notes.image_column, notes.class_column):
            raise ValueError(f"{notes.file} line {number} has {len(columns)} columns: check separator and columns")
        classes[columns[notes.image_column]] = columns[notes.class_column]
    missing = next((name for name in names if name not in classes), None)
    if missing is not None:
        raise ValueError(f"{notes.file} says nothing about {place}/{missing}: add a line or remove the image")
    return [classes[name] for name in names]


# WebDataset tars, tables


def _webdataset(source: WebDataset, scratch: Path, stack: ExitStack) -> dict[str, Listing]:
    listings = {}
    for name, split in source.splits.items():
        paths = [Path(match) for pattern in _braces(split.tars) for match in sorted(glob(pattern)) or [pattern]]
        tars = [stack.enter_context(Archive.open(path, scratch=scratch)) for path in paths]
        found = [sample for tar in tars for sample in _tar_samples(tar, source.label)]
        names = [f"{tar.path.name}/{member}" for tar, member, _ in found]

        def fetch(index: int, found: list[tuple[Archive, str, Target]] = found) -> bytes:
            return found[index][0].read(found[index][1])

        stamp = " ".join(tar.stamp for tar in tars)
        listings[name] = Listing(names, [target for _, _, target in found], fetch, stamp)
    return listings


def _braces(pattern: str) -> list[str]:
    from braceexpand import braceexpand  # comes with webdataset

    return list(braceexpand(pattern))


def _tar_samples(tar: Archive, label: str | None) -> Iterator[tuple[Archive, str, Target]]:
    for member in tar.members:
        if not is_image(member):
            continue
        folder, _, base = member.rpartition("/")
        key = f"{folder}/{base.partition('.')[0]}".lstrip("/")
        if label is not None and f"{key}.{label}" not in tar.members:
            raise ValueError(f"{tar.path}: {key} has no .{label}: name the label's extension, or say label: null")
        try:
            yield tar, member, None if label is None else _target(tar.read(f"{key}.{label}").decode().strip())
        except UnicodeDecodeError:
            raise ValueError(f"{tar.path}: {key}.{label} is no text: write a class id or a class name") from None


def _table(source: Table, split: TableSplit) -> Listing:
    path = Path(split.file)
    rows = _rows(path)
    columns = [column for column in rows[0] if column] if rows else []
    for column in (source.image, source.label, *split.where):
        if column is not None and column not in columns:
            raise ValueError(f"{path} has no column {column!r}{nearest(column, columns)}")
    rows = [row for row in rows if all(str(row[column]) == str(value) for column, value in split.where.items())]
    names = [_cell(row, source.image, path) for row in rows]
    targets = [None if source.label is None else _target(_cell(row, source.label, path)) for row in rows]
    folder = Path(source.folder) if source.folder is not None else path.parent

    def fetch(index: int) -> bytes:
        return (folder / names[index]).read_bytes()

    return Listing(names, targets, fetch, hashlib.sha256(b"".join(stamp(folder / name) for name in names)).hexdigest())


def _rows(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        raise ValueError(f"{path} {ABSENT}")
    try:
        if path.suffix == ".parquet":
            import pyarrow.parquet

            return pyarrow.parquet.read_table(path).to_pylist()
        with open(path, newline="", encoding="utf-8-sig") as file:
            return list(csv.DictReader(file, strict=True))
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
        _, image, label, *_ = read(index)
        digest.update(image if isinstance(image, bytes) else image.tobytes())
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
