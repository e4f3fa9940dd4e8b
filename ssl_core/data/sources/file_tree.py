"""Folders of images and tars of such folders, read alike. Tars are never unpacked into files."""

import bz2
import errno
import gzip
import hashlib
import lzma
import os
import posixpath
import tarfile
import zlib
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cached_property
from itertools import groupby
from operator import attrgetter
from pathlib import Path
from typing import Any, BinaryIO

from tqdm import tqdm

from ssl_core.data.image_files import is_image
from ssl_core.data.shards import BLOCK, file_sha256
from ssl_core.data.sources.file_list import File, Files, sorted_files

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

    def __init__(self, root: Path, *, scratch: Path) -> None:
        if not root.is_dir():
            if root.is_file():
                raise ValueError(f"{root} is no folder: for an archive say type: image_tar")
            raise ValueError(f"{root} {ABSENT}")
        self.root = root
        self.stamp = ""
        self._scratch = scratch

    def files(self, folder: str) -> Files:
        """Return the files below `folder` that are images by their names, relative to it; links are followed."""
        top = self.root / folder
        if not top.is_dir():
            inside = ", ".join(sorted(entry.name for entry in self.root.iterdir() if entry.is_dir())[:8])
            raise ValueError(f"{self.root} has no folder {folder!r}; it has: {inside or 'no folders'}")
        stamps = hashlib.sha256()

        def stamped(files: Iterable[File]) -> Iterator[File]:
            for file in files:
                stamps.update(stamp(os.path.join(top, file.name)))
                yield file

        found = Files(stamped(sorted_files(_walk(top), self._scratch)), self._scratch)
        self.stamp = stamps.hexdigest()
        return found

    def fetch(self, file: File, folder: str = "") -> bytes:
        """Return the bytes of a file that `files` found below `folder`."""
        return self.read(f"{folder}/{file.name}".lstrip("/"))

    def read(self, name: str) -> bytes:
        """Return a file's bytes; a name that leads out of the folder, as a list in it may say, is a `ValueError`."""
        if posixpath.normpath(name).startswith(("/", "..")):
            raise ValueError(f"{name!r} lies outside {self.root}")
        with open(os.path.join(self.root, name), "rb", buffering=0) as file:  # twice as fast as pathlib on small files
            return file.readall()


def _walk(top: Path, inside: str = "", above: frozenset[tuple[int, int]] = frozenset()) -> Iterator[File]:
    """Yield the images below a folder, links followed; a folder that cannot be read or holds itself is refused."""
    folder = os.path.join(top, inside)
    try:
        status = os.stat(folder)
        identity = (status.st_dev, status.st_ino)
        if identity in above:
            raise ValueError(f"{folder} is a link back to a folder it lies in: its images would count twice")
        with os.scandir(folder) as entries:
            for entry in entries:
                path = f"{inside}{entry.name}"
                if not entry.is_dir():
                    if is_image(path):
                        yield File(path)
                elif not entry.name.startswith("."):
                    yield from _walk(top, f"{path}/", above | {identity})
    except OSError as error:
        if error.errno == errno.EMFILE:
            raise
        raise ValueError(f"{folder} cannot be read ({error.strerror}): make it readable or move it away") from None


class Archive:
    """An open tar: its regular files, without links, devices and names that point outside."""

    def __init__(self, path: Path, descriptor: int, stamp: str, scratch: Path) -> None:
        self.path, self.stamp = path, stamp
        self._descriptor = descriptor  # read with pread, so that forked processes do not move each other's position
        self._scratch = scratch

    @classmethod
    @contextmanager
    def open(cls, path: Path, *, scratch: Path, sha256: str | None = None) -> "Iterator[Archive]":
        """Open a tar; a compressed one is first written uncompressed into the folder `scratch` and removed at the end.

        Raises a `ValueError` if there is no such file, or it is damaged or not the file with this sha256.
        """
        if not path.is_file():
            raise ValueError(f"{path} {'is a folder: say type: image_folder' if path.is_dir() else ABSENT}")
        if sha256 is not None and file_sha256(path) != sha256:
            raise ValueError(f"{path} has another sha256 than the card says: get the archive again")
        status = path.stat()
        spill = scratch / f".spill-{path.name}"
        try:
            with _readable(path, scratch):
                with open(path, "rb") as file:
                    opener = OPENERS.get(file.read(2))
                if opener is not None:
                    _decompress(path, spill, opener)
                descriptor = os.open(path if opener is None else spill, os.O_RDONLY)
        finally:
            spill.unlink(missing_ok=True)  # the open descriptor keeps it alive; a killed process leaves nothing behind
        try:
            yield cls(path, descriptor, f"{status.st_size} {status.st_mtime_ns}", scratch)
        finally:
            os.close(descriptor)

    def scan(self) -> Iterator[File]:
        """Yield what the tar holds, in its order; of several files of one name the last counts."""
        with _readable(self.path, self._scratch):
            yield from _members(self._descriptor)

    @cached_property
    def members(self) -> Files:
        """What the tar holds, each name once, sorted."""
        alike = groupby(sorted_files(self.scan(), self._scratch), key=attrgetter("name"))
        return Files((list(files)[-1] for _, files in alike), self._scratch)

    def files(self, folder: str) -> Files:
        """Return the images below `folder` by their names, sorted, relative to it."""
        prefix = f"{folder.strip('/')}/" if folder.strip("/") else ""
        inside = (file for file in self.members if file.name.startswith(prefix))
        relative = (file._replace(name=file.name[len(prefix) :]) for file in inside)
        found = Files((file for file in relative if is_image(file.name)), self._scratch)
        if not found:
            folders = ", ".join(sorted({posixpath.dirname(file.name) for file in self.members})[:8]) or "none"
            raise ValueError(f"{self.path} has no images below {folder!r}; folders in it: {folders}")
        return found

    def fetch(self, file: File, folder: str = "") -> bytes:
        """Return the bytes of a file that `files` or `scan` found; it says itself where they lie."""
        return os.pread(self._descriptor, file.size, file.offset)

    def read(self, name: str) -> bytes:
        """Return a member's bytes."""
        position = bisect_left(self.members, name, key=attrgetter("name"))
        file = self.members[position] if position < len(self.members) else File("")
        if file.name != name:
            raise ValueError(f"{self.path} has no file {name!r}")
        return self.fetch(file)


@contextmanager
def _readable(path: Path, scratch: Path) -> Iterator[None]:
    """Turn what a damaged archive, or no room to unpack it, raises into a `ValueError` that says so."""
    try:
        yield
    except BROKEN as error:
        if isinstance(error, OSError) and error.errno == errno.EMFILE:  # told as what it is
            raise
        if isinstance(error, OSError) and error.errno is not None:  # a full disk, no permission
            raise ValueError(f"{path} cannot be read or held in {scratch}: {error.strerror}") from None
        reason = " ".join(str(error).split())
        raise ValueError(f"{path} is damaged or no tar ({reason}): get the archive again") from None


def _decompress(path: Path, spill: Path, opener: Callable[[BinaryIO], Any]) -> None:
    size = path.stat().st_size
    bar = tqdm(total=size, desc=f"unpacking {path.name}", unit="B", unit_scale=True, leave=False, disable=None)
    with bar, open(path, "rb") as packed, opener(packed) as content, open(spill, "wb") as file:
        while block := content.read(1 << 22):
            file.write(block)
            bar.update(packed.tell() - bar.n)


def _members(descriptor: int) -> Iterator[File]:
    os.lseek(descriptor, 0, os.SEEK_SET)
    with open(os.dup(descriptor), "rb") as file, tarfile.open(fileobj=file, mode="r:") as archive:
        while member := archive.next():
            # or a million headers pile up
            archive.members = []  # pyright: ignore[reportAttributeAccessIssue]
            name = posixpath.normpath(member.name)
            if member.isreg() and not member.issparse() and not name.startswith(("/", "..")):
                yield File(name, 0, member.offset_data, member.size)
        # tarfile takes a broken header in the middle for the end, and a tar cut between members for a whole one
        if os.pread(descriptor, BLOCK, archive.offset) != bytes(BLOCK):
            raise tarfile.ReadError(f"it breaks off after {archive.offset} bytes")
