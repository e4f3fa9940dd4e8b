"""The running state of a pre-training: one file that is replaced whole, and that knows what it belongs to."""

import json
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

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
    """Write `state` beside its identity; the old file stays until the new one is safe on disk."""
    with atomic(path) as temporary:
        torch.save({"identity": {f.name: getattr(identity, f.name) for f in fields(identity)}, **state}, temporary)


def load(path: Path, identity: Identity) -> dict[str, Any] | None:
    """Return the saved state, or None where there is none to continue from.

    A checkpoint of another configuration, code or data, or a damaged one, is set aside under another name and said so.
    """
    if not path.exists():
        return None
    try:
        # weights_only: a checkpoint cannot run code. Any way in which reading fails means the same: it is damaged.
        state = torch.load(path, map_location="cpu", weights_only=True)
        saved = Identity(**state.pop("identity"))
    except Exception as error:
        _set_aside(path, "damaged", f"it cannot be read ({str(error).splitlines()[0]})")
        return None
    differences = identity.differences(saved)
    if differences:
        _set_aside(path, "other", f"it belongs to another run: {'; '.join(differences)}")
        return None
    return state


def _set_aside(path: Path, kind: str, reason: str) -> None:
    aside = path.with_suffix(f".{kind}.pt")
    path.replace(aside)
    tqdm.write(f"checkpoint {path} is set aside as {aside.name}, since {reason}; training starts afresh")


def _flat(section: Any, prefix: str = "") -> dict[str, str]:
    if not isinstance(section, dict):
        return {prefix: json.dumps(section)}
    return {
        name: value
        for key, inner in section.items()
        for name, value in _flat(inner, f"{prefix}.{key}" if prefix else key).items()
    }
