"""One progress line: it moves in a terminal, and comes as a new line now and then where there is none."""

import os
import sys
from typing import TextIO

from tqdm import tqdm

SECONDS = 15.0  # between lines of a log
PLAIN = "{desc}: {n_fmt} of {total_fmt}{unit} ({percentage:.0f} %), {rate_noinv_fmt}, {remaining} left{postfix}"


def progress_bar(
    total: int, what: str, *, unit: str, initial: int = 0, leave: bool = True, disable: bool = False
) -> tqdm:
    """Return a bar over `total` units with their rate and the time left; `unit` is a plural, as in "images".

    What a bar tells is of this sitting: `initial` units count as done, not as fast.
    """
    if sys.stderr.isatty():
        size = os.get_terminal_size(sys.stderr.fileno())
        known = size.columns > 0 and size.lines > 0  # tqdm hides its bar in a terminal of no size, as `script` makes
        shape = {"dynamic_ncols": True} if known else {"ncols": 80, "nrows": 24}
        options = {**shape, "mininterval": 0.5, "leave": leave}
    else:
        options = {"file": _Lines(sys.stderr), "mininterval": SECONDS, "bar_format": PLAIN}
    return tqdm(total=total, initial=initial, desc=what, unit=f" {unit}", disable=disable, **options)


class _Lines:
    """A stream on which every state of a bar but the first, which says nothing yet, is a line of its own."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._first = True

    def write(self, text: str) -> None:
        """Write a state without what would take the cursor back."""
        plain = text.strip("\r\n ")
        if plain and not self._first:
            self._stream.write(f"{plain}\n")
        self._first = self._first and not plain

    def flush(self) -> None:
        """Pass on what was written."""
        self._stream.flush()
