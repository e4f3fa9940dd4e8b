"""Files by `torch.save`, read without running code: only tensors and plain containers are unpickled."""

import pickle
import re
from pathlib import Path
from typing import Any, TypeGuard

import torch
from torch import Tensor

from ssl_core.mistakes import excerpt

STARTS = (b"PK\x03\x04", b"\x80")  # of torch's zip archive and of a pickle


def is_pickled(path: Path) -> bool:
    """Return whether a file is by `torch.save` or `pickle`, not safetensors, whose ninth byte opens a JSON object."""
    with open(path, "rb") as file:
        start = file.read(9)
    return start.startswith(STARTS) and start[8:] != b"{"


def read_pickled(path: Path, *allowed: type) -> Any:
    """Return the content of a file by `torch.save`, on the CPU; `allowed` are the classes that it may contain.

    Raises ValueError for any other class or function, which could run code, and for a damaged file.
    """
    try:
        with torch.serialization.safe_globals([*allowed]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        name = re.search(r"GLOBAL ([\w.]+)", str(error))
        content = name.group(1) if name else excerpt(str(error).splitlines()[-1])
        raise ValueError(
            f"{path} is not read: it contains {content}, which could run code; expected tensors and plain containers: "
            "save its state dict alone (torch.save(model.state_dict(), ...))"
        ) from None
    except (OSError, RuntimeError, EOFError, AssertionError, KeyError, IndexError) as error:
        raise ValueError(f"{path} is truncated or no file by torch.save ({excerpt(error)}): fetch it again") from None


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a file by `torch.save` that contains a state dict and nothing else.

    Raises ValueError for other content.
    """
    content = read_pickled(path)
    if not is_state_dict(content):
        keys = ", ".join(map(str, content)) if isinstance(content, dict) else type(content).__name__
        raise ValueError(
            f"{path} contains {excerpt(keys)}, expected a state dict of tensors: `ssl-core convert` reads checkpoints"
        )
    return dict(content)


def is_state_dict(content: Any) -> TypeGuard[dict[str, Tensor]]:
    """Return whether `content` maps names to tensors."""
    if not isinstance(content, dict) or not content:
        return False
    return all(isinstance(name, str) and isinstance(value, Tensor) for name, value in content.items())
