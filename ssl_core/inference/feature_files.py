"""Files of features with the names of their images: Parquet, written and read in parts, or npz."""

import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from ssl_core.evaluations.parts.features import allocate
from ssl_core.files import atomic
from ssl_core.inference.embedding import Batch
from ssl_core.mistakes import excerpt

SUFFIXES = (".parquet", ".npz")
ROWS = 4096  # per row group of Parquet
NETWORK = "network"  # key of the digest of the network's file

# Raised for damaged files and for those of other programs.
UNREADABLE = (pa.ArrowException, zipfile.BadZipFile, zlib.error, EOFError, KeyError, OSError, ValueError)

Write = Callable[[Batch], None]
Part = tuple[list[str], np.ndarray]  # names and features


def is_feature_file(path: Path) -> bool:
    """Return whether a path has the suffix of a file of features."""
    return path.suffix in SUFFIXES


@contextmanager
def new_feature_file(path: Path, *, rows: int, dim: int, network: str) -> Iterator[Write]:
    """Yield a function that appends a batch; the file appears if the block ends without an error.

    Columns of Parquet and arrays of npz: `name` and `features`, (images, dim) float32. `rows` is the largest number of
    images, `network` the digest of the network.
    """
    with atomic(path) as temporary:
        writer = _ParquetWriter if path.suffix == ".parquet" else _NpzWriter
        content = writer(temporary, rows, dim, network)
        try:
            yield content.append
            content.finish()
        finally:
            content.close()


class _ParquetWriter:
    def __init__(self, path: Path, rows: int, dim: int, network: str) -> None:
        fields = [("name", pa.string()), ("features", pa.list_(pa.float32(), dim))]
        self._schema = pa.schema(fields, metadata={NETWORK: network})
        self._file = pq.ParquetWriter(path, self._schema, write_page_checksum=True)
        self._batches: list[Batch] = []

    def append(self, batch: Batch) -> None:
        self._batches.append(batch)
        if sum(len(batch.names) for batch in self._batches) >= ROWS:
            self._write()

    def finish(self) -> None:
        if self._batches:
            self._write()

    def close(self) -> None:
        self._file.close()

    def _write(self) -> None:
        names = [name for batch in self._batches for name in batch.names]
        features = torch.cat([batch.features for batch in self._batches])
        values = pa.FixedSizeListArray.from_arrays(pa.array(features.flatten().numpy()), features.shape[1])
        self._file.write_table(pa.Table.from_arrays([pa.array(names), values], schema=self._schema))
        self._batches = []


class _NpzWriter:
    def __init__(self, path: Path, rows: int, dim: int, network: str) -> None:
        self._path, self._network = path, network
        self._features = allocate(rows, dim)
        self._names: list[str] = []

    def append(self, batch: Batch) -> None:
        start = len(self._names)
        self._names += batch.names
        self._features[start : len(self._names)] = batch.features

    def finish(self) -> None:
        features = self._features[: len(self._names)].numpy()
        with open(self._path, "wb") as file:  # numpy appends .npz to a path
            np.savez(file, name=np.array(self._names), features=features, network=np.array(self._network))

    def close(self) -> None:
        pass


def read_features(path: Path, *, network: str, dim: int) -> Iterator[Batch]:
    """Yield the names and features (images, dim) of a file; raise `ValueError` if it is damaged or of another network.

    Parquet is read in parts, npz as a whole.
    """
    if not path.is_file():
        problem = "is a folder with the name of a file" if path.is_dir() else "does not exist"
        raise ValueError(f"{path} {problem}: write it with `ssl-core embed`")
    read = _read_parquet if path.suffix == ".parquet" else _read_npz
    try:
        written_by, parts = read(path)
        if written_by == network:
            for names, features in parts:
                yield _to_batch(names, features, dim)
    except UNREADABLE as error:
        reason = excerpt(error)
        raise ValueError(f"{path} is no file of features ({reason}): write it with `ssl-core embed`") from None
    if written_by != network:
        raise ValueError(
            f"{path} has the features of another network (sha256 {written_by[:12] or 'unknown'}), expected "
            f"{network[:12]}: write it again with `ssl-core embed`"
        )


def _read_parquet(path: Path) -> tuple[str, Iterator[Part]]:
    file = pq.ParquetFile(path, page_checksum_verification=True)
    metadata = file.schema_arrow.metadata or {}

    def parts() -> Iterator[Part]:
        with file:
            for part in file.iter_batches(ROWS):
                features = part.column("features")
                rows = features.flatten().to_numpy(zero_copy_only=False).reshape(len(features), -1)
                yield part.column("name").to_pylist(), rows.copy()

    return metadata.get(NETWORK.encode(), b"").decode(), parts()


def _read_npz(path: Path) -> tuple[str, Iterator[Part]]:
    with open(path, "rb") as file:
        arrays: Any = np.lib.npyio.NpzFile(file)  # np.load also reads other files
        return str(arrays[NETWORK]), iter([(arrays["name"].tolist(), arrays["features"])])


def _to_batch(names: list[str], features: np.ndarray, dim: int) -> Batch:
    if features.dtype != np.float32 or features.shape != (len(names), dim):
        shape = f"features {features.shape} of {features.dtype}"
        raise ValueError(f"{shape}, expected ({len(names)}, {dim}) of float32")
    return Batch(names, torch.from_numpy(features))
