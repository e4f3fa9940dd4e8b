"""Multi-label sources: the layouts of PASCAL VOC and COCO, in a folder or in a tar or zip of one.

Only the presence of each class counts, not its place. VOC marks objects as difficult: an image whose objects of a
class are all difficult is difficult for that class, the 0 of VOC's own lists `ImageSets/Main/<class>_*.txt`. COCO marks
crowds: a crowd counts as a single object does.
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
from ssl_core.data.records import OpenSource, Record, SourceSplit
from ssl_core.data.sources.file_tree import Archive, Folder, stamp
from ssl_core.data.sources.zip_archive import ZipArchive, is_zip
from ssl_core.mistakes import excerpt

States = dict[str, int]  # class name -> PRESENT or DIFFICULT; other classes are ABSENT


class AnnotatedSplit(NamedTuple):
    """The images of a split, sorted by path, the states of each, and the class names in order."""

    files: list[str]
    states: list[States]
    classes: list[str]


def open_voc(source: Voc, card: Card, scratch: Path, stack: ExitStack) -> OpenSource:
    """List the splits of a year of PASCAL VOC; `stack` closes the tar."""
    tree = _open_tree(Path(source.path), scratch, stack)
    return _number_classes(card, tree, {name: _list_voc(tree, split) for name, split in source.splits.items()})


def open_coco(source: Coco, card: Card, scratch: Path, stack: ExitStack) -> OpenSource:
    """List splits with COCO's annotations; `stack` closes the tar."""
    tree = _open_tree(Path(source.path), scratch, stack)
    return _number_classes(card, tree, {name: _list_coco(tree, split) for name, split in source.splits.items()})


def _open_tree(path: Path, scratch: Path, stack: ExitStack) -> Folder | Archive:
    if is_zip(path):
        return stack.enter_context(ZipArchive.open(path, scratch=scratch))
    if path.is_file():
        return stack.enter_context(Archive.open(path, scratch=scratch))
    return Folder(path, scratch=scratch)


def _number_classes(card: Card, tree: Folder | Archive, splits: dict[str, AnnotatedSplit]) -> OpenSource:
    names: dict[str, None] = {}  # ordered
    for annotated in splits.values():
        names.update(dict.fromkeys(annotated.classes))
    classes = card.classes or tuple(names)
    for name in names:
        if name not in classes:
            hint = excerpt(nearest(name, classes))
            raise ValueError(f"{card.name}: the class {excerpt(repr(name))} is not among the card's classes{hint}")
    return OpenSource(classes, {name: _split(tree, annotated, classes) for name, annotated in splits.items()})


def _split(tree: Folder | Archive, annotated: AnnotatedSplit, classes: tuple[str, ...]) -> SourceSplit:
    files = annotated.files
    labels = [_label_bytes(states, classes) for states in annotated.states]

    def read(index: int) -> Record:
        return Record(files[index], tree.read(files[index]), -1, labels[index])

    digest = hashlib.sha256(repr(classes).encode() + b"".join(labels))
    for file in files:
        digest.update(os.fsencode(file) + b"\0")
        digest.update(stamp(tree.root / file) if isinstance(tree, Folder) else tree.stamp.encode())
    return SourceSplit(len(files), files.__getitem__, read, digest.hexdigest())


def _label_bytes(states: States, classes: tuple[str, ...]) -> bytes:
    return bytes(states.get(name, ABSENT) for name in classes)


def _list_voc(tree: Folder | Archive, split: VocSplit) -> AnnotatedSplit:
    """Read the list of images, then one XML file per image; class names are sorted, which is VOC's own order."""
    lines = _read_text(tree, f"ImageSets/Main/{split.images}.txt").split("\n")
    images = sorted(line.split()[0] for line in lines if line.strip())
    states = [_voc_states(_read_text(tree, f"Annotations/{image}.xml"), image) for image in images]
    names: set[str] = set()
    for each in states:
        names.update(each)
    return AnnotatedSplit([f"JPEGImages/{image}.jpg" for image in images], states, sorted(names))


def _voc_states(text: str, image: str) -> States:
    try:
        objects = ElementTree.fromstring(text).findall("object")
    except ElementTree.ParseError as error:
        raise ValueError(f"Annotations/{image}.xml is not XML ({error}): get the data again") from None
    states: States = {}
    for element in objects:
        name = element.findtext("name", "").strip()
        if element.findtext("difficult") != "1":
            states[name] = PRESENT
        else:
            states.setdefault(name, DIFFICULT)
    return states


def _list_coco(tree: Folder | Archive, split: CocoSplit) -> AnnotatedSplit:
    """Read the JSON file of instances; class names are in the order of COCO's category ids."""
    try:
        content = json.loads(_read_text(tree, split.annotations))
        categories: dict[int, str] = {entry["id"]: entry["name"] for entry in content["categories"]}
        files: dict[int, str] = {entry["id"]: entry["file_name"] for entry in content["images"]}
        states: dict[int, States] = {image: {} for image in files}
        for entry in content["annotations"]:
            states[entry["image_id"]][categories[entry["category_id"]]] = PRESENT
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        reason = excerpt(repr(error))
        raise ValueError(
            f"{split.annotations} is not a file of COCO instances ({reason}): check `annotations` in the card"
        ) from None
    images = sorted(files, key=files.__getitem__)
    paths = [f"{split.folder}/{files[image]}".lstrip("/") for image in images]
    names = [categories[number] for number in sorted(categories)]
    return AnnotatedSplit(paths, [states[image] for image in images], names)


def _read_text(tree: Folder | Archive, name: str) -> str:
    try:
        return tree.read(name).decode()
    except OSError:
        place = tree.root if isinstance(tree, Folder) else tree.path
        raise ValueError(f"{place} has no file {name!r}") from None
