"""Folders of images and tars of such folders, behind one interface. Tars are never unpacked into files."""

import bz2
import errno
import gzip
import hashlib
import lzma
import os
import posixpath
import stat
import tarfile
import zlib
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cached_property
from itertools import groupby
from operator import attrgetter
from pathlib import Path
from typing import Any, BinaryIO

from tqdm import tqdm

from ssl_core.data.image_files import is_image, list_counts, unread_extension
from ssl_core.data.shards import BLOCK
from ssl_core.data.sources.file_list import File, Files, sorted_files
from ssl_core.mistakes import excerpt
from ssl_core.provenance import file_digest

OPENERS = {b"\x1f\x8b": gzip.open, b"BZ": bz2.open, b"\xfd7": lzma.open}  # by a file's first two bytes
BROKEN = (tarfile.TarError, OSError, EOFError, zlib.error, lzma.LZMAError)  # raised by readers of damaged archives
OTHER_FILES = {stat.S_IFIFO: "a named pipe", stat.S_IFSOCK: "a socket", stat.S_IFDIR: "a folder"}
ABSENT = "does not exist: put the data there, or mend the card's path or the ${VARIABLE} in it"


def stamp(path: str | Path) -> bytes:
    """Return bytes that change when a file changes; an unreachable file raises only when it is read."""
    try:
        status = os.stat(path)
    except OSError:
        return b"unreachable;"
    return f"{status.st_size} {status.st_mtime_ns};".encode()


def read_file(path: str | Path) -> bytes:
    """Return the bytes of a regular file; raise `OSError` for others: a pipe would block, some devices never end."""
    mode = os.stat(path).st_mode
    if not stat.S_ISREG(mode):
        kind = OTHER_FILES.get(stat.S_IFMT(mode), "a device")
        raise OSError(errno.EINVAL, f"it is {kind} instead of a regular file")
    with open(path, "rb", buffering=0) as file:  # twice as fast as pathlib for small files
        return file.readall()


class Folder:
    """A folder on disk; names are paths inside it."""

    def __init__(self, root: Path, *, scratch: Path) -> None:
        if not root.is_dir():
            if root.is_file():
                raise ValueError(f"{root} is not a folder: for an archive set type: image_tar")
            raise ValueError(f"{root} {ABSENT}")
        self.root = root
        self.stamp = ""
        self.unread: dict[str, int] = {}
        self._scratch = scratch

    def files(self, folder: str) -> Files:
        """Return the image files below `folder`, relative to it, sorted; links are followed.

        Sets `stamp`, which changes when a file changes, and `unread`, the numbers of pictures of other formats.
        """
        top = self.root / folder
        if not top.is_dir():
            inside = sorted(entry.name for entry in self.root.iterdir() if entry.is_dir())
            names = excerpt(", ".join(inside[:8])) or "no folders"
            raise ValueError(f"{self.root} has no folder {folder!r}; it has: {names}")
        stamps = hashlib.sha256()

        def stamped(files: Iterable[File]) -> Iterator[File]:
            for file in files:
                stamps.update(stamp(os.path.join(top, file.name)))
                yield file

        unread: Counter[str] = Counter()
        images = sorted_files(_select_images(_walk(top), unread), self._scratch)
        files = Files(stamped(images), self._scratch)
        self.stamp = stamps.hexdigest()
        self.unread = dict(sorted(unread.items()))
        return files

    def fetch(self, file: File, folder: str = "") -> bytes:
        """Return the bytes of a file that `files(folder)` listed."""
        return self.read(f"{folder}/{file.name}".lstrip("/"))

    def read(self, name: str) -> bytes:
        """Return a file's bytes; raise `ValueError` for a name outside the folder."""
        if posixpath.normpath(name).startswith(("/", "..")):
            raise ValueError(f"{excerpt(repr(name))} lies outside {self.root}")
        return read_file(os.path.join(self.root, name))


def _select_images(files: Iterable[File], unread: Counter[str]) -> Iterator[File]:
    """Yield the images among files, and count in `unread` the pictures whose format is not read, by extension."""
    for file in files:
        extension = unread_extension(file.name)
        if extension is not None:
            unread[extension] += 1
        elif is_image(file.name):
            yield file


def _walk(top: Path, inside: str = "", above: frozenset[tuple[int, int]] = frozenset()) -> Iterator[File]:
    """Yield the files below a folder, links followed; raise `ValueError` for an unreadable folder or a loop of links.

    `above` holds the device and inode of the folders around this one.
    """
    folder = os.path.join(top, inside)
    try:
        status = os.stat(folder)
        identity = (status.st_dev, status.st_ino)
        if identity in above:
            raise ValueError(f"{folder} is a link back to a folder it lies in: its images would count twice; remove it")
        with os.scandir(folder) as entries:
            for entry in entries:
                path = f"{inside}{entry.name}"
                if not _is_folder(entry):
                    yield File(path)
                elif not entry.name.startswith("."):
                    yield from _walk(top, f"{path}/", above | {identity})
    except OSError as error:
        if error.errno == errno.EMFILE:
            raise
        raise ValueError(f"{folder} cannot be read ({error.strerror}): make it readable or move it away") from None


def _is_folder(entry: os.DirEntry[str]) -> bool:
    """Return whether an entry is a folder; raise `ValueError` for a link that leads only to itself."""
    try:
        return entry.is_dir()
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        raise ValueError(f"{entry.path} is a link that leads back to itself: remove it") from None


class Archive:
    """The regular files of an open tar, without links, devices and names that point outside."""

    def __init__(self, path: Path | str, descriptor: int, stamp: str, scratch: Path) -> None:
        self.path, self.stamp = path, stamp
        self.unread: dict[str, int] = {}
        self._descriptor = descriptor  # read with pread, so that forked processes do not move each other's position
        self._scratch = scratch

    @classmethod
    @contextmanager
    def open(
        cls, path: Path, *, scratch: Path, sha256: str | None = None, address: str | None = None
    ) -> "Iterator[Archive]":
        """Open a tar; a compressed one is first decompressed into the folder `scratch`, until it is closed.

        Messages name `address` instead of the path if it is given. Raises a `ValueError` if the file is missing or
        damaged, or has another sha256.
        """
        if not path.is_file():
            raise ValueError(f"{path} {'is a folder: set type: image_folder' if path.is_dir() else ABSENT}")
        if sha256 is not None and file_digest(path) != sha256:
            raise ValueError(f"{path} has another sha256 than the card: get the archive again")
        status = path.stat()
        spill = scratch / f".spill-{path.name}"
        try:
            with _readable(address or path, scratch):
                with open(path, "rb") as file:
                    opener = OPENERS.get(file.read(2))
                if opener is not None:
                    _decompress(path, spill, opener)
                descriptor = os.open(path if opener is None else spill, os.O_RDONLY)
        finally:
            spill.unlink(missing_ok=True)  # the open descriptor keeps the content, and a killed process leaves no file
        try:
            yield cls(address or path, descriptor, f"{status.st_size} {status.st_mtime_ns}", scratch)
        finally:
            os.close(descriptor)

    def scan(self) -> Iterator[File]:
        """Yield the files in the order of the tar; the last of several files with one name is the valid one."""
        with _readable(self.path, self._scratch):
            yield from _members(self._descriptor, self.path)

    @cached_property
    def members(self) -> Files:
        """The files of the tar, each name once, sorted."""
        by_name = groupby(sorted_files(self.scan(), self._scratch), key=attrgetter("name"))
        last = (list(files)[-1] for _, files in by_name)
        return Files(last, self._scratch)

    def files(self, folder: str) -> Files:
        """Return the image files below `folder`, relative to it, sorted; set `unread` as `Folder` does."""
        prefix = f"{folder.strip('/')}/" if folder.strip("/") else ""
        inside = (file for file in self.members if file.name.startswith(prefix))
        relative = (file._replace(name=file.name[len(prefix) :]) for file in inside)
        unread: Counter[str] = Counter()
        images = Files(_select_images(relative, unread), self._scratch)
        self.unread = dict(sorted(unread.items()))
        if not images:
            folders = sorted({posixpath.dirname(file.name) for file in self.members})
            names = excerpt(", ".join(folders[:8])) or "none"
            others = f"; convert its {list_counts(self.unread)}" if unread else ""
            inner = [file.name for file in self.members if file.name.endswith((".zip", ".tar", ".gz", ".tgz"))]
            others += f"; unpack {excerpt(inner[0])} and give its path" if inner else ""
            raise ValueError(f"{self.path} has no images below {folder!r}; folders in it: {names}{others}")
        return images

    def fetch(self, file: File, folder: str = "") -> bytes:
        """Return the bytes of a file that `files` or `scan` listed; it carries its place, so `folder` is not used."""
        return os.pread(self._descriptor, file.size, file.offset)

    def read(self, name: str) -> bytes:
        """Return a member's bytes."""
        position = bisect_left(self.members, name, key=attrgetter("name"))
        file = self.members[position] if position < len(self.members) else None
        if file is None or file.name != name:
            raise ValueError(f"{self.path} has no file {excerpt(repr(name))}")
        return self.fetch(file)


@contextmanager
def _readable(path: Path | str, scratch: Path) -> Iterator[None]:
    """Turn the errors of a damaged archive or a full disk into a one-line `ValueError`."""
    try:
        yield
    except BROKEN as error:
        if isinstance(error, OSError) and error.errno == errno.EMFILE:  # too many open files has a message of its own
            raise
        if isinstance(error, OSError) and error.errno is not None:  # a full disk, no permission
            raise ValueError(f"{path} cannot be read or unpacked into {scratch}: {error.strerror}") from None
        raise ValueError(f"{path} is damaged or not a tar ({excerpt(error)}): get the archive again") from None


def _decompress(path: Path, spill: Path, opener: Callable[[BinaryIO], Any]) -> None:
    size = path.stat().st_size
    bar = tqdm(total=size, desc=f"unpacking {path.name}", unit="B", unit_scale=True, leave=False, disable=None)
    with bar, open(path, "rb") as packed, opener(packed) as content, open(spill, "wb") as file:
        while block := content.read(1 << 22):
            file.write(block)
            bar.update(packed.tell() - bar.n)


def _members(descriptor: int, path: Path | str) -> Iterator[File]:
    """Yield the regular files of a tar, and of tars that `cat` appended to it."""
    start: int | None = 0
    while start is not None:
        with open(os.dup(descriptor), "rb") as file:
            file.seek(start)
            with tarfile.open(fileobj=file, mode="r:") as archive:
                yield from _members_of_one(archive, path)
                # tarfile takes a broken header for the end, and a tar cut between two members for a complete one
                if os.pread(descriptor, BLOCK, archive.offset) != bytes(BLOCK):
                    raise tarfile.ReadError(f"it ends after {archive.offset} bytes without an end marker")
                start = _start_of_next(descriptor, archive.offset)


def _members_of_one(archive: tarfile.TarFile, path: Path | str) -> Iterator[File]:
    while member := archive.next():
        # tarfile would keep the headers of a million members
        archive.members = []  # pyright: ignore[reportAttributeAccessIssue]
        name = posixpath.normpath(member.name)
        if member.issparse() and is_image(name):
            raise ValueError(f"{path}: {excerpt(name)} is a sparse member: make the tar again without --sparse")
        if member.isreg() and not member.issparse() and not name.startswith(("/", "..")):
            yield File(name, 0, member.offset_data, member.size)


def _start_of_next(descriptor: int, end: int) -> int | None:
    """Return the place of a tar behind the zeros at `end`, None if zeros or other bytes follow."""
    while block := os.pread(descriptor, BLOCK, end):
        if block.strip(b"\0"):
            try:
                tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
            except tarfile.HeaderError:
                return None
            return end
        end += BLOCK
    return None
