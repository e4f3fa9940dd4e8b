"""WebDataset tars: the members of a sample share a key and differ in their extension.

The library `webdataset` groups the members and decodes labels. Images are read in place, from local tars or from copies
of remote ones.
"""

import gzip
import io
import posixpath
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from ssl_core.config import nearest
from ssl_core.data.card import Card, WebDataset
from ssl_core.data.image_files import is_image
from ssl_core.data.records import OpenSource
from ssl_core.data.sources.file_list import File, Files
from ssl_core.data.sources.file_tree import BROKEN, Archive
from ssl_core.data.sources.labelled_files import LabelledFiles, Target, Targets, number_classes, parse_target
from ssl_core.data.sources.patterns import expand, expand_braces
from ssl_core.data.sources.remote import download, is_remote, without_secrets
from ssl_core.mistakes import excerpt
from ssl_core.provenance import file_digest

DECODED = ("json", "jsn", "npy", "npz", "mp", "msg", "cbor")  # labels that the library decodes; others are text
PICKLES = ("pyd", "pkl", "pickle", "pth", "pt")
MAX_SIZE = 1 << 30  # bytes of a decompressed member


def open_webdataset(source: WebDataset, card: Card, scratch: Path, stack: ExitStack) -> OpenSource:
    """List the tars of each split; `stack` closes them."""
    if source.label is not None and _kind(_split_label(source.label)[0]) in PICKLES:
        remedy = "a pickle can run any program when it is read: write the labels as .cls, .txt, .json or .npy"
        raise ValueError(f"{card.name}: source.label is {excerpt(repr(source.label))}: {remedy}")
    splits = {}
    for name, split in source.splits.items():
        tars = [stack.enter_context(_open_tar(address, scratch)) for address in _addresses(split.tars)]
        splits[name] = _list_split(tars, source, scratch)
    return number_classes(card, splits)


def _addresses(pattern: str) -> Iterator[str]:
    """Yield the paths and addresses of patterns that are joined by `::`, as in the library."""
    for part in [pattern] if Path(pattern).exists() else pattern.split("::"):
        if is_remote(part):
            yield from expand_braces(part)
        else:
            yield from map(str, expand(part.removeprefix("file://")))


@contextmanager
def _open_tar(address: str, scratch: Path) -> Iterator[Archive]:
    """Open a tar; a remote one is first copied into the folder `scratch`, until it is closed."""
    if not is_remote(address):
        with Archive.open(Path(address), scratch=scratch) as tar:
            yield tar
        return
    copy = scratch / ".spill-remote.tar"
    try:
        download(address, copy)
        digest = file_digest(copy)
        with Archive.open(copy, scratch=scratch, address=without_secrets(address)) as tar:
            copy.unlink()  # the open descriptor keeps the content
            tar.stamp = digest
            yield tar
    finally:
        copy.unlink(missing_ok=True)


def _list_split(tars: list[Archive], source: WebDataset, scratch: Path) -> LabelledFiles:
    targets = Targets()

    def images() -> Iterator[File]:
        for number, tar in enumerate(tars):
            tar_name = posixpath.basename(str(tar.path))
            for file, target in _samples(tar, source):
                targets.add(target)
                yield file._replace(name=f"{tar_name}/{file.name}", tar=number)

    def fetch(file: File) -> bytes:
        return _content(tars[file.tar], file)

    files = Files(images(), scratch)
    return LabelledFiles(files, targets, fetch, " ".join(tar.stamp for tar in tars))


def _samples(tar: Archive, source: WebDataset) -> Iterator[tuple[File, Target]]:
    """Yield the image and the target of each key of a tar, in the order of the images."""
    members = {file.name: file for file in tar.scan()}  # of one tar at a time
    images = []
    for sample in _group(tar, members):
        extension = _image_extension(tar, sample, source.image)
        if extension is not None:
            images.append((sample[extension], sample))
    place = {name: number for number, name in enumerate(members)}
    images.sort(key=lambda image: place[image[0].name])
    for file, sample in images:
        yield file, _read_target(tar, sample, source.label)


def _group(tar: Archive, members: Mapping[str, File]) -> Iterator[dict[str, Any]]:
    """Yield for each key its files by extension in lower case, and the key as `__key__`."""
    from webdataset.tariterators import base_plus_ext, group_by_keys

    named = [name for name in members if _has_key(name)]
    names = sorted(named, key=lambda name: base_plus_ext(name)[0] or "")  # a label may be anywhere in its tar
    files = ({"fname": name, "data": members[name], "__url__": tar.path} for name in names)
    try:
        yield from group_by_keys(files)
    except ValueError as error:
        raise ValueError(f"{tar.path}: {excerpt(error.args[0])}: rename one of these members") from None


def _has_key(name: str) -> bool:
    """Return whether the library finds a key in a name; of a long name without one, it would search for minutes."""
    base = posixpath.basename(name)
    return "." in base and not base.startswith(".")


def _image_extension(tar: Archive, sample: Mapping[str, Any], chosen: str | None) -> str | None:
    """Return the extension of a sample's image, None if it has no image."""
    key = sample["__key__"]
    allowed = None if chosen is None else chosen.lower().split(";")
    extensions = []
    for extension in sample:
        kind = extension.removesuffix(".gz")
        if is_image(f"{key}.{kind}") and (allowed is None or kind in allowed):
            extensions.append(extension)
    if len(extensions) > 1:
        raise ValueError(f"{tar.path}: {excerpt(key)} has several images: set image to the extension of one")
    return extensions[0] if extensions else None


def _read_target(tar: Archive, sample: Mapping[str, Any], label: str | None) -> Target:
    if label is None:
        return None
    key = sample["__key__"]
    file, extension, fields = _label_file(sample, label)
    if file is None:
        hint = "set label to the labels' extension, or label: null for images without labels"
        raise ValueError(f"{tar.path}: {excerpt(key)} has no .{extension}: {hint}")
    place = f"{tar.path}: {excerpt(f'{key}.{extension}')}"
    try:
        content = _content(tar, file)
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from None
    if not content.strip():
        raise ValueError(f"{place} is empty: expected a class id or a class name")
    kind = _kind(extension)
    if kind in DECODED:
        return _field_target(_decode(kind, content, place), [kind, *fields], place)
    try:
        return parse_target(content.decode("utf-8-sig"))
    except UnicodeDecodeError:
        raise ValueError(f"{place} is not text: expected a class id or a class name") from None


def _label_file(sample: Mapping[str, Any], label: str) -> tuple[File | None, str, list[str]]:
    """Return the file with a sample's label, its extension, and the fields in it: `json.species` has one field."""
    whole = label.lower()
    extension, fields = _split_label(label)
    for candidate, inside in ((whole, []), (extension, fields)):  # first an extension with dots, such as `top.cls`
        file = sample.get(candidate) or sample.get(f"{candidate}.gz")
        if file is not None:
            return file, candidate, inside
    return None, extension, fields


def _split_label(label: str) -> tuple[str, list[str]]:
    """Split `json.meta.species` into the extension `json` and the fields `meta` and `species`."""
    parts = label.split(".")
    for end, part in enumerate(parts, start=1):
        if part.lower() in DECODED:
            return ".".join(parts[:end]).lower(), parts[end:]
    return label.lower(), []


def _kind(extension: str) -> str:
    """Return the last part of an extension in lower case, without `.gz`."""
    return extension.lower().removesuffix(".gz").rpartition(".")[2]


def _content(tar: Archive, file: File) -> bytes:
    """Return a member's bytes, decompressed if its name ends with `.gz`."""
    packed = tar.fetch(file)
    if not file.name.lower().endswith(".gz"):
        return packed
    try:
        with gzip.open(io.BytesIO(packed)) as unpacked:
            content = unpacked.read(MAX_SIZE + 1)
    except BROKEN as error:
        raise ValueError(f"it cannot be decompressed ({excerpt(error)})") from None
    if len(content) > MAX_SIZE:
        raise ValueError(f"it has more than {MAX_SIZE} bytes when decompressed: make it smaller")
    return content


def _decode(kind: str, content: bytes, place: str) -> Any:
    from webdataset.autodecode import decoders

    try:
        return decoders[kind](content)
    except ImportError as error:
        raise ValueError(f"{place} needs the package {error.name}: pip install {error.name}") from None
    except Exception as error:  # each decoder has errors of its own
        raise ValueError(f"{place} is not {kind.upper()}: {excerpt(error)}") from None


def _field_target(value: Any, path: list[str], place: str) -> Target:
    """Return the target in a decoded label at a path such as `json`, `meta`, `species`."""
    kind, *fields = path
    value = _plain(value)
    for position, field in enumerate(fields):
        if isinstance(value, list) and field.isdecimal() and int(field) < len(value):
            value = _plain(value[int(field)])
        elif isinstance(value, dict) and field in value:
            value = _plain(value[field])
        else:
            above = ".".join([kind, *fields[:position]])
            kind_of_value = type(value).__name__
            if isinstance(value, dict):
                kind_of_value = f"an object{excerpt(nearest(field, map(str, value)))}"
            raise ValueError(f"{place} has no field {excerpt(field)!r} in {above}, which is {kind_of_value}")
    if isinstance(value, dict | list):
        keys = ", ".join(map(str, value)) if isinstance(value, dict) else f"0 to {len(value) - 1}"
        remedy = f"set label to one field, {kind}.FIELD; fields: {excerpt(keys)}"
        raise ValueError(f"{place} holds several values: {remedy}")
    if value is None or value == "" or value != value:  # NaN
        raise ValueError(f"{place} has no label in the field {'.'.join(fields)!r}: expected a class id or a class name")
    return parse_target(value)


def _plain(value: Any) -> Any:
    """Return an array as nested lists, one of a single element as that element, and bytes as text."""
    if isinstance(value, np.ndarray | np.generic):
        value = value.item() if value.size == 1 else value.tolist()
    return value.decode("utf-8", "backslashreplace") if isinstance(value, bytes) else value
