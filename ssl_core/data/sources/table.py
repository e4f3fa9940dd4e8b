"""Tables of images and labels: CSV, Parquet or Arrow files with the paths of images or with the images themselves."""

import hashlib
import json
import os
import posixpath
import sys
import tempfile
from array import array
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from ssl_core.data.card import Card, Table, TableSplit
from ssl_core.data.records import OpenSource
from ssl_core.data.sources.file_list import File, Files
from ssl_core.data.sources.file_tree import read_file, stamp
from ssl_core.data.sources.labelled_files import LabelledFiles, Target, Targets, number_classes, parse_target
from ssl_core.data.sources.table_files import Cells, class_names_of, place_of, rows_of, table_files
from ssl_core.files import room_for
from ssl_core.mistakes import excerpt

ON_DISK, EMBEDDED = 0, 1  # `File.tar`: an image file in the folder, or bytes of the table copied into `Copies`


def open_table(source: Table, card: Card, scratch: Path, stack: ExitStack) -> OpenSource:
    """List the rows of each split's tables; `stack` closes the copies of images that the tables contain."""
    classes: dict[str, None] = {}  # ordered
    splits = {}
    for name, split in source.splits.items():
        rows = Rows(source, split, stack.enter_context(Copies(scratch)))
        splits[name] = rows.listed(scratch)
        classes.update(dict.fromkeys(rows.classes))
    return number_classes(card, splits, tuple(classes) or None)


class Copies:
    """The bytes of images that a table contains, in an unlinked temporary file: reading is then in any order."""

    def __init__(self, scratch: Path) -> None:
        self._scratch = scratch
        self._file = tempfile.TemporaryFile(dir=scratch)  # noqa: SIM115 - closed by __exit__
        self._size = 0

    def __enter__(self) -> "Copies":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def add(self, name: str, content: bytes) -> File:
        """Append an image; return its place."""
        file = File(name, EMBEDDED, self._size, len(content))
        with room_for(self._scratch):
            self._file.write(content)
        self._size += len(content)
        return file

    def flush(self) -> None:
        """Write the file to disk before it is read."""
        with room_for(self._scratch):
            self._file.flush()

    def read(self, file: File) -> bytes:
        """Return the bytes of an image."""
        return os.pread(self._file.fileno(), file.size, file.offset)


class Rows:
    """The rows of one split."""

    def __init__(self, source: Table, split: TableSplit, copies: Copies) -> None:
        self._source, self._split, self._copies = source, split, copies
        self._paths = table_files(split.file)
        self._root = self._paths[0].parent if source.folder is None else Path(source.folder)
        self._absolute_root = os.path.abspath(self._root)
        self.classes: list[str] = []  # names of the label ids, if the table has them
        self._unselected: Cells = {}  # a row that `where` leaves out
        self._targets = Targets()
        self._stamps = hashlib.sha256()
        self._blanks = 0  # labels and paths with blanks at their ends
        # Of each image, to find an image that occurs twice:
        self._places = array("Q")  # number of the file and of the row
        self._hashes = array("q")  # of the path

    def listed(self, scratch: Path) -> LabelledFiles:
        """Read the tables and list their images."""
        files = Files(self._images(), scratch)
        self._copies.flush()
        if not files and self._unselected:
            conditions = ", ".join(f"{column}: {value}" for column, value in self._split.where.items())
            values = ", ".join(f"{column}: {self._unselected[column]}" for column in self._split.where)
            raise ValueError(
                f"{self._split.file} has no row with {excerpt(conditions, 80)}; a row has {excerpt(values, 80)}: "
                "correct `where`"
            )
        if self._blanks:
            text = f"{self._split.file}: removed blanks at the ends of {self._blanks} labels or paths"
            print(text, file=sys.stderr)
        self._check_repetitions(files)
        return LabelledFiles(files, self._targets, self._fetch, self._stamps.hexdigest())

    def _images(self) -> Iterator[File]:
        source, split = self._source, self._split
        columns = [column for column in (source.image, source.label, *split.where) if column is not None]
        for number, path in enumerate(self._paths):
            names = None if source.label is None else class_names_of(path, source.label)
            self._check_class_names(names, path)
            has_copies = False
            for row in rows_of(path, list(dict.fromkeys(columns))):
                if not _selected(row.cells, split):
                    self._unselected = row.cells
                    continue
                place = place_of(path, row.number)
                target = self._target(row.cells, names, place)
                file = self._file(row.cells, path, row.number)
                has_copies |= file.tar == EMBEDDED
                self._targets.add(target)
                self._places.append(number << 40 | row.number)
                yield file
            if has_copies:
                self._stamps.update(stamp(path))

    def _check_class_names(self, names: list[str] | None, path: Path) -> None:
        if names is None:
            return
        if self.classes and names != self.classes:
            raise ValueError(f"{path} has other class names than {self._paths[0]}: use tables of one data set")
        self.classes = names

    def _target(self, cells: Cells, names: list[str] | None, place: str) -> Target:
        if self._source.label is None:
            return None
        value = self._cell(cells, self._source.label, place)
        if isinstance(value, dict | list | bytes):
            kind = type(value).__name__
            raise ValueError(f"{place}: the label is a {kind}: expected a class name or a class id in one column")
        if names is None:
            return parse_target(value)
        if value == -1:  # how `datasets` marks an image without label
            return None
        if not isinstance(value, int) or not 0 <= value < len(names):
            raise ValueError(f"{place}: the label {excerpt(repr(value))} is not one of the {len(names)} class ids")
        return names[value]

    def _file(self, cells: Cells, path: Path, number: int) -> File:
        place = place_of(path, number)
        value = self._cell(cells, self._source.image, place)
        name = None
        if isinstance(value, dict):  # as Hugging Face's `datasets` writes images
            value, name = value.get("bytes"), value.get("path")
        if isinstance(value, bytes):
            self._hashes.append(hash(value))
            return self._copies.add(f"{path.name}[{number}]", value)
        name = value if name is None else name
        if not isinstance(name, str):
            found = type(value).__name__
            raise ValueError(
                f"{place}: column {self._source.image!r} has a {found}: expected a path, bytes, or a struct of both"
            )
        self._check_path(name, place)
        self._hashes.append(hash(posixpath.normpath(name)))
        self._stamps.update(stamp(self._root / name))
        return File(name, ON_DISK)

    def _check_path(self, name: str, place: str) -> None:
        """Refuse a path with NUL, and one outside of the folder unless the card allows it."""
        if "\0" in name:
            raise ValueError(f"{place}: the path {excerpt(repr(name))} has a NUL byte: correct the table")
        if self._source.outside:
            return
        path = os.path.abspath(os.path.join(self._absolute_root, name))
        if os.path.commonpath([self._absolute_root, path]) != self._absolute_root:
            remedy = "correct the path or `folder`, or set outside: true in the card's source"
            raise ValueError(f"{place}: {excerpt(repr(name))} lies outside of {self._root}: {remedy}")

    def _cell(self, cells: Cells, column: str, place: str) -> Any:
        value = cells[column]
        if isinstance(value, str):
            stripped = value.strip()
            self._blanks += value != stripped
            value = stripped
        if value is None or value == "" or value != value:  # NaN differs from itself
            row = excerpt(json.dumps(cells, default=_shortened, ensure_ascii=False))
            raise ValueError(f"{place}: a row has no {column!r}: {row}")
        return value

    def _fetch(self, file: File) -> bytes:
        if file.tar == EMBEDDED:
            return self._copies.read(file)
        return read_file(self._root / file.name)

    # Images that occur twice

    def _check_repetitions(self, files: Files) -> None:
        """Refuse a path with two labels; report images that occur several times."""
        hashes = np.array(self._hashes, np.int64)
        order = np.argsort(hashes, kind="stable")
        repeated = np.flatnonzero(hashes[order[1:]] == hashes[order[:-1]])
        for position in repeated.tolist():
            first, second = order[position : position + 2].tolist()
            labels = self._targets.of(first), self._targets.of(second)
            if files[first].tar == EMBEDDED:  # the same picture under two labels is a fact of many data sets
                continue
            if labels[0] != labels[1]:
                image = excerpt(files[second].name)
                both = f"{excerpt(repr(labels[0]), 60)} and {excerpt(repr(labels[1]), 60)}"
                places = f"{self._place(first)} and {self._place(second)}"
                raise ValueError(f"{places}: the image {image} has the labels {both}: keep one row")
        if len(repeated):
            first, second = order[repeated[0] : repeated[0] + 2].tolist()
            places = f"{self._place(first)} and {self._place(second)}"
            print(f"{places}: the same image; {len(repeated)} rows repeat an image and count again", file=sys.stderr)

    def _place(self, position: int) -> str:
        place = self._places[position]
        return place_of(self._paths[place >> 40], place & (1 << 40) - 1)


def _selected(cells: Cells, split: TableSplit) -> bool:
    return all(_as_text(cells[column]) == _as_text(value) for column, value in split.where.items())


def _as_text(value: object) -> str:
    """Return a cell as text; true, True and TRUE, as different programs write them, are equal."""
    text = str(value)
    return text.lower() if text.lower() in ("true", "false") else text


def _shortened(value: object) -> str:
    """Return a value that is not JSON for a message."""
    return f"{len(value)} bytes" if isinstance(value, bytes) else excerpt(value)
