"""Which code, configuration, data and machine a result came from. Torch-free, so that a dry run may ask."""

import ast
import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGE = Path(__file__).parent
# Bookkeeping: these change how a run is watched, stored or started, never what it computes.
BOOKKEEPING = frozenset(
    f"ssl_core.{name}"
    for name in ("tracking.run", "files", "provenance", "progress", "cli", "experiments.checks", "experiments.sweeps")
)
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


def code_digest(*modules: str) -> str:
    """Digest what `modules` and all they import inside the package do: their syntax without comments or docstrings.

    Modules are named in full (`ssl_core.stages.pretrain`); an unknown one is a `ValueError`.
    """
    found: dict[str, str] = {}
    waiting = list(modules)
    while waiting:
        module = waiting.pop()
        if module not in found and module not in BOOKKEEPING:
            found[module], imports = _read(module)
            waiting.extend(imports)
    return digest(canonical(found))


def versions() -> dict[str, str]:
    """Give the versions of Python and of the packages that decide numbers."""
    installed = {name: _version(name) for name in DISTRIBUTIONS}
    return {"python": platform.python_version()} | {name: version for name, version in installed.items() if version}


@cache
def hardware() -> str:
    """Describe the processor, the cores this process may use and the graphics cards, in one line."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    cards = _graphics_cards()
    return ", ".join([f"{cores} x {_processor()}", *(f"{cards.count(card)} x {card}" for card in sorted(set(cards)))])


@cache
def _read(module: str) -> tuple[str, frozenset[str]]:
    """Give the digest of one module's behaviour and the modules of the package that it imports."""
    path = _source(module)
    if path is None:
        raise ValueError(f"{module}: no such module in the package (looked in {PACKAGE})")
    tree = ast.parse(path.read_bytes(), filename=str(path))
    imports: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            imports.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = _absolute(node, module, is_package=path.name == "__init__.py")
            imports.add(base)
            imports.update(f"{base}.{alias.name}" for alias in node.names)  # `from package import module`
        body = getattr(node, "body", None)
        if isinstance(body, list):
            node.body = [statement for statement in body if not _is_text(statement)]  # pyright: ignore
    parents = {module.rsplit(".", depth)[0] for depth in range(1, module.count(".") + 1)}
    return digest(_dump(tree)), frozenset(name for name in imports | parents if _source(name))


def _dump(node: Any) -> str:
    """Write a syntax tree down as `ast.dump` does, but alike in all versions of Python: empty fields left out."""
    if isinstance(node, list):
        return f"[{', '.join(map(_dump, node))}]"
    if not isinstance(node, ast.AST):
        return repr(node)
    fields = (f"{name}={_dump(value)}" for name, value in ast.iter_fields(node) if value is not None and value != [])
    return f"{type(node).__name__}({', '.join(fields)})"


@cache
def _source(module: str) -> Path | None:
    """Find the file of a module of the package; None for what is not a module or not ours."""
    top, *parts = module.split(".")
    if top != PACKAGE.name:
        return None
    stem = PACKAGE.joinpath(*parts)
    candidates = (stem / "__init__.py", stem.with_name(f"{stem.name}.py"))
    return next((path for path in candidates if path.is_file()), None)


def _absolute(node: ast.ImportFrom, module: str, *, is_package: bool) -> str:
    """Resolve what `from ... import` names, relative or not, to a full module name."""
    if not node.level:
        return node.module or ""
    parts = module.split(".")
    anchor = parts[: len(parts) - node.level + is_package]
    return ".".join([*anchor, *([node.module] if node.module else [])])


def _is_text(statement: ast.stmt) -> bool:
    """Recognise a docstring, or any other string that stands alone."""
    return (
        isinstance(statement, ast.Expr)
        and isinstance(statement.value, ast.Constant)
        and isinstance(statement.value.value, str)
    )


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    """Name the processor as Linux does, else as Python knows it."""
    if sys.platform == "linux":
        for line in Path("/proc/cpuinfo").read_text().splitlines():
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
