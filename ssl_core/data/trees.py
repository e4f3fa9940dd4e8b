"""Folders of images and tars of such folders, read alike. Tars are never unpacked into files."""

import bz2
import gzip
import hashlib
import lzma
import os
import posixpath
import tarfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from tqdm import tqdm

from ssl_core.data.images import is_image
from ssl_core.data.shards import BLOCK, file_sha256

OPENERS = {b"\x1f\x8b": gzip.open, b"BZ": bz2.open, b"\xfd7": lzma.open}  # by a file's first two bytes
BROKEN = (tarfile.TarError, OSError, EOFError, zlib.error, lzma.LZMAError)  # what readers raise on damaged archives
ABSENT = "does not exist: put the data there, or mend the card's path or the ${VARIABLE} in it"


def stamp(path: str | Path) -> bytes:
    """Return what changes when a file does; a file that cannot be reached is found out when it is read."""
    try:
        status = os.stat(path)
    except OSError:
        return b"unreachable;"
    return f"{status.st_size} {status.st_mtime_ns};".encode()


class Folder:
    """A folder on disk; names are paths inside it."""

    def __init__(self, root: Path) -> None:
        if not root.is_dir():
            if root.is_file():
                raise ValueError(f"{root} is no folder: for an archive say type: image_tar")
            raise ValueError(f"{root} {ABSENT}")
        self.root = root
        self.stamp = ""

    def files(self, folder: str) -> list[str]:
        """Return the files below `folder` that are images by their names, relative to it; links are followed."""
        found, stamps = [], hashlib.sha256()
        top = self.root / folder
        if not top.is_dir():
            inside = ", ".join(sorted(entry.name for entry in self.root.iterdir() if entry.is_dir())[:8])
            raise ValueError(f"{self.root} has no folder {folder!r}; it has: {inside or 'no folders'}")
        for parent, _, files in os.walk(top, followlinks=True):
            prefix = os.path.relpath(parent, top)
            found += [name if prefix == "." else f"{prefix}/{name}" for name in files]
        found = sorted(name for name in found if is_image(name))
        for name in found:
            stamps.update(stamp(os.path.join(top, name)))
        self.stamp = stamps.hexdigest()
        return found

    def read(self, name: str) -> bytes:
        """Return a file's bytes; a name that leads out of the folder, as a list in it may say, is a `ValueError`."""
        if posixpath.normpath(name).startswith(("/", "..")):
            raise ValueError(f"{name!r} lies outside {self.root}")
        with open(os.path.join(self.root, name), "rb", buffering=0) as file:  # twice as fast as pathlib on small files
            return file.readall()


class Archive(NamedTuple):
    """An open tar: its regular files as name -> (offset, size), without links, devices and names that point outside."""

    path: Path
    descriptor: int  # read with pread, so that forked processes do not move each other's position
    members: dict[str, tuple[int, int]]
    stamp: str

    @classmethod
    @contextmanager
    def open(cls, path: Path, *, scratch: Path, sha256: str | None = None) -> "Iterator[Archive]":
        """List a tar; a compressed one is first written uncompressed into the folder `scratch` and removed at the end.

        Raises a `ValueError` if there is no such file, or it is damaged or not the file with this sha256.
        """
        if not path.is_file():
            raise ValueError(f"{path} {'is a folder: say type: image_folder' if path.is_dir() else ABSENT}")
        if sha256 is not None and file_sha256(path) != sha256:
            raise ValueError(f"{path} has another sha256 than the card says: get the archive again")
        status = path.stat()
        spill = scratch / f".spill-{path.name}"
        try:
            with open(path, "rb") as file:
                opener = OPENERS.get(file.read(2))
            plain = path
            if opener is not None:
                _decompress(path, spill, opener)
                plain = spill
            members = _members(plain)
            descriptor = os.open(plain, os.O_RDONLY)
        except BROKEN as error:
            spill.unlink(missing_ok=True)
            if isinstance(error, OSError) and error.errno is not None:  # a full disk, no permission
                raise ValueError(f"{path} cannot be read or held in {scratch}: {error.strerror}") from None
            reason = " ".join(str(error).split())
            raise ValueError(f"{path} is damaged or no tar ({reason}): get the archive again") from None
        spill.unlink(missing_ok=True)  # the open descriptor keeps it alive; a killed process leaves nothing behind
        try:
            yield cls(path, descriptor, members, f"{status.st_size} {status.st_mtime_ns}")
        finally:
            os.close(descriptor)

    def files(self, folder: str) -> list[str]:
        """Return the images below `folder` by their names, sorted, relative to it."""
        prefix = f"{folder.strip('/')}/" if folder.strip("/") else ""
        found = sorted(name[len(prefix) :] for name in self.members if name.startswith(prefix) and is_image(name))
        if not found:
            inside = ", ".join(sorted({posixpath.dirname(name) for name in self.members})[:8]) or "none"
            raise ValueError(f"{self.path} has no images below {folder!r}; folders in it: {inside}")
        return found

    def read(self, name: str) -> bytes:
        """Return a member's bytes."""
        if name not in self.members:
            raise ValueError(f"{self.path} has no file {name!r}")
        offset, size = self.members[name]
        return os.pread(self.descriptor, size, offset)


def _decompress(path: Path, spill: Path, opener: Callable[[BinaryIO], Any]) -> None:
    size = path.stat().st_size
    bar = tqdm(total=size, desc=f"unpacking {path.name}", unit="B", unit_scale=True, leave=False, disable=None)
    with bar, open(path, "rb") as packed, opener(packed) as content, open(spill, "wb") as file:
        while block := content.read(1 << 22):
            file.write(block)
            bar.update(packed.tell() - bar.n)


def _members(path: Path) -> dict[str, tuple[int, int]]:
    found = {}
    with tarfile.open(path, "r:") as archive:
        while member := archive.next():
            # or a million headers pile up
            archive.members = []  # pyright: ignore[reportAttributeAccessIssue]
            name = posixpath.normpath(member.name)
            if member.isreg() and not member.issparse() and not name.startswith(("/", "..")):
                found[name] = (member.offset_data, member.size)
        end = archive.offset
    # tarfile takes a broken header in the middle for the end, and a tar cut between members for a whole one
    with open(path, "rb") as file:
        file.seek(end)
        if file.read(BLOCK) != bytes(BLOCK):
            raise tarfile.ReadError(f"it breaks off after {end} bytes")
    return found
