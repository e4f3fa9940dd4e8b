"""WebDataset tars: the members of a sample share a key and differ in their extension."""

import json
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from ssl_core.config import nearest
from ssl_core.data.card import Card, WebDataset
from ssl_core.data.image_files import is_image
from ssl_core.data.records import OpenSource
from ssl_core.data.sources.file_list import File, Files
from ssl_core.data.sources.file_tree import Archive
from ssl_core.data.sources.labelled_files import LabelledFiles, Target, Targets, number_classes, parse_target
from ssl_core.data.sources.patterns import expand
from ssl_core.mistakes import excerpt


def open_webdataset(source: WebDataset, card: Card, scratch: Path, stack: ExitStack) -> OpenSource:
    """List the tars of each split; `stack` closes them."""
    splits = {}
    for name, split in source.splits.items():
        paths = expand(split.tars)
        tars = [stack.enter_context(Archive.open(path, scratch=scratch)) for path in paths]
        splits[name] = _list_split(tars, source, scratch)
    return number_classes(card, splits)


def _list_split(tars: list[Archive], source: WebDataset, scratch: Path) -> LabelledFiles:
    targets = Targets()

    def images() -> Iterator[File]:
        for number, tar in enumerate(tars):
            for file, target in _samples(tar, source):
                targets.add(target)
                yield file._replace(name=f"{tar.path.name}/{file.name}", tar=number)

    def fetch(file: File) -> bytes:
        return tars[file.tar].fetch(file)

    files = Files(images(), scratch)
    return LabelledFiles(files, targets, fetch, " ".join(tar.stamp for tar in tars))


def _samples(tar: Archive, source: WebDataset) -> Iterator[tuple[File, Target]]:
    """Yield the image and the target of each key of a tar."""
    members = {file.name: file for file in tar.scan()}  # of one tar at a time
    keys = set()
    for name, file in members.items():
        key, extension = _split_name(name)
        if not is_image(name) or source.image not in (None, extension):
            continue
        if key in keys:
            raise ValueError(f"{tar.path}: {excerpt(key)} has several images: set image to the extension of one")
        keys.add(key)
        yield file, _read_target(tar, key, members, source.label)


def _split_name(member: str) -> tuple[str, str]:
    """Split a member's name at the first dot of its last part: `a/b.seg.png` is the key `a/b` and `seg.png`."""
    folder, _, base = member.rpartition("/")
    stem, _, extension = base.partition(".")
    return f"{folder}/{stem}".lstrip("/"), extension


def _read_target(tar: Archive, key: str, members: dict[str, File], label: str | None) -> Target:
    if label is None:
        return None
    extension, fields = _split_label(label)
    file = members.get(f"{key}.{label}")
    if file is not None:  # an extension with dots, such as `top.cls`
        extension, fields = label, []
    file = file or members.get(f"{key}.{extension}")
    if file is None:
        hint = "set label to the labels' extension, or label: null for images without labels"
        raise ValueError(f"{tar.path}: {excerpt(key)} has no .{extension}: {hint}")
    place = f"{tar.path}: {excerpt(f'{key}.{extension}')}"
    try:
        text = tar.fetch(file).decode("utf-8-sig").strip()
    except UnicodeDecodeError:
        raise ValueError(f"{place} is not text: expected a class id or a class name") from None
    if not text:
        raise ValueError(f"{place} is empty: expected a class id or a class name")
    if extension.split(".")[-1] == "json":
        return _json_target(text, fields, place)
    return parse_target(text)


def _split_label(label: str) -> tuple[str, list[str]]:
    """Split `json.meta.species` into the extension `json` and the fields `meta` and `species`."""
    parts = label.split(".")
    if "json" not in parts:
        return label, []
    end = parts.index("json") + 1
    return ".".join(parts[:end]), parts[end:]


def _json_target(text: str, fields: list[str], place: str) -> Target:
    try:
        value: Any = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{place} is not JSON: {excerpt(error)}") from None
    for position, field in enumerate(fields):
        if isinstance(value, list) and field.isdecimal() and int(field) < len(value):
            value = value[int(field)]
        elif isinstance(value, dict) and field in value:
            value = value[field]
        else:
            path = ".".join(["json", *fields[:position]])
            keys = f"an object{excerpt(nearest(field, value))}" if isinstance(value, dict) else type(value).__name__
            raise ValueError(f"{place} has no field {excerpt(field)!r} in {path}, which is {keys}")
    if isinstance(value, dict | list):
        keys = ", ".join(value) if isinstance(value, dict) else f"0 to {len(value) - 1}"
        raise ValueError(f"{place} holds several values: set label to one field, json.FIELD; fields: {excerpt(keys)}")
    if value is None or value == "":
        raise ValueError(f"{place} has no label in the field {'.'.join(fields)!r}: expected a class id or a class name")
    return parse_target(value)
