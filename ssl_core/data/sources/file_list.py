"""Lists of files that lie on disk: in memory, a million names and places would take a third of a gigabyte."""

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

RECORD = struct.Struct("<5Q")  # where the name lies and its length, then a file's numbers
BLOCK = 4096  # records that an iteration reads at once
RUN = 100_000  # files that are sorted in memory


class File(NamedTuple):
    """A file by its name and, if it lies in a tar, where: the tar's number, offset and size in bytes."""

    name: str
    tar: int = 0
    offset: int = 0
    size: int = 0


class Files(Sequence[File]):
    """Files in the order given, read by position from any process and thread.

    They lie in two nameless files in `scratch`, which are gone with this object or its process. A full disk is a
    `ValueError`.
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
                encoded = name.encode("utf-8", "surrogatepass")  # a name may be any bytes, or worse
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

    def __getitem__(self, position: Any) -> Any:
        if not -self._size <= position < self._size:
            raise IndexError(position)
        record = os.pread(self._records, RECORD.size, position % self._size * RECORD.size)
        start, length, *where = RECORD.unpack(record)
        return File(os.pread(self._names, length, start).decode("utf-8", "surrogatepass"), *where)

    def __iter__(self) -> Iterator[File]:
        for first in range(0, self._size, BLOCK):
            records = list(RECORD.iter_unpack(os.pread(self._records, BLOCK * RECORD.size, first * RECORD.size)))
            begin, end = records[0][0], records[-1][0] + records[-1][1]
            names = os.pread(self._names, end - begin, begin)
            for start, length, *where in records:
                yield File(names[start - begin : start - begin + length].decode("utf-8", "surrogatepass"), *where)


def sorted_files(files: Iterable[File], scratch: Path) -> Iterator[File]:
    """Sort files by name, and those of one name by place, in constant memory."""
    rest, runs = iter(files), []
    while run := sorted(islice(rest, RUN)):
        runs.append(Files(run, scratch))
    return heapq.merge(*runs)
