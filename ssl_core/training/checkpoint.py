"""Checkpoints of a pre-training: one file per run, replaced atomically, with the identity of its run.

The checkpoint before the last is kept as `<name>.previous.pt` in case the last one is damaged.
"""

import json
import zipfile
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from tqdm import tqdm

from ssl_core.experiments.overlays import leaves
from ssl_core.files import atomic
from ssl_core.mistakes import excerpt

PROCESSES = "training.gpus"  # compared by `Trainer.restore`: another number is a mistake, not another run


@dataclass(frozen=True, kw_only=True)
class Identity:
    """Settings, code and data of a run; a checkpoint is continued only if all three agree."""

    spec: str  # the experiment's settings as canonical JSON
    code: str  # digest
    data: str  # digest

    def differences(self, other: "Identity") -> list[str]:
        """Name the differences from a saved identity, for the settings key by key."""
        names = [name for name in ("code", "data") if getattr(self, name) != getattr(other, name)]
        settings, saved = _flat(self.spec), _flat(other.spec)
        for key in sorted(settings.keys() | saved.keys()):
            if settings.get(key) != saved.get(key) and key != PROCESSES:
                names.append(f"{key} (was {saved.get(key, 'not set')}, is {settings.get(key, 'not set')})")
        return names


def save_checkpoint(path: Path, state: dict[str, Any], identity: Identity) -> None:
    """Write `state` and its identity; the file that was there becomes the previous checkpoint.

    Raises ValueError with the file's name if the disk is full; the file that was there then stays.
    """
    with atomic(path) as temporary:
        with open(temporary, "wb") as file:
            _write({"identity": asdict(identity), **state}, file)
        if path.exists():
            path.replace(previous_checkpoint(path))


def load_checkpoint(path: Path, identity: Identity) -> dict[str, Any] | None:
    """Return the last state that can be read, or None if there is none.

    A damaged checkpoint, or one of other settings, code or data, is renamed, with a message.
    """
    for file in (path, previous_checkpoint(path)):
        if not file.exists():
            continue
        try:
            state = _read(file)
            saved = Identity(**state.pop("identity"))
        except Exception as error:  # whatever fails while reading, the file is damaged
            fallback = file == path and previous_checkpoint(path).exists()
            then = "the one before it is used" if fallback else "training starts afresh"
            _set_aside(file, "damaged", f"it cannot be read ({excerpt(error) or type(error).__name__})", then)
            continue
        differences = identity.differences(saved)
        if not differences:
            return state
        _set_aside(file, "other", f"it belongs to another run: {'; '.join(differences)}", "training starts afresh")
        previous_checkpoint(path).unlink(missing_ok=True)  # of the same other run
    return None


def remove_checkpoint(path: Path) -> None:
    """Remove a checkpoint and the previous one."""
    path.unlink(missing_ok=True)
    previous_checkpoint(path).unlink(missing_ok=True)


def previous_checkpoint(path: Path) -> Path:
    """Return the path of the checkpoint before the last one."""
    return path.with_suffix(".previous.pt")


def _write(content: dict[str, Any], file: BinaryIO) -> None:
    try:
        torch.save(content, file)
    except RuntimeError as error:  # torch wraps the reason, for example a full disk
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise


def _read(path: Path) -> dict[str, Any]:
    with zipfile.ZipFile(path) as archive:  # torch writes checksums but does not check them
        damaged = archive.testzip()
    if damaged is not None:
        raise ValueError(f"the checksum of {damaged} differs")
    return torch.load(path, map_location="cpu", weights_only=True)  # weights_only: a checkpoint cannot run code


def _set_aside(path: Path, kind: str, reason: str, then: str) -> None:
    aside = path.with_suffix(f".{kind}.pt")
    with suppress(FileNotFoundError):  # another rank has renamed it already
        path.replace(aside)
    tqdm.write(f"checkpoint {path} is set aside as {aside.name}, since {reason}; {then}")


def _flat(spec: str) -> dict[str, str]:
    """Return the values of nested settings as JSON, by dotted key."""
    return {".".join(keys): json.dumps(value) for keys, value in leaves(json.loads(spec))}
