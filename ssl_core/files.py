"""Files that appear whole or not at all."""

import errno
import glob
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextmanager
def room_for(path: Path) -> Iterator[None]:
    """Turn what a full disk raises while `path` is written into a `ValueError` that names it."""
    try:
        yield
    except OSError as error:
        if error.errno in FULL:
            raise ValueError(f"{path} cannot be written ({error.strerror}): make room and run again") from error
        raise


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """Give a temporary path in the same folder; on success sync it to disk and rename it to `path`, else remove it.

    A full disk is a `ValueError` that names `path`, whose old content stays.
    """
    with room_for(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(path)
        yield from _atomic(path)


def _atomic(path: Path) -> Iterator[Path]:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    finally:
        temporary.unlink(missing_ok=True)


def _remove_leftovers(path: Path) -> None:
    """Remove what killed processes left of earlier attempts to write `path`."""
    for left in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        process = left.name.split(".")[-2]
        if process.isdecimal() and not Path("/proc", process).exists():
            left.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write `text` atomically as UTF-8."""
    with atomic(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_bytes(path: Path, content: bytes) -> None:
    """Write `content` atomically."""
    with atomic(path) as temporary:
        temporary.write_bytes(content)


def write_json(path: Path, content: Any) -> None:
    """Write `content` atomically as indented JSON; NaN is refused, since it is no JSON."""
    write_text(path, json.dumps(content, indent=2, allow_nan=False, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any:
    """Read a JSON file; a missing or broken one is a `ValueError` that names it."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid JSON ({error}): delete it and run again") from None


class YamlLoader(yaml.SafeLoader):
    """Refuses a key that stands twice in a section, where YAML would silently keep the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[tuple[str, str]] = set()
        for key, _ in node.value:
            written = (key.tag, str(key.value))
            if written in seen and not key.tag.endswith(":merge"):
                problem = f"the key '{key.value}' stands twice in one section; rename one or put them together"
                raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
            seen.add(written)
        return super().construct_mapping(node, deep=deep)
