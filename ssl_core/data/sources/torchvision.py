"""Data sets of torchvision, by the name of their class."""

import inspect
import operator
from functools import partial
from typing import Any

import numpy as np
from PIL import Image

from ssl_core.config import nearest
from ssl_core.data.card import Card, Torchvision
from ssl_core.data.records import OpenSource
from ssl_core.data.sources.file_tree import read_file
from ssl_core.data.sources.library import library_split
from ssl_core.mistakes import excerpt

SAMPLES = ("samples", "_samples")  # lists of pairs of an image and its class id
LABELS = ("targets", "labels", "_labels", "y", *SAMPLES)  # attributes of torchvision's classes with the class ids


def open_torchvision(source: Torchvision, card: Card) -> OpenSource:
    """Build torchvision's data set for each split; class names come from the card, else from the first data set."""
    splits = {}
    classes = card.classes
    for name, split in source.splits.items():
        dataset = _build(source, split.arguments)
        classes = classes or _class_names(dataset) or None  # torchvision lists names in the order of its label ids
        get = partial(_get, dataset, source.dataset)
        split = library_split(f"{source.dataset}.{name}", len(dataset), get)
        splits[name] = split._replace(labels=_labels(dataset))
    return OpenSource(classes, splits)


def _class_names(dataset: Any) -> tuple[str, ...]:
    """Return the names of a data set's classes; a class with several names has them joined by commas."""
    names = getattr(dataset, "classes", ())
    return tuple(name if isinstance(name, str) else ", ".join(name) for name in names)


def _labels(dataset: Any) -> np.ndarray | None:
    """Return the class ids that a data set lists, without reading its images; None if it does not."""
    for attribute in LABELS:
        labels = getattr(dataset, attribute, None)
        if attribute in SAMPLES and labels:
            labels = [sample[1] for sample in labels]
        if labels is None or len(labels) != len(dataset):
            continue
        array = np.asarray(labels)
        if array.ndim == 1 and array.dtype.kind in "iu" and _agree(array, dataset):
            return array.astype(np.int64)
    return None


def _agree(labels: np.ndarray, dataset: Any) -> bool:
    """Return whether the labels are those of some images that the data set returns."""
    try:
        for index in range(0, len(labels), max(1, len(labels) // 4)):
            image, label, *_ = dataset[index]
            if hasattr(image, "close"):  # PIL opens a file and reads it later
                image.close()
            if label != labels[index]:
                return False
    except (OSError, ValueError, TypeError):  # a broken image
        return False
    return True


def _build(source: Torchvision, arguments: dict[str, Any]) -> Any:
    """Build a data set; one that reads files through a loader returns their bytes, so that a JPEG stays a JPEG."""
    import torchvision.datasets

    names = torchvision.datasets.__all__
    if source.dataset not in names:
        raise ValueError(f"torchvision has no data set {source.dataset!r}{nearest(source.dataset, names)}")
    kind: Any = getattr(torchvision.datasets, source.dataset)
    options = {**source.arguments, **arguments}
    if source.root is not None:
        options["root"] = source.root
    if "loader" in inspect.signature(kind).parameters or torchvision.datasets.DatasetFolder in kind.__mro__:
        options["loader"] = read_file
    try:
        return kind(**options)
    except (TypeError, ValueError, RuntimeError, OSError, ImportError) as error:
        reason = f"{excerpt(error)} (arguments: {', '.join(sorted(options))})"
        raise ValueError(f"torchvision.datasets.{source.dataset}: {reason}") from None


def _get(dataset: Any, name: str, index: int) -> tuple[bytes | Image.Image, int]:
    image, target = dataset[index][:2]
    if not isinstance(image, bytes | Image.Image):
        raise ValueError(f"torchvision.datasets.{name} returns a {type(image).__name__} instead of an image")
    try:
        return image, operator.index(target)
    except TypeError:
        value = excerpt(repr(target))
        raise ValueError(f"torchvision.datasets.{name} returns {value} instead of a class id") from None
