"""Zips of image folders, read in place: each member is compressed for itself. Torch-free."""

import bz2
import lzma
import os
import posixpath
import stat
import struct
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ssl_core.data.sources.file_list import File
from ssl_core.data.sources.file_tree import ABSENT, Archive
from ssl_core.mistakes import excerpt
from ssl_core.provenance import file_digest

LOCAL_HEADER = struct.Struct("<4s5H3I2H")  # precedes the bytes of each member
ENCRYPTED = 1  # bit of a member's flags
DAMAGED = (zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, struct.error)


def is_zip(path: Path) -> bool:
    """Return whether a file is a zip, by its first bytes."""
    if not path.is_file():
        return False
    with open(path, "rb") as file:
        return file.read(4) in (b"PK\x03\x04", b"PK\x05\x06")


class ZipArchive(Archive):
    """The regular files of an open zip, without links and names that point outside.

    Of a member's `File`, `offset` is the place of its local header, `size` that of its compressed bytes, and `tar` its
    CRC-32.
    """

    @classmethod
    @contextmanager
    def open(cls, path: Path, *, scratch: Path, sha256: str | None = None) -> "Iterator[ZipArchive]":
        """Open a zip; raise a one-line `ValueError` if it is missing, damaged, encrypted or has another sha256."""
        if not path.is_file():
            raise ValueError(f"{path} {'is a folder: set type: image_folder' if path.is_dir() else ABSENT}")
        if sha256 is not None and file_digest(path) != sha256:
            raise ValueError(f"{path} has another sha256 than the card: get the archive again")
        status = path.stat()
        descriptor = os.open(path, os.O_RDONLY)
        try:
            yield cls(path, descriptor, f"{status.st_size} {status.st_mtime_ns}", scratch)
        finally:
            os.close(descriptor)

    def scan(self) -> Iterator[File]:
        """Yield the files in the order of the zip's directory; the last of several files with one name is valid."""
        try:
            with zipfile.ZipFile(self.path) as archive:
                members = archive.infolist()
        except (*DAMAGED, NotImplementedError) as error:
            raise ValueError(f"{self.path} is damaged or not a zip ({excerpt(error)}): get the archive again") from None
        for member in members:
            mode = member.external_attr >> 16  # of Unix; 0 in zips of other systems
            if member.is_dir() or (stat.S_IFMT(mode) and not stat.S_ISREG(mode)):
                continue
            if member.flag_bits & ENCRYPTED:
                name = excerpt(repr(member.filename))
                raise ValueError(f"{self.path} is encrypted ({name}): decrypt it, for example with `unzip`")
            name = posixpath.normpath(member.filename.replace("\\", "/"))  # some Windows programs write backslashes
            if not name.startswith(("/", "..")):
                yield File(name, member.CRC, member.header_offset, member.compress_size)

    def fetch(self, file: File, folder: str = "") -> bytes:
        """Return the bytes of a file that `files` or `scan` listed; raise `ValueError` if they are damaged."""
        try:
            content = self._inflate(file)
        except (*DAMAGED, OSError) as error:
            raise ValueError(f"it is damaged in {self.path} ({excerpt(error)})") from None
        if zlib.crc32(content) != file.tar:
            raise ValueError(f"it is damaged in {self.path} (wrong CRC-32)")
        return content

    def _inflate(self, file: File) -> bytes:
        header = LOCAL_HEADER.unpack(os.pread(self._descriptor, LOCAL_HEADER.size, file.offset))
        method, name_size, extra_size = header[3], header[9], header[10]
        start = file.offset + LOCAL_HEADER.size + name_size + extra_size
        packed = os.pread(self._descriptor, file.size, start)
        if method == zipfile.ZIP_STORED:
            return packed
        if method == zipfile.ZIP_DEFLATED:
            return zlib.decompress(packed, -zlib.MAX_WBITS)
        if method == zipfile.ZIP_BZIP2:
            return bz2.decompress(packed)
        raise ValueError(f"its compression in {self.path} (method {method}) is not read: use deflate")
