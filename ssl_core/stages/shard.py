"""Shard a data set: write the tars, indices and manifest of a card."""

from pathlib import Path

from ssl_core.data.card import load_card
from ssl_core.data.sharding import summary, write_shards


def run(card: Path, output: Path, *, threads: int) -> None:
    """Shard the data set of a card into the folder `output`, with `threads` worker processes.

    Raises a one-line `ValueError` if the card, its source or, with `on_error: fail`, an image cannot be used.
    """
    print(summary(write_shards(load_card(card), output, threads=threads)))
