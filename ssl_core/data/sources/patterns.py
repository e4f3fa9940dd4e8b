"""Lists of files by a glob or brace pattern. Torch-free."""

from glob import glob
from pathlib import Path


def expand(pattern: str) -> list[Path]:
    """Expand braces, then wildcards; a pattern without a match stays as it is, so that its absence is reported."""
    from braceexpand import braceexpand  # a dependency of webdataset

    if Path(pattern).exists():
        return [Path(pattern)]
    try:
        patterns = list(braceexpand(pattern))
    except ValueError:
        raise ValueError(f"{pattern}: its braces do not match: write {{first..last}} or {{one,other}}") from None
    paths = []
    for expanded in patterns:
        paths.extend(sorted(glob(expanded)) or [expanded])
    return [Path(path) for path in paths]
