"""Lists of files, kept on disk: in memory, a million names and places would take a third of a gigabyte."""

import heapq
import os
import struct
import tempfile
import weakref
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from ssl_core.files import room_for

RECORD = struct.Struct("<5Q")  # offset and length of the name, then tar, offset and size of the file
BLOCK = 4096  # records per read while iterating
RUN = 100_000  # files sorted in memory at once


class File(NamedTuple):
    """A file by its name; in a tar also the number of the tar, the offset and the size in bytes."""

    name: str
    tar: int = 0
    offset: int = 0
    size: int = 0


class Files(Sequence[File]):
    """A sequence of files on disk, which any process and thread can read.

    Two unlinked temporary files in `scratch` hold it; they vanish with this object or its process. Raises `ValueError`
    if the disk is full.
    """

    def __init__(self, files: Iterable[File], scratch: Path) -> None:
        self._size = 0
        with (
            room_for(scratch),
            tempfile.TemporaryFile(dir=scratch) as names,
            tempfile.TemporaryFile(dir=scratch) as records,
        ):
            start = 0
            for name, tar, offset, size in files:
                encoded = name.encode("utf-8", "surrogatepass")  # a name may be any bytes, even lone surrogates
                names.write(encoded)
                records.write(RECORD.pack(start, len(encoded), tar, offset, size))
                start += len(encoded)
                self._size += 1
            for file in (names, records):
                file.flush()
            self._names, self._records = os.dup(names.fileno()), os.dup(records.fileno())
        for descriptor in (self._names, self._records):
            weakref.finalize(self, os.close, descriptor)

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, position: Any) -> Any:  # a Sequence would also take slices
        if not -self._size <= position < self._size:
            raise IndexError(position)
        record = os.pread(self._records, RECORD.size, position % self._size * RECORD.size)
        start, length, *place = RECORD.unpack(record)
        return File(_decode(os.pread(self._names, length, start)), *place)

    def __iter__(self) -> Iterator[File]:
        for first in range(0, self._size, BLOCK):
            block = os.pread(self._records, BLOCK * RECORD.size, first * RECORD.size)
            records = list(RECORD.iter_unpack(block))
            begin, end = records[0][0], records[-1][0] + records[-1][1]
            names = os.pread(self._names, end - begin, begin)
            for start, length, *place in records:
                name = names[start - begin : start - begin + length]
                yield File(_decode(name), *place)


def sorted_files(files: Iterable[File], scratch: Path) -> Iterator[File]:
    """Sort files by name, then by place, in constant memory."""
    remaining = iter(files)
    runs = []
    while run := sorted(islice(remaining, RUN)):
        runs.append(Files(run, scratch))
    return heapq.merge(*runs)


def _decode(name: bytes) -> str:
    return name.decode("utf-8", "surrogatepass")
