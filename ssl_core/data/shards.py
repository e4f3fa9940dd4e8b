"""Shards: tars with an index for DALI, and the manifest of a data set's shards. Torch-free.

A sample is `00000042.jpg` (or `.png`) followed by `00000042.meta.i64`: two little-endian int64, the label (-1: none)
and the index in the split, which is also the key. Keys are short and without dots and spaces, since DALI silently
misreads others. A multi-label sample has the label -1 and a third member, `00000042.labels.u8` (`multilabels.py`). A
sample whose objects are annotated has `00000042.boxes` as well (`boxes.py`).

The index is a text file: `v1.2 <samples>`, then one line per sample with extension, offset, size and name of each
member. A file `.names` beside it has the name of each image in the source, as one JSON string per line, for messages.
This is the only module that writes tars, indices and names.
"""

import hashlib
import json
import os
import re
import struct
import tarfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
from pydantic import Field, PrivateAttr, ValidationError, model_validator

from ssl_core.config import Strict
from ssl_core.files import atomic, read_json, write_text
from ssl_core.mistakes import excerpt
from ssl_core.provenance import canonical, digest, file_digest

BLOCK = 512  # a tar's unit, in bytes
MAX_IMAGES = 10**8  # keys have eight digits
META = "meta.i64"
LABELS = "labels.u8"
META_OFFSET = re.compile(r" meta\.i64 (\d+) ")  # in a line of an index: the position of label and dataset index
BOXES = "boxes"
HEADER = tarfile.TarInfo().tobuf(tarfile.USTAR_FORMAT)  # of an empty file with an empty name
HEADER_SUM = sum(HEADER[:124] + HEADER[135:148] + 8 * b" " + HEADER[156:])  # without name and size


class Shard(Strict):
    """One tar; its index is the file of the same stem."""

    file: str = Field(pattern=r"^[^/]+\.tar$")
    images: int
    bytes: int
    sha256: str
    index_sha256: str | None = None  # None: not checked


class Rejected(Strict):
    """An image of the source that is not in the shards, and the reason."""

    name: str
    reason: str


class Objects(Strict):
    """The annotated objects of a split."""

    count: int
    masks: int  # objects with a mask
    empty: int  # images without objects
    unused: tuple[Rejected, ...] = ()  # objects of the source that are not in the shards


class Split(Strict):
    """Images 0..`images` - 1 of a split, spread over shards in a fixed random order."""

    images: int
    labelled: bool  # every image has a label
    bytes: int
    class_counts: tuple[int, ...] | None
    shards: tuple[Shard, ...]
    rejected: tuple[Rejected, ...]
    unread: dict[str, int] = Field(default_factory=dict)  # pictures of other formats, by extension
    objects: Objects | None = None  # None: not annotated
    reduced: int = 0  # images that `max_side` made smaller

    @model_validator(mode="after")
    def _add_up(self) -> "Split":
        total = sum(shard.images for shard in self.shards)
        if total != self.images:
            raise ValueError(f"{self.images} images, but its shards hold {total}")
        return self


class Manifest(Strict):
    """The content of a folder of shards. The same card and source give the same manifest, byte for byte."""

    version: Literal[1] = 1
    dataset: str
    image_size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    classes: tuple[str, ...] | None
    avoid: tuple[str, ...]
    splits: dict[str, Split]
    _folder: Path = PrivateAttr(default=Path())

    @classmethod
    def load(cls, path: Path) -> "Manifest":
        """Read a manifest; raise `ValueError` if the file is missing, changed or not a manifest."""
        content = read_json(path)
        sha256 = content.pop("sha256", None) if isinstance(content, dict) else None
        try:
            manifest = cls.model_validate(content, strict=False)
        except ValidationError as error:
            problem = error.errors(include_url=False)[0]
            key = excerpt(".".join(map(str, problem["loc"])))
            raise ValueError(f"{path} is not a manifest ({key}: {problem['msg']}): shard the data set again") from None
        if sha256 is not None and sha256 != digest(canonical(content)):
            raise ValueError(f"{path} was changed after it was written: remove {path.parent} and shard again")
        manifest._folder = path.parent
        return manifest

    def content(self) -> dict[str, Any]:
        """Return the content of the file: all fields and their sha256, without optional fields that are empty."""
        fields = self.model_dump(mode="json")
        for split in fields["splits"].values():
            for key in ("unread", "reduced", "objects"):
                if not split[key]:
                    del split[key]
        return {**fields, "sha256": digest(canonical(fields))}

    @property
    def folder(self) -> Path:
        """The folder of the manifest and its shards."""
        return self._folder

    def split(self, name: str) -> Split:
        """Return a split; raise `ValueError` with the names of all splits if it is missing."""
        if name not in self.splits:
            raise ValueError(f"{self.dataset} has no split {name!r}: it has {', '.join(self.splits)}")
        return self.splits[name]

    def tars(self, split: str) -> list[Path]:
        """Return the paths of a split's tars, in order."""
        return [self.folder / shard.file for shard in self.split(split).shards]

    def indices(self, split: str) -> list[Path]:
        """Return the paths of a split's indices, in the tars' order."""
        return [tar.with_suffix(".idx") for tar in self.tars(split)]


def verify(manifest: Manifest, split: str, *, deep: bool = False) -> None:
    """Raise a `ValueError` for the first tar or index that is missing, truncated or changed.

    Indices are always hashed, once per process as long as they do not change; tars only if `deep`.
    """
    again = f"remove {manifest.folder} and run the workflow again"
    for shard in manifest.split(split).shards:
        tar = manifest.folder / shard.file
        index = tar.with_suffix(".idx")
        for path in (tar, index):
            if not path.is_file():
                raise ValueError(f"{path} is missing: {again}")
        if tar.stat().st_size != shard.bytes:
            raise ValueError(f"{tar} has {tar.stat().st_size} bytes instead of {shard.bytes}: {again}")
        state = index.stat()
        lines, sha256 = _summarise(index, state.st_mtime_ns, state.st_size)
        if lines != shard.images + 1:
            raise ValueError(f"{index} has {lines} lines instead of {shard.images + 1}: {again}")
        if shard.index_sha256 is not None and sha256 != shard.index_sha256:
            raise ValueError(f"{index} is not the file that was written (its sha256 differs): {again}")
        if deep and file_digest(tar) != shard.sha256:
            raise ValueError(f"{tar} is not the file that was written (its sha256 differs): {again}")


@cache
def _summarise(index: Path, modified: int, size: int) -> tuple[int, str]:
    """Return the number of lines and the sha256 of an index with this time and size."""
    content = index.read_bytes()
    return content.count(b"\n"), digest(content)


class ShardWriter:
    """Writes a deterministic USTAR tar and, meanwhile, the index that DALI's wds2idx would make of it."""

    def __init__(self, tar: Path, index: Path, *, name: str) -> None:
        self._tar = open(tar, "wb")  # noqa: SIM115 - new_shard closes it
        self._index = index
        self._name = name
        self._hash = hashlib.sha256()
        self._lines: list[str] = []
        self.bytes = 0

    def add(
        self,
        number: int,
        extension: str,
        image: bytes,
        label: int,
        labels: bytes | None = None,
        boxes: bytes | None = None,
    ) -> None:
        """Append the image with dataset index `number` and its label (-1: none).

        A multi-label image has the label -1 and one byte per class in `labels`; `boxes` are its objects, if annotated.
        """
        members = [(extension, image), (META, struct.pack("<qq", label, number))]
        if labels is not None:
            members.append((LABELS, labels))
        if boxes is not None:
            members.append((BOXES, boxes))
        fields = [self._add_member(f"{number:08d}.{kind}", kind, content) for kind, content in members]
        self._lines.append(" ".join(fields))

    def close(self) -> Shard:
        """End the tar, write the index and return the shard's entry for the manifest."""
        self._write(bytes(-(self.bytes + 2 * BLOCK) % tarfile.RECORDSIZE + 2 * BLOCK))
        self._tar.close()
        index = index_text(self._lines)
        self._index.write_text(index)
        return Shard(
            file=self._name,
            images=len(self._lines),
            bytes=self.bytes,
            sha256=self._hash.hexdigest(),
            index_sha256=digest(index),
        )

    def abandon(self) -> None:
        """Close the tar; after `close` this does nothing."""
        self._tar.close()

    def _add_member(self, name: str, extension: str, content: bytes) -> str:
        """Write one member; return its fields of the index."""
        size = len(content)
        fields = f"{extension} {self.bytes + BLOCK} {size} {name}"
        self._write(b"".join((tar_header(name, size), content, bytes(-size % BLOCK))))
        return fields

    def _write(self, content: bytes) -> None:
        self._tar.write(content)
        self._hash.update(content)
        self.bytes += len(content)


def tar_header(name: str, size: int) -> bytes:
    """Return the USTAR header that `tarfile` writes, in a tenth of the time; `name` is ASCII, at most 99 characters.

    Owner, group and time are zero, so that the same images give the same tar.
    """
    encoded, digits = name.encode("ascii"), b"%011o" % size
    checksum = HEADER_SUM + sum(encoded) + sum(digits)
    padding = HEADER[len(encoded) : 124]
    return b"".join((encoded, padding, digits, HEADER[135:148], b"%06o" % checksum, HEADER[154:]))


@contextmanager
def new_shard(path: Path) -> Iterator[ShardWriter]:
    """Yield a writer. The index and then the tar appear by rename, only if the block ends without an error."""
    with ExitStack() as stack:
        tar = stack.enter_context(atomic(path))
        writer = ShardWriter(tar, stack.enter_context(atomic(path.with_suffix(".idx"))), name=path.name)
        stack.callback(writer.abandon)
        yield writer


def index_text(lines: Sequence[str]) -> str:
    """Return the text of an index with one line per sample."""
    return "\n".join([f"v1.2 {len(lines)}", *lines, ""])


def read_index(tar: Path) -> list[list[str]]:
    """Return the index of a tar: for each sample the extension, offset, size and name of each member."""
    lines = tar.with_suffix(".idx").read_text(encoding="ascii").splitlines()
    return [line.split(" ") for line in lines[1:]]


def write_names(tar: Path, names: Sequence[str]) -> None:
    """Write the names that the images of a tar have in the source, in the tar's order."""
    write_text(tar.with_suffix(".names"), "".join(json.dumps(name) + "\n" for name in names))


def source_name(tar: Path, member: str) -> str | None:
    """Return the name in the source of an image such as `00000042.jpg`; None if it is not recorded."""
    try:
        names = tar.with_suffix(".names").read_text().splitlines()
        members = [fields[3] for fields in read_index(tar)]
        return json.loads(names[members.index(member)])
    except (OSError, ValueError, IndexError):
        return None


def read_labels(manifest: Manifest, split: str) -> list[int]:
    """Return the labels of a split's images in the order of their indices (-1: none), without reading the images."""
    labels = np.full(manifest.split(split).images, -1)
    for tar in manifest.tars(split):
        offsets = META_OFFSET.findall(tar.with_suffix(".idx").read_text(encoding="ascii"))
        positions = np.array(offsets, dtype=np.int64) // 8
        words = np.memmap(tar, dtype="<i8", mode="r")
        labels[words[positions + 1]] = words[positions]
    return labels.tolist()


def renumber(path: Path, indices: Sequence[int]) -> Shard:
    """Write a shard again with new dataset indices, one per image."""
    with new_shard(path) as writer, open(path, "rb") as tar:
        for number, fields in zip(indices, read_index(path), strict=True):
            label, _ = _read_meta(tar, fields)
            optional = [_read_optional(tar, fields, kind) for kind in (LABELS, BOXES)]
            writer.add(number, fields[0], read_member(tar, fields, 0), label, *optional)
        return writer.close()


def sample_index(fields: Sequence[str]) -> int:
    """Return the dataset index of a sample from its line of the index."""
    return int(fields[3][:8])


def member_position(fields: Sequence[str], kind: str) -> int | None:
    """Return the position of a member with this extension in a line of an index, or None."""
    kinds = fields[::4]
    return kinds.index(kind) if kind in kinds else None


def _read_optional(tar: BinaryIO, fields: Sequence[str], kind: str) -> bytes | None:
    position = member_position(fields, kind)
    return None if position is None else read_member(tar, fields, position)


def _read_meta(tar: BinaryIO, fields: Sequence[str]) -> tuple[int, int]:
    """Return label and dataset index of a sample."""
    return struct.unpack("<qq", read_member(tar, fields, 1))


def read_member(tar: BinaryIO, fields: Sequence[str], member: int) -> bytes:
    """Read a member of a sample: the image (0), the metadata (1), or an optional one."""
    offset, size = fields[4 * member + 1], fields[4 * member + 2]
    return os.pread(tar.fileno(), int(size), int(offset))
