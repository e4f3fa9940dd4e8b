"""WebDataset tars: the members of a sample share a key and differ in their extension."""

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

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
    file = members.get(f"{key}.{label}")
    if file is None:
        hint = "set label to the labels' extension, or label: null for images without labels"
        raise ValueError(f"{tar.path}: {excerpt(key)} has no .{label}: {hint}")
    try:
        return parse_target(tar.fetch(file).decode().strip())
    except UnicodeDecodeError:
        name = excerpt(f"{key}.{label}")
        raise ValueError(f"{tar.path}: {name} is not text: expected a class id or a class name") from None
