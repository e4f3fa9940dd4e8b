"""Open the source of a card, whatever its kind. Torch-free until a source of torchvision or webdataset is opened.

Each kind of source lists its images first (names, labels, place of the bytes) and then reads them by index, since
sharding reads in a shuffled order.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from ssl_core.data.card import Card
from ssl_core.data.records import OpenSource
from ssl_core.data.sources.annotations import open_coco, open_voc
from ssl_core.data.sources.arrays import open_arrays
from ssl_core.data.sources.digits import open_digits
from ssl_core.data.sources.image_folder import open_image_folder
from ssl_core.data.sources.selection import select
from ssl_core.data.sources.table import open_table
from ssl_core.data.sources.torchvision import open_torchvision
from ssl_core.data.sources.webdataset import open_webdataset

# type of source -> function of the source, its card, a folder for lists, and the stack that closes tars at the end
OPENERS: dict[str, Callable[[Any, Card, Path, ExitStack], OpenSource]] = {
    "image_folder": open_image_folder,
    "image_tar": open_image_folder,
    "image_zip": open_image_folder,
    "npz": open_arrays,
    "webdataset": open_webdataset,
    "table": open_table,
    "torchvision": lambda source, card, *_: open_torchvision(source, card),
    "sklearn_digits": lambda source, *_: open_digits(source),
    "voc": open_voc,
    "coco": open_coco,
}


@contextmanager
def open_source(card: Card, *, scratch: Path) -> Iterator[OpenSource]:
    """List the images of a card's source. Lists and decompressed tars lie in the folder `scratch` meanwhile.

    Raises a one-line `ValueError` if the source is missing, empty, corrupt or contradicts the card.
    """
    with ExitStack() as stack:
        opened = OPENERS[card.source.type](card.source, card, scratch, stack)
        _check_sizes(opened, card)
        opened = select(opened, card)
        _check_sizes(opened, card)
        yield opened


def _check_sizes(opened: OpenSource, card: Card) -> None:
    for name, split in opened.splits.items():
        if split.size == 0:
            raise ValueError(f"{card.name}: the split {name!r} has no images")
