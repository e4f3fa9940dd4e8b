"""The running state of a pre-training: one file that is replaced whole, and that knows what it belongs to.

The state before the last is kept as `<name>.previous.pt`, for the day that a disk loses the last.
"""

import json
import zipfile
from contextlib import suppress
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, BinaryIO

import torch
from tqdm import tqdm

from ssl_core.files import atomic


@dataclass(frozen=True, kw_only=True)
class Identity:
    """What must agree for a run to continue: the experiment's own words, the code and the data."""

    spec: str  # canonical JSON
    code: str  # digests
    data: str

    def differences(self, other: "Identity") -> list[str]:
        """Name what differs, for the spec key by key."""
        found = [name for name in ("code", "data") if getattr(self, name) != getattr(other, name)]
        mine, theirs = _flat(json.loads(self.spec)), _flat(json.loads(other.spec))
        for key in sorted(mine.keys() | theirs.keys()):
            if mine.get(key) != theirs.get(key):
                found.append(f"{key} (was {theirs.get(key, 'not set')}, is {mine.get(key, 'not set')})")
        return found


def save(path: Path, state: dict[str, Any], identity: Identity) -> None:
    """Write `state` beside its identity; the old file becomes the previous one when the new one is written.

    Raises a `ValueError` that names the file if the disk is full; the old file then stays.
    """
    content = {"identity": {f.name: getattr(identity, f.name) for f in fields(identity)}, **state}
    with atomic(path) as temporary:
        with open(temporary, "wb") as file:
            _write(content, file)
        if path.exists():
            path.replace(previous(path))


def load(path: Path, identity: Identity) -> dict[str, Any] | None:
    """Return the last saved state that is whole, or None where there is none to continue from.

    A checkpoint of another configuration, code or data, or a damaged one, is set aside under another name and said so.
    """
    for file in (path, previous(path)):
        if not file.exists():
            continue
        then = "the one before it is used" if file == path and previous(path).exists() else "training starts afresh"
        try:
            state = _read(file)
            saved = Identity(**state.pop("identity"))
        except Exception as error:  # any way in which reading fails means the same: it is damaged
            _set_aside(
                file, "damaged", f"it cannot be read ({(str(error).splitlines() or [type(error).__name__])[0]})", then
            )
            continue
        differences = identity.differences(saved)
        if not differences:
            return state
        _set_aside(file, "other", f"it belongs to another run: {'; '.join(differences)}", "training starts afresh")
        previous(path).unlink(missing_ok=True)  # of that run, too
    return None


def remove(path: Path) -> None:
    """Remove a checkpoint and the one before it."""
    path.unlink(missing_ok=True)
    previous(path).unlink(missing_ok=True)


def previous(path: Path) -> Path:
    """Return where the checkpoint before the last one lies."""
    return path.with_suffix(".previous.pt")


def _write(content: dict[str, Any], file: BinaryIO) -> None:
    try:
        torch.save(content, file)
    except RuntimeError as error:  # torch hides the reason, for example a full disk
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise


def _read(path: Path) -> dict[str, Any]:
    with zipfile.ZipFile(path) as archive:  # torch writes checksums but does not look at them
        damaged = archive.testzip()
    if damaged is not None:
        raise ValueError(f"the checksum of {damaged} differs")
    return torch.load(path, map_location="cpu", weights_only=True)  # weights_only: a checkpoint cannot run code


def _set_aside(path: Path, kind: str, reason: str, then: str) -> None:
    aside = path.with_suffix(f".{kind}.pt")
    with suppress(FileNotFoundError):  # another rank was here first
        path.replace(aside)
    tqdm.write(f"checkpoint {path} is set aside as {aside.name}, since {reason}; {then}")


def _flat(section: Any, prefix: str = "") -> dict[str, str]:
    if not isinstance(section, dict):
        return {prefix: json.dumps(section)}
    return {
        name: value
        for key, inner in section.items()
        for name, value in _flat(inner, f"{prefix}.{key}" if prefix else key).items()
    }
