"""Lists of files by a glob or brace pattern. Torch-free."""

from glob import glob
from pathlib import Path


def expand(pattern: str) -> list[Path]:
    """Expand braces, then wildcards; a pattern without a match stays as it is, so that its absence is reported."""
    if Path(pattern).exists():
        return [Path(pattern)]
    paths = []
    for expanded in expand_braces(pattern):
        paths.extend(sorted(glob(expanded)) or [expanded])
    return [Path(path) for path in paths]


def expand_braces(pattern: str) -> list[str]:
    """Expand ranges such as `{000..146}` and lists such as `{a,b}`; raise `ValueError` for a brace without its mate."""
    from braceexpand import braceexpand  # a dependency of webdataset

    try:
        return list(braceexpand(pattern))
    except ValueError:
        raise ValueError(f"{pattern}: its braces do not match: write {{first..last}} or {{one,other}}") from None
