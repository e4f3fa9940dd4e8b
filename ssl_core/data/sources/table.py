"""Tables of image paths and labels: CSV or Parquet."""

import csv
import hashlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from ssl_core.config import nearest
from ssl_core.data.card import Card, Table, TableSplit
from ssl_core.data.records import OpenSource
from ssl_core.data.sources.file_list import File, Files
from ssl_core.data.sources.file_tree import ABSENT, read_file, stamp
from ssl_core.data.sources.labelled_files import LabelledFiles, Targets, number_classes, parse_target
from ssl_core.mistakes import excerpt

Cells = dict[str, Any]  # a row by the names of its columns


def open_table(source: Table, card: Card, scratch: Path) -> OpenSource:
    """List the rows of each split's table."""
    return number_classes(card, {name: _list_split(source, split, scratch) for name, split in source.splits.items()})


def _list_split(source: Table, split: TableSplit, scratch: Path) -> LabelledFiles:
    path = Path(split.file)
    folder = path.parent if source.folder is None else Path(source.folder)
    targets = Targets()
    stamps = hashlib.sha256()

    def images() -> Iterator[File]:
        for number, row in enumerate(_rows(path)):
            if number == 0:
                _check_columns(row, (source.image, source.label, *split.where), path)
            if not _selected(row, split):
                continue
            file = File(str(_cell(row, source.image, path)))
            targets.add(None if source.label is None else parse_target(_cell(row, source.label, path)))
            stamps.update(stamp(folder / file.name))
            yield file

    def fetch(file: File) -> bytes:
        return read_file(folder / file.name)

    files = Files(images(), scratch)
    return LabelledFiles(files, targets, fetch, stamps.hexdigest())


def _selected(row: Cells, split: TableSplit) -> bool:
    return all(str(row[column]) == str(value) for column, value in split.where.items())


def _check_columns(row: Cells, required: Iterable[str | None], path: Path) -> None:
    columns = [column for column in row if column]
    for column in required:
        if column is not None and column not in columns:
            raise ValueError(f"{path} has no column {column!r}{nearest(column, columns)}")


def _rows(path: Path) -> Iterator[Cells]:
    if not path.is_file():
        raise ValueError(f"{path} {ABSENT}")
    try:
        yield from _parquet_rows(path) if path.suffix == ".parquet" else _csv_rows(path)
    except (csv.Error, UnicodeDecodeError, ValueError) as error:  # pyarrow's errors are ValueErrors
        raise ValueError(f"{path} is not a CSV or Parquet file: {excerpt(error)}") from None


def _parquet_rows(path: Path) -> Iterator[Cells]:
    import pyarrow.parquet

    for batch in pyarrow.parquet.ParquetFile(path).iter_batches():
        yield from batch.to_pylist()


def _csv_rows(path: Path) -> Iterator[Cells]:
    with open(path, newline="", encoding="utf-8-sig") as file:
        yield from csv.DictReader(file, strict=True)


def _cell(row: Cells, column: str, path: Path) -> Any:
    if row[column] in (None, ""):
        raise ValueError(f"{path}: a row has no {column!r}: {excerpt(json.dumps(row, default=str))}")
    return row[column]
