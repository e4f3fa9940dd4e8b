"""Rows of a CSV, Parquet or Arrow file; Hugging Face's `datasets.save_to_disk` writes folders of Arrow files.

Torch-free.
"""

import codecs
import csv
import gzip
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from ssl_core.config import nearest
from ssl_core.data.sources.file_tree import ABSENT
from ssl_core.data.sources.patterns import expand
from ssl_core.mistakes import excerpt

SEPARATORS = ",;\t"
ROWS = 64  # read at once from a file that contains images

Cells = dict[str, Any]  # a row by the names of its columns


class Row(NamedTuple):
    """A row and its number: the line of a CSV file, or the position in a Parquet or Arrow file."""

    number: int
    cells: Cells


def table_files(pattern: str) -> list[Path]:
    """Return the files of a glob or brace pattern; a folder gives its Parquet or Arrow files."""
    files = []
    for path in expand(pattern):
        files.extend(_files_in(path) if path.is_dir() else [path])
    for path in files:
        if not path.is_file():
            raise ValueError(f"{path} {'is not a regular file' if path.exists() else ABSENT}")
    return files


def _files_in(folder: Path) -> list[Path]:
    """Return the tables of a folder; `state.json` of Hugging Face's `datasets` lists those of `save_to_disk`."""
    state = folder / "state.json"
    if state.is_file():
        try:
            return [folder / entry["filename"] for entry in json.loads(state.read_bytes())["_data_files"]]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{state} is damaged ({excerpt(repr(error))}): save the data set again") from None
    files = sorted([*folder.glob("*.parquet"), *folder.glob("*.arrow")])
    if not files:
        inside = sorted(entry.name for entry in folder.iterdir() if entry.is_dir())
        names = excerpt(", ".join(inside[:8])) or "none"
        raise ValueError(f"{folder} is a folder without .parquet or .arrow files; folders in it: {names}")
    return files


def place_of(path: Path, number: int) -> str:
    """Return the file and the row, for messages."""
    return f"{path} row {number}" if _is_arrow(path) else f"{path} line {number}"


def rows_of(path: Path, columns: Sequence[str]) -> Iterator[Row]:
    """Yield the rows of a table with at least these columns; raise a one-line `ValueError` if one is missing."""
    if _is_arrow(path):
        yield from _arrow_rows(path, columns)
    else:
        yield from _csv_rows(path, columns)


def class_names_of(path: Path, column: str) -> list[str] | None:
    """Return the class names in a table's `huggingface` metadata: those of the ids in `column`."""
    if not _is_arrow(path):
        return None
    metadata = _arrow_file(path)[0].metadata or {}
    try:
        feature = json.loads(metadata[b"huggingface"])["info"]["features"][column]
        return [str(name) for name in feature["names"]]
    except (KeyError, TypeError, ValueError):  # no metadata, or a column without class names
        return None


def _is_arrow(path: Path) -> bool:
    return path.suffix.lower() in (".parquet", ".arrow")


def _check_columns(present: Sequence[str], required: Sequence[str], path: Path) -> None:
    for column in required:
        if column not in present:
            raise ValueError(f"{path} has no column {column!r}{excerpt(nearest(column, present))}")


# Parquet and Arrow


def _arrow_rows(path: Path, columns: Sequence[str]) -> Iterator[Row]:
    import pyarrow

    schema, batches = _arrow_file(path)
    _check_columns(schema.names, columns, path)
    number = 0
    try:
        for batch in batches(list(columns)):
            for start in range(0, batch.num_rows, ROWS):
                for cells in batch.slice(start, ROWS).to_pylist():
                    yield Row(number, cells)
                    number += 1
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{path} cannot be read after row {number}: {excerpt(error)}") from None


def _arrow_file(path: Path) -> tuple[Any, Any]:
    """Return the schema of a file, and a function of columns that yields batches of rows."""
    import pyarrow
    import pyarrow.parquet

    try:
        if path.suffix.lower() == ".parquet":
            file = pyarrow.parquet.ParquetFile(path)
            return file.schema_arrow, lambda columns: file.iter_batches(ROWS, columns=columns)
        source = pyarrow.memory_map(str(path))
        try:
            reader = pyarrow.ipc.open_stream(source)  # the format of `save_to_disk`
        except pyarrow.ArrowInvalid:
            source.seek(0)
            whole = pyarrow.ipc.open_file(source)
            return whole.schema, lambda columns: (
                whole.get_batch(number).select(columns) for number in range(whole.num_record_batches)
            )
        return reader.schema, lambda columns: (batch.select(columns) for batch in reader)
    except (pyarrow.ArrowException, OSError) as error:
        kind = "a Parquet" if path.suffix.lower() == ".parquet" else "an Arrow"
        raise ValueError(f"{path} is not {kind} file: {excerpt(error)}") from None


# CSV


def _csv_rows(path: Path, columns: Sequence[str]) -> Iterator[Row]:
    """Yield the rows of a CSV file in UTF-8 or UTF-16, separated by commas, semicolons or tabs."""
    number = 1
    try:
        with _open_text(path) as file:
            header = file.readline()
            file.seek(0)
            separator = max(SEPARATORS, key=header.count)
            reader = csv.reader(file, strict=True, delimiter=separator)
            names = [name.strip() for name in next(reader, [])]
            _check_columns([name for name in names if name], columns, path)
            _check_names(names, columns, path)
            for values in reader:
                number = reader.line_num
                if values:
                    yield Row(number, _cells(names, values, place_of(path, number)))
    except csv.Error as error:
        raise ValueError(f"{path} is not a CSV file; after line {number}: {excerpt(error)}") from None
    except (UnicodeError, EOFError, OSError) as error:
        raise ValueError(f"{path} cannot be read; {_reason(path, number, error)}") from None


def _open_text(path: Path) -> TextIO:
    with open(path, "rb") as file:
        start = file.read(2)
    if start == b"\x1f\x8b":
        return gzip.open(path, "rt", newline="", encoding="utf-8-sig")  # pyright: ignore[reportReturnType]
    encoding = "utf-16" if start in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) else "utf-8-sig"
    return open(path, newline="", encoding=encoding)


def _reason(path: Path, number: int, error: Exception) -> str:
    if not isinstance(error, UnicodeDecodeError):
        return f"after line {number}: {excerpt(error)}"
    with open(path, "rb") as file:
        for position, line in enumerate(file, start=1):
            try:
                line.decode()
            except UnicodeDecodeError:
                return f"line {position} is not UTF-8: save the table as UTF-8"
    return "it is not UTF-8: save the table as UTF-8"


def _check_names(names: list[str], columns: Sequence[str], path: Path) -> None:
    for column in columns:
        if names.count(column) > 1:
            raise ValueError(f"{path} has several columns {column!r}: rename all but one")


def _cells(names: list[str], values: list[str], place: str) -> Cells:
    extra = [value for value in values[len(names) :] if value.strip()]
    if extra:
        counts = f"{len(values)} cells, but the header has {len(names)}"
        raise ValueError(f"{place} has {counts}: quote values that contain the separator")
    cells: Cells = dict.fromkeys(names)
    cells.update(zip(names, values, strict=False))
    return cells
