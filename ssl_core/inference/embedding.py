"""Features of images in a folder or a list, in the order of their names or of the list, in bounded memory."""

import tempfile
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from PIL import Image
from torch import Tensor

from ssl_core.data.file_views import FileViews
from ssl_core.data.image_files import list_counts, prepare
from ssl_core.data.records import Record, SourceSplit, printable
from ssl_core.data.sources.file_tree import Folder, read_file
from ssl_core.evaluations.parts.features import allocate, forward
from ssl_core.inference.network import LoadedNetwork
from ssl_core.mistakes import excerpt
from ssl_core.progress import progress_bar
from ssl_core.provenance import num_cores

BATCH_SIZE = 64  # decoded images in memory; affects no feature
ImageLike = str | Path | Image.Image


class Batch(NamedTuple):
    """Some images' names and features (images, num_features), float32 on the CPU."""

    names: list[str]
    features: Tensor


class Embeddings(NamedTuple):
    """Names and features (images, num_features), float32 on the CPU, and the reason for each image left out."""

    names: list[str]
    features: Tensor
    skipped: dict[str, str]


def embed(
    network: LoadedNetwork,
    images: str | Path | Sequence[ImageLike],
    *,
    skip_unreadable: bool = False,
    threads: int | None = None,
) -> Embeddings:
    """Return the features of all images below a folder, sorted by name, of one file, or of a list.

    A list has files or PIL images. The features equal those that the evaluations read from shards. Names are paths
    inside the folder, the given paths, or the numbers of PIL images. An unreadable image is a `ValueError` with its
    name, or is skipped. Features beyond 4 GB are in a memory-mapped temporary file.
    """
    source = open_images(images)
    features = allocate(source.size, network.num_features)
    names: list[str] = []
    skipped: dict[str, str] = {}
    for batch in embed_batches(network, source, skipped=skipped if skip_unreadable else None, threads=threads):
        features[len(names) : len(names) + len(batch.names)] = batch.features
        names += batch.names
    return Embeddings(names, features[: len(names)], skipped)


def open_images(images: str | Path | Sequence[ImageLike]) -> SourceSplit:
    """List the images below a folder, sorted by name, one file, or a list; raise `ValueError` if there are none."""
    if isinstance(images, str | Path):
        if not Path(images).is_file():
            return _open_folder(Path(images))
        images = [images]
    if not images:
        raise ValueError("the list of images is empty: give at least one")

    def read(number: int) -> Record:
        image = images[number]
        return Record(name(number), image if isinstance(image, Image.Image) else read_file(image), -1)

    def name(number: int) -> str:
        image = images[number]
        return str(number) if isinstance(image, Image.Image) else printable(str(image))

    return SourceSplit(len(images), name, read, identity="")


def _open_folder(path: Path) -> SourceSplit:
    if not path.is_dir():
        raise ValueError(f"{path} {'is no' if path.exists() else 'is no image and no'} folder: correct the path")
    scratch = Path(tempfile.gettempdir())
    folder = Folder(path, scratch=scratch)
    files = folder.files("")
    if not files:
        unread = f"; convert its {list_counts(folder.unread)}" if folder.unread else ""
        raise ValueError(f"{path} has no images, expected files such as 1.jpg or 1.png in it or in its folders{unread}")

    def read(number: int) -> Record:
        return Record(name(number), folder.fetch(files[number]), -1)

    def name(number: int) -> str:
        return printable(files[number].name)

    return SourceSplit(len(files), name, read, identity="", unread=folder.unread)


def embed_batches(
    network: LoadedNetwork,
    source: SourceSplit,
    *,
    skipped: dict[str, str] | None = None,
    threads: int | None = None,
    task: str = "features",
) -> Iterator[Batch]:
    """Yield the features of a source's images in order, a batch at a time.

    An unreadable image is added to `skipped` with the reason, or is a `ValueError` if `skipped` is None, as is a
    source without a readable image.
    """
    threads = threads or num_cores()
    views = FileViews(
        network.view, mean=network.mean, std=network.std, batch_size=BATCH_SIZE, threads=threads, device=network.device
    )
    readable = 0
    is_short = source.size <= BATCH_SIZE
    with (
        ThreadPoolExecutor(threads) as pool,
        progress_bar(source.size, task, unit="images", disable=is_short) as bar,
    ):
        for start in range(0, source.size, BATCH_SIZE):
            numbers = range(start, min(start + BATCH_SIZE, source.size))
            names, contents = [], []
            for number, content in zip(numbers, _read_all(source, numbers, network.max_side, pool)):
                if isinstance(content, bytes):
                    names.append(source.name(number))
                    contents.append(content)
                elif skipped is None:
                    remedy = "repair or remove it, or skip such images (--skip-unreadable)"
                    remedy = remedy if source.size > 1 else "give another image"
                    raise ValueError(f"{excerpt(source.name(number))}: {excerpt(_reason(content))}; {remedy}")
                else:
                    skipped[source.name(number)] = _reason(content)
            if contents:
                readable += len(contents)
                features = forward({"loaded": network}, views(contents))["loaded"]
                yield Batch(names, features.cpu())
            bar.update(len(numbers))
    if not readable:
        first = next(iter(skipped.items())) if skipped else ("", "")
        raise ValueError(f"none of {source.size} images can be read; first failure: {': '.join(map(excerpt, first))}")


def _read_all(
    source: SourceSplit, numbers: range, max_side: int, pool: ThreadPoolExecutor
) -> list[bytes | ValueError | OSError]:
    """Return the content of each image as sharding stores it, or the error of an unreadable one."""

    def read(number: int) -> bytes | ValueError | OSError:
        try:
            return prepare(source.read(number).image, max_side).content
        except (ValueError, OSError) as error:
            return error

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="PIL")  # odd metadata does not matter
        return list(pool.map(read, numbers))


def _reason(error: ValueError | OSError) -> str:
    text = error.strerror if isinstance(error, OSError) else str(error)
    return " ".join((text or type(error).__name__).split())
