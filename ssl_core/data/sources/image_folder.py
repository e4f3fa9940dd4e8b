"""Folders of images, and tars and zips of such folders: the class is the name of the folder, or in a text file."""

import csv
import io
import re
import signal
from contextlib import ExitStack
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

from ssl_core.data.card import Annotations, Card, FolderSplit, ImageFolder
from ssl_core.data.image_files import EXTENSIONS, list_counts
from ssl_core.data.records import OpenSource, printable
from ssl_core.data.sources.file_tree import Archive, Folder
from ssl_core.data.sources.labelled_files import LabelledFiles, Target, Targets, number_classes, parse_target
from ssl_core.data.sources.zip_archive import ZipArchive, is_zip
from ssl_core.mistakes import excerpt

SEARCH_SECONDS = 5.0  # for a class_pattern in one path; usual patterns take microseconds


def open_image_folder(source: ImageFolder, card: Card, scratch: Path, stack: ExitStack) -> OpenSource:
    """List a folder, a tar or a zip of images; `stack` closes the archive."""
    path = Path(source.path)
    tree = _open_tree(source, path, scratch, stack)
    return number_classes(card, {name: _list_split(tree, split, path) for name, split in source.splits.items()})


def _open_tree(source: ImageFolder, path: Path, scratch: Path, stack: ExitStack) -> Folder | Archive:
    if source.type == "image_folder":
        if is_zip(path):
            raise ValueError(f"{path} is a zip: set type: image_zip")
        return Folder(path, scratch=scratch)
    if source.type == "image_tar" and is_zip(path):
        raise ValueError(f"{path} is a zip: set type: image_zip")
    kind = ZipArchive if source.type == "image_zip" else Archive
    return stack.enter_context(kind.open(path, scratch=scratch, sha256=source.sha256))


def _list_split(tree: Folder | Archive, split: FolderSplit, path: Path) -> LabelledFiles:
    files = tree.files(split.folder)
    place = f"{path}/{split.folder}".rstrip("/")
    if not files:
        unread = f"; convert its {list_counts(tree.unread)}" if tree.unread else ""
        raise ValueError(f"{place} has no images ({' '.join(sorted(EXTENSIONS))}){unread}")
    targets = Targets()
    classes = {} if split.annotations is None else _read_annotations(tree, split.annotations)
    for file in files:
        if split.annotations is not None:
            targets.add(_annotated_class(file.name, classes, f"{split.annotations.file} has no line for {place}/"))
        elif split.class_pattern is not None:
            targets.add(_class_in_path(file.name, split.class_pattern, place))
        elif split.labels == "folder":
            targets.add(_class_folder(file.name, place))
        else:
            targets.add(None)
    return LabelledFiles(files, targets, partial(tree.fetch, folder=split.folder), tree.stamp, tree.unread)


def _class_folder(name: str, place: str) -> str:
    folder, _, rest = name.partition("/")
    if not rest:
        image = excerpt(f"{place}/{name}")
        remedy = "move it into one, or set labels: none, class_pattern or annotations for the split"
        raise ValueError(f"{image} is in no class folder: {remedy}")
    return printable(folder)


def _class_in_path(name: str, pattern: str, place: str) -> str:
    match = _search(pattern, name)
    if match is None or not match[1]:
        image = excerpt(f"{place}/{name}")
        raise ValueError(f"{image} does not match class_pattern {excerpt(pattern)}: correct the pattern")
    return printable(match[1])


def _search(pattern: str, name: str) -> "re.Match[str] | None":
    """Search for a class_pattern, whose nested repetitions could take for ever, up to `SEARCH_SECONDS`."""

    def stop(*_: object) -> None:
        problem = f"class_pattern {excerpt(pattern)} takes more than {SEARCH_SECONDS:g} seconds for {excerpt(name)}"
        raise ValueError(f"{problem}: write it without a repetition inside a repetition")

    handler = signal.signal(signal.SIGALRM, stop)
    earlier = signal.setitimer(signal.ITIMER_REAL, SEARCH_SECONDS)
    try:
        return re.search(pattern, name)
    finally:
        signal.signal(signal.SIGALRM, handler)
        signal.setitimer(signal.ITIMER_REAL, *earlier)


def _annotated_class(name: str, classes: dict[str, Target], complaint: str) -> Target:
    """Return the class of an image by its path, with or without its extension."""
    stem = str(PurePosixPath(name).with_suffix(""))
    if name not in classes and stem not in classes:
        raise ValueError(f"{excerpt(complaint + name)}: add one or remove the image")
    return classes[name if name in classes else stem]


def _read_annotations(tree: Folder | Archive, annotations: Annotations) -> dict[str, Target]:
    """Return the class of each image that a text file names."""
    try:
        text = tree.read(annotations.file).decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or "not UTF-8"
        raise ValueError(f"annotations.file {annotations.file} cannot be read: {reason}") from None
    lines = csv.reader(io.StringIO(text, newline=""), strict=True, delimiter=annotations.separator)
    try:
        return _classes_of_lines(lines, annotations)
    except csv.Error as error:
        problem = f"after line {lines.line_num}: {excerpt(error)}"
        raise ValueError(f"{annotations.file} is not a table; {problem}: check its quotes and `separator`") from None


def _classes_of_lines(lines: Any, annotations: Annotations) -> dict[str, Target]:
    """Return the class of each image in the lines of a csv reader."""
    image_column, class_column = annotations.image_column, annotations.class_column
    if isinstance(image_column, str):
        header = next(lines, [])
        image_column = _column(image_column, header, annotations.file)
        class_column = _column(str(class_column), header, annotations.file)
    assert isinstance(class_column, int)
    classes: dict[str, Target] = {}
    for columns in lines:
        if not columns:
            continue
        place = f"{annotations.file} line {lines.line_num}"
        if len(columns) <= max(image_column, class_column):
            raise ValueError(f"{place} has {len(columns)} columns: check separator, image_column and class_column")
        image, target = columns[image_column].strip(), parse_target(columns[class_column])
        if target == "":
            raise ValueError(f"{place}: the image {excerpt(image)} has no class: write one or remove the line")
        if classes.setdefault(image, target) != target:
            labels = f"{excerpt(repr(classes[image]), 60)} and {excerpt(repr(target), 60)}"
            raise ValueError(f"{place}: the image {excerpt(image)} has the classes {labels}: keep one line")
    return classes


def _column(name: str, header: list[str], file: str) -> int:
    if name not in header:
        names = excerpt(", ".join(header))
        raise ValueError(f"{file} has no column {name!r} in its first line ({names}): correct the card")
    if header.count(name) > 1:
        raise ValueError(f"{file} has several columns {name!r}: rename all but one")
    return header.index(name)
