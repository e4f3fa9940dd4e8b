"""Image files with class names or class ids, and how they become records with label ids."""

import hashlib
import os
import re
import sys
import unicodedata
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

CANONICAL_INTEGER = re.compile("0|-?[1-9][0-9]{0,17}")  # 64 bits
MANY_CLASSES = 20  # from here on, nearly as many classes as images are reported

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

    def of(self, position: int) -> Target:
        """Return the target of the file at a position."""
        return list(self._codes)[self._code_of_file[position]]

    def labels(self, ids: Mapping[Target, int]) -> np.ndarray:
        """Return the label id of each file, -1 for no label."""
        label_of_code = np.array([ids.get(target, -1) for target in self._codes], np.int64)
        return label_of_code[np.array(self._code_of_file, np.int32)]


class LabelledFiles(NamedTuple):
    """The image files of a split, their targets, and a function that reads a file."""

    files: Files
    targets: Targets
    fetch: Callable[[File], bytes]
    stamp: str  # changes when the content changes
    unread: Mapping[str, int] = MappingProxyType({})  # pictures whose format is not read, by extension


def parse_target(value: Any) -> Target:
    """Return an integer, or text that is one in its usual form, as a class id, and any other value as a class name.

    `7` is a class id; `007`, `+7` and `7.0` are names. Blanks at the ends do not count. NaN gives an empty name, which
    `number_classes` refuses.
    """
    if value != value:  # NaN
        return ""
    if isinstance(value, int):
        return int(value)
    text = str(value).strip()
    return int(text) if CANONICAL_INTEGER.fullmatch(text) else text


def number_classes(
    card: Card, splits: Mapping[str, LabelledFiles], classes: tuple[str, ...] | None = None
) -> OpenSource:
    """Replace class names by label ids that all splits share: in the card's order, else of `classes`, else sorted.

    Integers are label ids if they are 0, 1, 2, ... without a gap or if the classes are listed, otherwise names.
    Raises `ValueError` for a mixture of names and integers, a name that is not listed, and an id out of range.
    """
    targets: set[Target] = set()
    for listed in splits.values():
        targets.update(listed.targets.distinct)
    targets.discard(None)
    if "" in targets:
        raise ValueError(f"{card.name}: some labels are empty or NaN: write a class for each image, or leave it out")
    listed_classes = card.classes or classes
    if _are_ids(targets, listed_classes, card.name):
        ids: dict[Target, int] = {target: target for target in targets if isinstance(target, int)}
        return _number(splits, listed_classes, ids)
    names = listed_classes or _sorted_names(targets)
    position = {name: label for label, name in enumerate(names)}
    ids = {}
    for target in sorted(targets, key=str):
        name = str(target)
        if name not in position:
            hint = excerpt(nearest(name, position))
            raise ValueError(f"{card.name}: the class {excerpt(repr(name))} is not among the card's classes{hint}")
        ids[target] = position[name]
    if listed_classes is None:
        _report_odd_names(names, splits, card.name)
    return _number(splits, names or None, ids)


def _number(
    splits: Mapping[str, LabelledFiles], classes: tuple[str, ...] | None, ids: Mapping[Target, int]
) -> OpenSource:
    return OpenSource(classes, {name: _split(listed, ids, classes) for name, listed in splits.items()})


def _are_ids(targets: set[Target], classes: tuple[str, ...] | None, dataset: str) -> bool:
    """Return whether the targets are label ids, rather than names of classes."""
    numbers = sorted(target for target in targets if isinstance(target, int))
    names = sorted(target for target in targets if isinstance(target, str))
    if not numbers:
        return False
    if names:
        _check_codes(names, classes, dataset)
        return False
    if numbers[0] < 0:
        remedy = "number classes from 0, or set label: null for images without labels"
        raise ValueError(f"{dataset}: the label {numbers[0]} is below 0: {remedy}")
    if classes is None:
        return _without_gap(numbers, dataset)
    if numbers[-1] < len(classes):
        return True
    if all(str(number) in classes for number in numbers):
        return False
    raise ValueError(f"{dataset}: the label {numbers[-1]} is outside 0..{len(classes) - 1}: correct it or `classes`")


def _check_codes(names: list[str], classes: tuple[str, ...] | None, dataset: str) -> None:
    """Accept names beside integers only if all are codes of digits, such as 007, or if the card lists them."""
    listed = classes or ()
    for name in names:
        if not re.fullmatch("[0-9]+", name) and name not in listed:
            remedy = "use one kind, or list `classes` in the card"
            raise ValueError(
                f"{dataset}: some labels are class names ({excerpt(repr(name))}) and others are numbers: {remedy}"
            )


def _without_gap(numbers: list[int], dataset: str) -> bool:
    """Return whether sorted numbers are 0, 1, 2, ...; report that they become names if they are not."""
    for position, number in enumerate(numbers):
        if number != position:
            print(
                f"{dataset}: the labels are {len(numbers)} numbers from {numbers[0]} to {numbers[-1]} without "
                f"{position}: they become class names; list `classes` in the card to use them as label ids",
                file=sys.stderr,
            )
            return False
    return True


def _sorted_names(targets: set[Target]) -> tuple[str, ...]:
    """Return the names of classes in order: numbers by value, text alphabetically."""
    numbers = sorted(target for target in targets if isinstance(target, int))
    if len(numbers) == len(targets):
        return tuple(map(str, numbers))
    return tuple(sorted({str(target) for target in targets}))


def _report_odd_names(names: tuple[str, ...], splits: Mapping[str, LabelledFiles], dataset: str) -> None:
    """Report class names that differ in case or Unicode form only, and nearly as many classes as images."""
    images = sum(len(listed.files) for listed in splits.values())
    if len(names) > MANY_CLASSES and 2 * len(names) > images:
        print(
            f"{dataset}: {len(names)} classes for {images} images, such as {excerpt(repr(names[0]), 60)}: "
            "check the labels in the card",
            file=sys.stderr,
        )
    similar: dict[str, str] = {}
    for name in names:
        other = similar.setdefault(unicodedata.normalize("NFKC", name).casefold(), name)
        if other != name:
            pair = f"{excerpt(repr(other), 60)} and {excerpt(repr(name), 60)}"
            print(f"{dataset}: the classes {pair} look alike: rename one to join them", file=sys.stderr)


def _split(listed: LabelledFiles, ids: Mapping[Target, int], classes: tuple[str, ...] | None) -> SourceSplit:
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
    return SourceSplit(len(files), name, read, digest.hexdigest(), unread=listed.unread, labels=labels)
