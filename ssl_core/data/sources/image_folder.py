"""Folders of images, and tars and zips of such folders: the class is the name of the folder, or in a text file."""

from contextlib import ExitStack
from functools import partial
from pathlib import Path

from ssl_core.data.card import Annotations, Card, FolderSplit, ImageFolder
from ssl_core.data.image_files import EXTENSIONS, list_counts
from ssl_core.data.records import OpenSource, printable
from ssl_core.data.sources.file_tree import Archive, Folder
from ssl_core.data.sources.labelled_files import LabelledFiles, Targets, number_classes
from ssl_core.data.sources.zip_archive import ZipArchive, is_zip
from ssl_core.mistakes import excerpt


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
    annotations = split.annotations
    classes = {} if annotations is None else _read_annotations(tree, annotations)
    for file in files:
        if annotations is not None:
            if file.name not in classes:
                image = excerpt(f"{place}/{file.name}")
                raise ValueError(f"{annotations.file} has no line for {image}: add one or remove the image")
            targets.add(classes[file.name])
        elif split.labels == "folder":
            targets.add(_class_folder(file.name, place))
        else:
            targets.add(None)
    return LabelledFiles(files, targets, partial(tree.fetch, folder=split.folder), tree.stamp, tree.unread)


def _class_folder(name: str, place: str) -> str:
    folder, _, rest = name.partition("/")
    if not rest:
        image = excerpt(f"{place}/{name}")
        raise ValueError(f"{image} is in no class folder: move it into one, or set labels: none for the split")
    return printable(folder)


def _read_annotations(tree: Folder | Archive, annotations: Annotations) -> dict[str, str]:
    """Return the class of each image that a text file names."""
    try:
        text = tree.read(annotations.file).decode()
    except (OSError, UnicodeDecodeError) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or "not UTF-8"
        raise ValueError(f"annotations.file {annotations.file} cannot be read: {reason}") from None
    classes = {}
    for number, line in enumerate(text.splitlines(), start=1):
        columns = line.split(annotations.separator)
        if len(columns) <= max(annotations.image_column, annotations.class_column):
            place = f"{annotations.file} line {number}"
            raise ValueError(f"{place} has {len(columns)} columns: check separator, image_column and class_column")
        classes[columns[annotations.image_column]] = columns[annotations.class_column]
    return classes
