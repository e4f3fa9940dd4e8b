"""Sources whose images show several classes: PASCAL VOC's layout and COCO's, in a folder or in a tar of one.

What counts is which classes an image shows, not where. VOC marks objects as difficult: where all of an image's objects
of a class are, so is the image for that class, which is the 0 of VOC's own lists `ImageSets/Main/<class>_*.txt`. COCO
marks crowds: a crowd shows its class as a single object does.
"""

import hashlib
import json
import os
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

from ssl_core.config import nearest
from ssl_core.data.card import Card, Coco, CocoSplit, Voc, VocSplit
from ssl_core.data.multilabels import ABSENT, DIFFICULT, PRESENT
from ssl_core.data.sources.dispatch import Opened, Record, Samples
from ssl_core.data.sources.file_tree import Archive, Folder, stamp


class Shown(NamedTuple):
    """The images of a split by their paths, sorted, what each shows by class name, and all names in order, if known."""

    files: list[str]
    classes: list[dict[str, int]]
    names: list[str]


def open_annotated(source: Voc | Coco, card: Card, scratch: Path, stack: ExitStack) -> Opened:
    """List a source; raise a one-line `ValueError` if it is missing, damaged or not what the card says."""
    path = Path(source.path)
    tree = stack.enter_context(Archive.open(path, scratch=scratch)) if path.is_file() else Folder(path, scratch=scratch)
    if isinstance(source, Voc):
        splits = {name: _voc(tree, split) for name, split in source.splits.items()}
    else:
        splits = {name: _coco(tree, split) for name, split in source.splits.items()}
    found = {name: None for shown in splits.values() for name in shown.names}
    classes = card.classes or tuple(found)
    for name in found:
        if name not in classes:
            raise ValueError(f"{card.name}: the class {name!r} is not among the card's classes{nearest(name, classes)}")
    return Opened(classes, {name: _samples(tree, shown, classes) for name, shown in splits.items()})


def _samples(tree: Folder | Archive, shown: Shown, classes: tuple[str, ...]) -> Samples:
    labels = [bytes(states.get(name, ABSENT) for name in classes) for states in shown.classes]

    def read(index: int) -> Record:
        return Record(shown.files[index], tree.read(shown.files[index]), -1, labels[index])

    digest = hashlib.sha256(repr(classes).encode() + b"".join(labels))
    for file in shown.files:
        digest.update(os.fsencode(file) + b"\0")
        digest.update(stamp(tree.root / file) if isinstance(tree, Folder) else tree.stamp.encode())
    return Samples(len(shown.files), shown.files.__getitem__, read, digest.hexdigest())


def _voc(tree: Folder | Archive, split: VocSplit) -> Shown:
    """Read the list of images, then one XML file each; class names are sorted, which is VOC's own order."""
    listing = _text(tree, f"ImageSets/Main/{split.images}.txt").split("\n")
    images = sorted(line.split()[0] for line in listing if line.strip())
    classes = [_voc_classes(_text(tree, f"Annotations/{image}.xml"), image) for image in images]
    names = sorted({name for states in classes for name in states})
    return Shown([f"JPEGImages/{image}.jpg" for image in images], classes, names)


def _voc_classes(text: str, image: str) -> dict[str, int]:
    try:
        objects = ElementTree.fromstring(text).findall("object")
    except ElementTree.ParseError as error:
        raise ValueError(f"Annotations/{image}.xml is no XML ({error}): get the data again") from None
    states: dict[str, int] = {}
    for each in objects:
        name, state = each.findtext("name", "").strip(), DIFFICULT if each.findtext("difficult") == "1" else PRESENT
        states[name] = PRESENT if PRESENT in (state, states.get(name)) else DIFFICULT
    return states


def _coco(tree: Folder | Archive, split: CocoSplit) -> Shown:
    """Read the JSON file of instances; class names come in the order of COCO's category ids."""
    try:
        content = json.loads(_text(tree, split.annotations))
        categories = {entry["id"]: entry["name"] for entry in content["categories"]}
        files = {entry["id"]: entry["file_name"] for entry in content["images"]}
        states: dict[int, dict[str, int]] = {image: {} for image in files}
        for entry in content["annotations"]:
            states[entry["image_id"]][categories[entry["category_id"]]] = PRESENT
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{split.annotations} is no file of COCO's instances ({error!r}): mend the card") from None
    images = sorted(files, key=files.__getitem__)
    paths = [f"{split.folder}/{files[image]}".lstrip("/") for image in images]
    return Shown(paths, [states[image] for image in images], [categories[number] for number in sorted(categories)])


def _text(tree: Folder | Archive, name: str) -> str:
    try:
        return tree.read(name).decode()
    except OSError:
        raise ValueError(f"{tree.root if isinstance(tree, Folder) else tree.path} has no file {name!r}") from None
