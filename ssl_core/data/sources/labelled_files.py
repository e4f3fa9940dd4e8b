"""Image files with class names or class ids, and how they become records with label ids."""

import hashlib
import os
import re
from array import array
from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from ssl_core.config import nearest
from ssl_core.data.card import Card
from ssl_core.data.records import OpenSource, Record, SourceSplit, printable
from ssl_core.data.sources.file_list import File, Files
from ssl_core.mistakes import excerpt

MAX_CLASSES = 1_000_000  # higher class ids are taken for a mistake: the manifest counts the images of each class

Target = str | int | None  # a class name, a class id, or no label


class Targets:
    """The targets of a list of files, in the files' order, at four bytes per file."""

    def __init__(self) -> None:
        self._codes: dict[Target, int] = {}
        self._code_of_file = array("i")

    def add(self, target: Target) -> None:
        """Append the target of the next file."""
        self._code_of_file.append(self._codes.setdefault(target, len(self._codes)))

    @property
    def distinct(self) -> Iterable[Target]:
        """All different targets."""
        return self._codes.keys()

    def labels(self, ids: Mapping[str, int]) -> np.ndarray:
        """Return the label id of each file: `ids` of a class name, a class id unchanged, -1 for no label."""
        label_of_code = np.array([_label(target, ids) for target in self._codes], np.int64)
        return label_of_code[np.array(self._code_of_file, np.int32)]


class LabelledFiles(NamedTuple):
    """The image files of a split, their targets, and a function that reads a file."""

    files: Files
    targets: Targets
    fetch: Callable[[File], bytes]
    stamp: str  # changes when the content changes
    unread: Mapping[str, int] = MappingProxyType({})  # pictures whose format is not read, by extension


def parse_target(value: Any) -> Target:
    """Return an integer, or text that spells one, as a class id, and any other value as a class name."""
    if isinstance(value, int) or re.fullmatch(r"-?\d{1,18}", str(value)):
        return int(value)
    return str(value)


def number_classes(card: Card, splits: Mapping[str, LabelledFiles]) -> OpenSource:
    """Replace class names by label ids that all splits share: the card's order, else sorted.

    Raises `ValueError` for a mixture of names and ids, a name that the card lacks, and an id out of range.
    """
    targets: set[Target] = set()
    for listed in splits.values():
        targets.update(listed.targets.distinct)
    names = sorted(target for target in targets if isinstance(target, str))
    numbers = sorted(target for target in targets if isinstance(target, int))
    if names and numbers:
        name = excerpt(repr(names[0]))
        raise ValueError(f"{card.name}: some labels are class names ({name}) and others are numbers: use one kind")
    classes = card.classes or tuple(names) or None
    ids = {name: label for label, name in enumerate(classes or ())}
    for name in names:
        if name not in ids:
            hint = nearest(name, ids)
            raise ValueError(f"{card.name}: the class {excerpt(repr(name))} is not among the card's classes{hint}")
    _check_ids(numbers, len(classes) if classes else MAX_CLASSES, card.name)
    return OpenSource(classes, {name: _split(listed, ids, classes) for name, listed in splits.items()})


def _label(target: Target, ids: Mapping[str, int]) -> int:
    if target is None:
        return -1
    return ids[target] if isinstance(target, str) else target


def _check_ids(numbers: list[int], num_classes: int, dataset: str) -> None:
    for number in numbers[:1] + numbers[-1:]:  # sorted
        if not 0 <= number < num_classes:
            raise ValueError(f"{dataset}: the label {number} is outside 0..{num_classes - 1}")


def _split(listed: LabelledFiles, ids: Mapping[str, int], classes: tuple[str, ...] | None) -> SourceSplit:
    files = listed.files
    labels = listed.targets.labels(ids)

    def name(index: int) -> str:
        return printable(files[index].name)

    def read(index: int) -> Record:
        file = files[index]
        return Record(printable(file.name), listed.fetch(file), int(labels[index]))

    digest = hashlib.sha256(repr((listed.stamp, classes)).encode())
    digest.update(labels.tobytes())
    for file in files:
        digest.update(os.fsencode(file.name) + b"\0")
    return SourceSplit(len(files), name, read, digest.hexdigest(), listed.unread)
