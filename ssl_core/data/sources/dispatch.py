"""Open the source of a card, whatever its kind. Torch-free until a torchvision data set is opened.

Each kind of source lists its images first (names, labels, place of the bytes) and then reads them by index, since
sharding reads in a shuffled order.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from ssl_core.data.card import Card, Coco, ImageFolder, SklearnDigits, Table, Torchvision, Voc, WebDataset
from ssl_core.data.records import OpenSource
from ssl_core.data.sources.annotations import open_coco, open_voc
from ssl_core.data.sources.digits import open_digits
from ssl_core.data.sources.image_folder import open_image_folder
from ssl_core.data.sources.table import open_table
from ssl_core.data.sources.torchvision import open_torchvision
from ssl_core.data.sources.webdataset import open_webdataset


@contextmanager
def open_source(card: Card, *, scratch: Path) -> Iterator[OpenSource]:
    """List the images of a card's source. Lists and decompressed tars lie in the folder `scratch` meanwhile.

    Raises a one-line `ValueError` if the source is missing, empty, corrupt or contradicts the card.
    """
    with ExitStack() as stack:
        opened = _open(card, scratch, stack)
        for name, split in opened.splits.items():
            if split.size == 0:
                raise ValueError(f"{card.name}: the split {name!r} has no images")
        yield opened


def _open(card: Card, scratch: Path, stack: ExitStack) -> OpenSource:
    match card.source:
        case ImageFolder() as source:
            return open_image_folder(source, card, scratch, stack)
        case WebDataset() as source:
            return open_webdataset(source, card, scratch, stack)
        case Table() as source:
            return open_table(source, card, scratch)
        case Torchvision() as source:
            return open_torchvision(source, card)
        case SklearnDigits() as source:
            return open_digits(source)
        case Voc() as source:
            return open_voc(source, card, scratch, stack)
        case Coco() as source:
            return open_coco(source, card, scratch, stack)
