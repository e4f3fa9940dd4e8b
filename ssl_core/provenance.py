"""Which code, configuration, data and machine a result came from. Torch-free, so that a dry run may ask."""

import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
from collections import Counter
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

DISTRIBUTIONS = ("ssl-core", "torch", "torchvision", "nvidia-dali-cuda130", "timm", "numpy", "scikit-learn")


def canonical(section: Any) -> str:
    """Write a configuration section as compact JSON with sorted keys, the same for equal sections."""
    return json.dumps(section, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


def digest(text: str | bytes) -> str:
    """Give the SHA-256 of `text` in hexadecimal."""
    return hashlib.sha256(text.encode() if isinstance(text, str) else text).hexdigest()


def file_digest(path: Path) -> str:
    """Give the SHA-256 of a file's content in hexadecimal, in constant memory."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def versions() -> dict[str, str]:
    """Give the versions of Python and of the packages that decide numbers."""
    installed = {name: installed_version(name) for name in DISTRIBUTIONS}
    return {"python": platform.python_version()} | {name: version for name, version in installed.items() if version}


@cache
def hardware() -> str:
    """Describe the processor, the cores this process may use and the graphics cards, in one line."""
    parts = [f"{num_cores()} x {_processor()}"]
    for card, count in sorted(Counter(_graphics_cards()).items()):
        parts.append(f"{count} x {card}")
    return ", ".join(parts)


def num_cores() -> int:
    """Count the processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def installed_version(distribution: str) -> str | None:
    """Return the version of a distribution, None if it is not installed."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    """Name the processor as Linux does, else as Python knows it."""
    if sys.platform == "linux":
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _graphics_cards() -> list[str]:
    """Name the NVIDIA cards as their driver's tool does; none without the tool or a card."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return []
    answer = subprocess.run([tool, "--query-gpu=name", "--format=csv,noheader"], capture_output=True, text=True)
    return answer.stdout.splitlines() if answer.returncode == 0 else []
