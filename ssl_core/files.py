"""Atomic writing of files, and strict reading of JSON and YAML."""

import errno
import glob
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def use_utf8() -> None:
    """Start this process again in Python's UTF-8 mode if the locale has another encoding, such as Latin-1 or ASCII.

    Paths in cards and names of images are UTF-8; without it they would be other files, or errors.
    """
    if sys.getfilesystemencoding() != "utf-8" and os.environ.get("PYTHONUTF8") != "1":
        os.environ["PYTHONUTF8"] = "1"
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


@contextmanager
def room_for(path: Path) -> Iterator[None]:
    """Raise ValueError with the path if the disk is full while `path` is written."""
    try:
        yield
    except OSError as error:
        if error.errno in FULL:
            raise ValueError(f"{path} cannot be written ({error.strerror}): make room and run again") from error
        raise


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """Yield a temporary path in the same folder; on success sync it to disk and rename it to `path`, else remove it.

    Raises ValueError with the path if the disk is full; the old content of `path` stays.
    """
    with room_for(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(path)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            yield temporary
            _sync(temporary)
            os.replace(temporary, path)
            _sync(path.parent)
        except FileNotFoundError as error:
            if error.filename != str(temporary):
                raise
            raise ValueError(f"{path} cannot be written: its folder takes no files or was removed") from error
        finally:
            temporary.unlink(missing_ok=True)


def check_output(path: Path, *, force: bool) -> None:
    """Raise ValueError if a command may not write `path`: a folder, a device, or without `force` an existing file."""
    if path.is_dir():
        raise ValueError(f"{path} is a folder: give the name of a file")
    if path.exists() and not path.is_file():
        raise ValueError(f"{path} is a device or a pipe, expected a file: give another name")
    if path.exists() and not force:
        raise ValueError(f"{path} exists: give another name, or --force to replace it")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except FileNotFoundError:  # in /proc, for example
        raise ValueError(f"the folder {path.parent} cannot be made: choose another path") from None


def _sync(path: Path) -> None:
    """Wait until a file or folder is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove_leftovers(path: Path) -> None:
    """Remove temporary files of `path` whose process has ended."""
    for leftover in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        process = leftover.name.split(".")[-2]
        if process.isdecimal() and not Path("/proc", process).exists():
            leftover.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write `text` atomically as UTF-8."""
    with atomic(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_bytes(path: Path, content: bytes) -> None:
    """Write `content` atomically."""
    with atomic(path) as temporary:
        temporary.write_bytes(content)


def write_json(path: Path, content: Any) -> None:
    """Write `content` atomically as indented JSON; raises ValueError for NaN, which JSON lacks."""
    write_text(path, json.dumps(content, indent=2, allow_nan=False, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any:
    """Read a JSON file; raises ValueError with its name if it is missing or invalid."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid JSON ({error}): delete it and run again") from None


class YamlLoader(yaml.SafeLoader):
    """Raises an error for a duplicate key, where YAML silently keeps the last value."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys: set[tuple[str, str]] = set()
        for node_of_key, _ in node.value:
            key = (node_of_key.tag, str(node_of_key.value))
            if key in keys and not node_of_key.tag.endswith(":merge"):
                problem = f"the key '{node_of_key.value}' appears twice in one section; rename or merge them"
                raise yaml.constructor.ConstructorError(None, None, problem, node_of_key.start_mark)
            keys.add(key)
        return super().construct_mapping(node, deep=deep)
