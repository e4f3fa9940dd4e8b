"""Annotated objects: the layouts of PASCAL VOC and COCO, in a folder or in a tar or zip of one.

They give each image its objects (`boxes.py`) and several labels. For a label only the presence of the class counts. VOC
marks objects as difficult: an image whose objects of a class are all difficult is difficult for that class, the 0 of
VOC's own lists `ImageSets/Main/<class>_*.txt`. COCO marks crowds: a crowd counts as a single object does.
"""

import hashlib
import json
import os
import sys
from collections import Counter
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree

from ssl_core.config import nearest
from ssl_core.data.boxes import Annotation, Objects, Size
from ssl_core.data.card import Card, Coco, CocoSplit, Voc, VocSplit
from ssl_core.data.multilabels import ABSENT, DIFFICULT, PRESENT
from ssl_core.data.records import OpenSource, Record, SourceSplit
from ssl_core.data.sources.file_tree import Archive, Folder, stamp
from ssl_core.data.sources.zip_archive import ZipArchive, is_zip
from ssl_core.mistakes import excerpt

States = dict[str, int]  # class name -> PRESENT or DIFFICULT; other classes are ABSENT


class AnnotatedSplit(NamedTuple):
    """The images of a split, sorted by path, the objects of each, and the class names in order.

    The label of an object is the name of its class here, or None for an unknown one.
    """

    files: list[str]
    annotations: list[Annotation]
    classes: list[str]


def open_voc(source: Voc, card: Card, scratch: Path, stack: ExitStack) -> OpenSource:
    """List the splits of PASCAL VOC; `stack` closes the tar."""
    tree = _open_tree(Path(source.path), scratch, stack)
    return _number_classes(card, tree, {name: _list_voc(tree, split) for name, split in source.splits.items()})


def open_coco(source: Coco, card: Card, scratch: Path, stack: ExitStack) -> OpenSource:
    """List splits with COCO's annotations; `stack` closes the tar."""
    tree = _open_tree(Path(source.path), scratch, stack)
    skip = card.on_error == "skip"
    return _number_classes(card, tree, {name: _list_coco(tree, split, skip) for name, split in source.splits.items()})


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
        if name not in classes and card.on_error == "fail":
            hint = excerpt(nearest(name, classes))
            raise ValueError(f"{card.name}: the class {excerpt(repr(name))} is not among the card's classes{hint}")
    return OpenSource(classes, {name: _split(tree, annotated, classes) for name, annotated in splits.items()})


def _split(tree: Folder | Archive, annotated: AnnotatedSplit, classes: tuple[str, ...]) -> SourceSplit:
    files = annotated.files
    labels = [_label_bytes(annotation.objects, classes) for annotation in annotated.annotations]
    boxes = [_number_labels(annotation, classes).encode() for annotation in annotated.annotations]
    places = [each["box"] for annotation in annotated.annotations for each in annotation.objects]
    has_boxes = any(places) or not places  # files of labels only have objects without boxes

    def read(index: int) -> Record:
        objects = boxes[index] if has_boxes else None
        return Record(files[index], tree.read(files[index]), -1, labels[index], objects)

    digest = hashlib.sha256(repr(classes).encode() + b"".join(labels))
    for file, objects in zip(files, boxes, strict=True):
        digest.update(os.fsencode(file) + b"\0" + objects)
        digest.update(stamp(tree.root / file) if isinstance(tree, Folder) else tree.stamp.encode())
    return SourceSplit(len(files), files.__getitem__, read, digest.hexdigest())


def _number_labels(annotation: Annotation, classes: tuple[str, ...]) -> Annotation:
    """Replace the names of classes by label ids; objects without a box label the image only."""
    ids = {name: label for label, name in enumerate(classes)}
    placed = [each for each in annotation.objects if each["box"]]
    return Annotation(annotation.size, [{**each, "label": ids.get(each["label"])} for each in placed])


def _label_bytes(objects: Objects, classes: tuple[str, ...]) -> bytes:
    states: States = {}
    for each in objects:
        if each.get("difficult"):
            states.setdefault(each["label"], DIFFICULT)
        else:
            states[each["label"]] = PRESENT
    return bytes(states.get(name, ABSENT) for name in classes)


def _list_voc(tree: Folder | Archive, split: VocSplit) -> AnnotatedSplit:
    """Read the lists of images, then one XML file per image; class names are sorted, which is VOC's own order."""
    images = []
    for folder, name in split.lists:
        lines = _read_text(tree, f"{folder}ImageSets/Main/{name}.txt").split("\n")
        images += [(folder, line.split()[0]) for line in lines if line.strip()]
    images.sort()
    for first, second in pairwise(images):
        if first == second:
            raise ValueError(f"ImageSets/Main lists {first[0]}JPEGImages/{first[1]}.jpg twice: keep one of the lines")
    annotations = [_read_voc(tree, f"{folder}Annotations/{image}.xml") for folder, image in images]
    names: set[str] = set()
    for annotation in annotations:
        names.update(each["label"] for each in annotation.objects)
    return AnnotatedSplit([f"{folder}JPEGImages/{image}.jpg" for folder, image in images], annotations, sorted(names))


def _read_voc(tree: Folder | Archive, file: str) -> Annotation:
    content = _read(tree, file)  # bytes: the file declares its encoding
    try:
        root = ElementTree.fromstring(content)
    except (ElementTree.ParseError, LookupError, ValueError) as error:
        raise ValueError(f"{file} is not XML ({excerpt(error)}): get the data again") from None
    try:
        return _annotation_of_xml(root)
    except ValueError as error:
        raise ValueError(f"{file}: {excerpt(error)}: correct the file") from None


def _annotation_of_xml(root: ElementTree.Element) -> Annotation:
    objects: Objects = []
    for number, element in enumerate(root.findall("object")):
        name = element.findtext("name", "").strip()
        if not name:
            raise ValueError(f"object {number + 1} has no name")
        difficult = element.findtext("difficult") == "1"
        described = {"name": f"object {number + 1} ({name})", "label": name, "difficult": difficult}
        objects.append({**described, "box": _voc_box(element)})
    return Annotation(_voc_size(root), objects)


def _voc_box(element: ElementTree.Element) -> list[float]:
    """Return left, top, right, bottom; VOC counts pixels from 1, and the last one is inside the box."""
    corners = [element.findtext(f"bndbox/{side}", "nan") for side in ("xmin", "ymin", "xmax", "ymax")]
    try:
        left, top, right, bottom = map(float, corners)
    except ValueError:
        raise ValueError(f"expected four numbers in bndbox, found {', '.join(corners)}") from None
    return [left - 1, top - 1, right, bottom]


def _voc_size(root: ElementTree.Element) -> Size | None:
    """Return the size of the image, or None where the file has none or zeros."""
    sides = [root.findtext(f"size/{side}", "0") for side in ("width", "height")]
    try:
        width, height = (int(float(side)) for side in sides)
    except (ValueError, OverflowError):
        raise ValueError(f"expected numbers in size, found {', '.join(sides)}") from None
    return (width, height) if width and height else None


def _list_coco(tree: Folder | Archive, split: CocoSplit, skip: bool) -> AnnotatedSplit:
    """Read the JSON file of instances; class names are in the order of COCO's category ids.

    An annotation of an image that is not listed is a `ValueError`, or reported with `skip`.
    """
    try:
        content = json.loads(_read_text(tree, split.annotations))
        categories: dict[int, str] = {entry["id"]: entry["name"] for entry in content["categories"]}
        entries: dict[int, Any] = {entry["id"]: entry for entry in content["images"]}
        _check_coco(content, split.annotations)
        files: dict[int, str] = {image: entry["file_name"] for image, entry in entries.items()}
        objects: dict[int, Objects] = {image: [] for image in files}
        stray = [entry["id"] for entry in content["annotations"] if entry["image_id"] not in files]
        for entry in content["annotations"]:
            if entry["image_id"] in files:
                objects[entry["image_id"]].append(_coco_object(entry, categories))
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        reason = excerpt(repr(error))
        raise ValueError(
            f"{split.annotations} is not a file of COCO instances ({reason}): check `annotations` in the card"
        ) from None
    if stray:
        problem = (
            f"{split.annotations}: {len(stray)} annotations, such as {stray[0]}, are of images that are not listed"
        )
        if not skip:
            raise ValueError(f"{problem}: correct the file, or set on_error: skip in the card")
        print(f"{problem}: they are left out", file=sys.stderr)
    images = sorted(files, key=files.__getitem__)
    paths = [f"{split.folder}/{files[image]}".lstrip("/") for image in images]
    names = [categories[number] for number in sorted(categories)]
    annotations = [Annotation(_coco_size(entries[image]), objects[image]) for image in images]
    return AnnotatedSplit(paths, annotations, names)


def _check_coco(content: Any, file: str) -> None:
    """Refuse ids that occur twice, which would hide an image or a class, and values of a wrong type."""
    for part, key in (("images", "file_name"), ("categories", "name")):
        ids = Counter(entry["id"] for entry in content[part])
        repeated = [identifier for identifier, count in ids.items() if count > 1]
        if repeated:
            raise ValueError(f"{file}: {part} has the id {repeated[0]!r} twice: give each its own")
        for entry in content[part]:
            if not isinstance(entry[key], str):
                place = f"{part} id {entry['id']!r}"
                raise ValueError(f"{file}: {place}: {key} is {excerpt(repr(entry[key]), 60)}: expected a text")
    for entry in content["images"]:
        for side in ("width", "height"):
            if not isinstance(entry.get(side, 0), int | float):
                place = f"images id {entry['id']!r}"
                raise ValueError(f"{file}: {place}: {side} is {excerpt(repr(entry[side]), 60)}: expected a number")
    for entry in content["annotations"]:
        if not isinstance(entry.get("area") or 0, int | float):
            place = f"annotations id {entry.get('id')!r}"
            raise ValueError(f"{file}: {place}: area is {excerpt(repr(entry['area']), 60)}: expected a number")


def _coco_object(entry: Any, categories: dict[int, str]) -> dict[str, Any]:
    label = categories.get(entry["category_id"])
    box = entry.get("bbox")
    if box is not None:
        is_box = isinstance(box, list) and len(box) == 4 and all(isinstance(side, int | float) for side in box)
        left, top, width, height = box if is_box else 4 * [float("nan")]
        box = [left, top, left + width, top + height]
    return {
        "name": f"annotation {entry.get('id', '?')} ({label or 'category ' + str(entry['category_id'])})",
        "label": label,
        "box": box,
        "crowd": bool(entry.get("iscrowd")),
        "area": entry.get("area"),
        "mask": entry.get("segmentation"),
    }


def _coco_size(entry: Any) -> Size | None:
    return (entry["width"], entry["height"]) if "width" in entry and "height" in entry else None


def _read_text(tree: Folder | Archive, name: str) -> str:
    try:
        return _read(tree, name).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{name} is not UTF-8 (byte {error.start}): save it as UTF-8") from None


def _read(tree: Folder | Archive, name: str) -> bytes:
    try:
        return tree.read(name)
    except OSError:
        place = tree.root if isinstance(tree, Folder) else tree.path
        raise ValueError(f"{place} has no file {name!r}") from None
