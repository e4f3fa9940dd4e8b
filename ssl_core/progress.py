"""Progress of long tasks: a moving bar in a terminal, a line every 15 seconds in a log."""

import os
import sys
from typing import TextIO

from tqdm import tqdm

SECONDS = 15.0  # between lines of a log
PLAIN = "{desc}: {n_fmt} of {total_fmt}{unit} ({percentage:.0f} %), {rate_noinv_fmt}, {remaining} left{postfix}"


def progress_bar(
    total: int, task: str, *, unit: str, initial: int = 0, leave: bool = True, disable: bool = False
) -> tqdm:
    """Return a bar over `total` units with rate and remaining time; `unit` is a plural, such as "images".

    `initial` units are done already: they count as progress, but not for the rate.
    """
    if sys.stderr.isatty():
        size = os.get_terminal_size(sys.stderr.fileno())
        has_size = size.columns > 0 and size.lines > 0  # terminals of `script` have none, and tqdm hides its bar there
        shape = {"dynamic_ncols": True} if has_size else {"ncols": 80, "nrows": 24}
        options = {**shape, "mininterval": 0.5, "leave": leave}
    else:
        options = {"file": _Lines(sys.stderr), "mininterval": SECONDS, "bar_format": PLAIN}
    return tqdm(total=total, initial=initial, desc=task, unit=f" {unit}", disable=disable, **options)


class _Lines:
    """A stream that writes each state of a bar as one line, except the first, which has no rate yet."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._first = True

    def write(self, text: str) -> None:
        """Write a state without carriage returns."""
        plain = text.strip("\r\n ")
        if plain and not self._first:
            self._stream.write(f"{plain}\n")
        self._first = self._first and not plain

    def flush(self) -> None:
        """Flush the underlying stream."""
        self._stream.flush()
