"""Shards: tars and their indices as DALI reads them, and the manifest that says what is in them. Torch-free.

A sample is `00000042.jpg` (or `.png`) followed by `00000042.meta.i64`: two little-endian int64, the label (-1: none)
and the index in the split, which is also the key. The key is short and has neither dots nor spaces, or DALI would
misread the tar without a word.
"""

import hashlib
import os
import struct
import tarfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, PrivateAttr, ValidationError, model_validator

from ssl_core.config import Strict
from ssl_core.files import atomic, read_json
from ssl_core.provenance import canonical, digest

BLOCK = 512  # a tar's unit, in bytes
MAX_IMAGES = 10**8  # what eight digits can name
META = "meta.i64"
HEADER = tarfile.TarInfo().tobuf(tarfile.USTAR_FORMAT)  # of an empty file without a name
HEADER_SUM = sum(HEADER[:124] + HEADER[135:148] + 8 * b" " + HEADER[156:])  # but for name and size


class Shard(Strict):
    """One tar; its index is the file of the same stem."""

    file: str = Field(pattern=r"^[^/]+\.tar$")
    images: int
    bytes: int
    sha256: str
    index_sha256: str | None = None  # None: not checked


class Rejected(Strict):
    """An image of the source that is not in the shards, and why."""

    name: str
    reason: str


class Split(Strict):
    """Images 0..`images` - 1 of a split, spread over shards in a fixed random order."""

    images: int
    labelled: bool  # every image has a label
    bytes: int
    class_counts: tuple[int, ...] | None
    shards: tuple[Shard, ...]
    rejected: tuple[Rejected, ...]

    @model_validator(mode="after")
    def _add_up(self) -> "Split":
        held = sum(shard.images for shard in self.shards)
        if held != self.images:
            raise ValueError(f"{self.images} images, but its shards hold {held}")
        return self


class Manifest(Strict):
    """What a folder of shards holds. The same card and source give the same manifest, byte for byte."""

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
        """Read a manifest; a `ValueError` names the file if it is missing, changed or says something else."""
        content = read_json(path)
        said = content.pop("sha256", None) if isinstance(content, dict) else None
        try:
            manifest = cls.model_validate(content, strict=False)
        except ValidationError as error:
            problem = error.errors(include_url=False)[0]
            where = " ".join(".".join(map(str, problem["loc"])).split())
            raise ValueError(f"{path} is no manifest ({where}: {problem['msg']}): shard the data set again") from None
        if said is not None and said != digest(canonical(content)):
            raise ValueError(f"{path} was changed after it was written: remove {path.parent} and shard again")
        manifest._folder = path.parent
        return manifest

    def content(self) -> dict[str, Any]:
        """Return what stands in the file: all of it, and the sha256 of that."""
        said = self.model_dump(mode="json")
        return {**said, "sha256": digest(canonical(said))}

    @property
    def folder(self) -> Path:
        """Where the shards lie."""
        return self._folder

    def split(self, name: str) -> Split:
        """Return a split; raise a `ValueError` that lists the splits if there is none of that name."""
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
    """Raise a `ValueError` that names the first tar or index that is missing, cut short or changed.

    Indices are always hashed, tars if `deep`.
    """
    again = f"remove {manifest.folder} and shard {manifest.dataset} again"
    for shard in manifest.split(split).shards:
        tar = manifest.folder / shard.file
        index = tar.with_suffix(".idx")
        for path in (tar, index):
            if not path.is_file():
                raise ValueError(f"{path} is missing: {again}")
        if tar.stat().st_size != shard.bytes:
            raise ValueError(f"{tar} has {tar.stat().st_size} bytes instead of {shard.bytes}: {again}")
        lines = index.read_bytes().count(b"\n")
        if lines != shard.images + 1:
            raise ValueError(f"{index} has {lines} lines instead of {shard.images + 1}: {again}")
        if shard.index_sha256 is not None and file_sha256(index) != shard.index_sha256:
            raise ValueError(f"{index} is not the file that was written (its sha256 differs): {again}")
        if deep and file_sha256(tar) != shard.sha256:
            raise ValueError(f"{tar} is not the file that was written (its sha256 differs): {again}")


class ShardWriter:
    """Writes a deterministic USTAR tar and, on the way, the index that DALI's wds2idx would make of it."""

    def __init__(self, tar: Path, index: Path, *, name: str) -> None:
        self._tar = open(tar, "wb")  # noqa: SIM115 - new_shard closes it
        self._index = index
        self._name = name
        self._hash = hashlib.sha256()
        self._lines: list[str] = []
        self.bytes = 0

    def add(self, number: int, extension: str, image: bytes, label: int) -> None:
        """Append the image with dataset index `number` and its label (-1: none)."""
        key = f"{number:08d}"
        members = ((extension, image), (META, struct.pack("<qq", label, number)))
        line = [self._member(key, extension, content) for extension, content in members]
        self._lines.append(" ".join(line))

    def close(self) -> Shard:
        """End the tar, write the index and return what the manifest says of them."""
        self._write(bytes(-(self.bytes + 2 * BLOCK) % tarfile.RECORDSIZE + 2 * BLOCK))
        self._tar.close()
        index = "\n".join([f"v1.2 {len(self._lines)}", *self._lines, ""])
        self._index.write_text(index)
        return Shard(
            file=self._name,
            images=len(self._lines),
            bytes=self.bytes,
            sha256=self._hash.hexdigest(),
            index_sha256=digest(index),
        )

    def abandon(self) -> None:
        """Let go of the tar; after `close` this does nothing."""
        self._tar.close()

    def _member(self, key: str, extension: str, content: bytes) -> str:
        name, size = f"{key}.{extension}", len(content)
        line = f"{extension} {self.bytes + BLOCK} {size} {name}"
        self._write(b"".join((tar_header(name, size), content, bytes(-size % BLOCK))))
        return line

    def _write(self, content: bytes) -> None:
        self._tar.write(content)
        self._hash.update(content)
        self.bytes += len(content)


def tar_header(name: str, size: int) -> bytes:
    """Return what `tarfile` makes of a file in USTAR, in a tenth of the time; the name is ASCII, at most 99 characters.

    Owner, group and time are zero: the same images, the same tar.
    """
    named, digits = name.encode("ascii"), b"%011o" % size
    checksum = HEADER_SUM + sum(named) + sum(digits)
    return b"".join((named, HEADER[len(named) : 124], digits, HEADER[135:148], b"%06o" % checksum, HEADER[154:]))


@contextmanager
def new_shard(path: Path) -> Iterator[ShardWriter]:
    """Give a writer; when its block ends well the index and then the tar appear by rename, else neither does."""
    with ExitStack() as stack:
        tar = stack.enter_context(atomic(path))
        writer = ShardWriter(tar, stack.enter_context(atomic(path.with_suffix(".idx"))), name=path.name)
        stack.callback(writer.abandon)
        yield writer


def read_shard(path: Path) -> Iterator[tuple[int, str, bytes, int]]:
    """Iterate over a shard as (index, extension, image, label)."""
    with open(path, "rb") as tar:
        for line in path.with_suffix(".idx").read_text().splitlines()[1:]:
            extension, offset, size, _, _, meta_offset, _, _ = line.split(" ")
            label, number = struct.unpack("<qq", os.pread(tar.fileno(), 16, int(meta_offset)))
            yield number, extension, os.pread(tar.fileno(), int(size), int(offset)), label


def read_labels(manifest: Manifest, split: str) -> list[int]:
    """Return the labels of a split's images in the order of their indices (-1: none), without reading the images."""
    labels = [-1] * manifest.split(split).images
    for path in manifest.tars(split):
        with open(path, "rb") as tar:
            for line in path.with_suffix(".idx").read_text().splitlines()[1:]:
                label, number = struct.unpack("<qq", os.pread(tar.fileno(), 16, int(line.split(" ")[5])))
                labels[number] = label
    return labels


def renumber(path: Path, indices: Sequence[int]) -> Shard:
    """Write a shard again with these dataset indices for its images, in their order."""
    with new_shard(path) as writer:
        for index, (_, extension, image, label) in zip(indices, read_shard(path), strict=True):
            writer.add(index, extension, image, label)
        return writer.close()


def file_sha256(path: Path) -> str:
    """Return a file's sha256 in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
