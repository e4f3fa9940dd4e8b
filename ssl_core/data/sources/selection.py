"""Selections of a source's images, the same for every kind of source: chosen classes, and splits divided at random."""

import hashlib
from collections.abc import Sequence

import numpy as np

from ssl_core.config import nearest
from ssl_core.data.card import Card, FolderSplit, class_list
from ssl_core.data.records import OpenSource, Record, SourceSplit
from ssl_core.mistakes import excerpt
from ssl_core.progress import progress_bar


def select(opened: OpenSource, card: Card) -> OpenSource:
    """Apply a card's lists of images, then its `keep_classes`, then its splits with `from`."""
    for name, section in card.source.splits.items():
        if isinstance(section, FolderSplit) and section.labelled is not None:
            place = f"{card.name}: source.splits.{name}.labelled"
            opened.splits[name] = _keep_listed(opened.splits[name], section.labelled, place)
    if card.keep_classes is not None:
        opened = _keep_classes(opened, card.keep_classes, card.name)
    if card.source.derived:
        opened = _divide(opened, card)
    return opened


def _keep_classes(opened: OpenSource, keep: Sequence[str], dataset: str) -> OpenSource:
    """Leave out the images of other classes; the classes keep their order. Unlabelled images stay."""
    labels = {name: _labels_of(split, name, dataset) for name, split in opened.splits.items()}
    highest = max(int(of_split.max()) for of_split in labels.values())
    names = opened.classes or tuple(map(str, range(highest + 1)))
    for name in keep:
        if name not in names:
            hint = excerpt(nearest(name, names))
            raise ValueError(f"{dataset}: keep_classes: there is no class {excerpt(repr(name))}{hint}")
    chosen = set(keep)
    kept = [label for label, name in enumerate(names) if name in chosen]
    new_label = np.full(len(names) + 1, -1)  # the last entry is that of the label -1
    new_label[kept] = np.arange(len(kept))
    splits = {}
    for name, split in opened.splits.items():
        indices = np.flatnonzero((labels[name] < 0) | (new_label[labels[name]] >= 0))
        splits[name] = _subset(split, indices, new_label[labels[name][indices]])
    return OpenSource(tuple(names[label] for label in kept), splits)


def _keep_listed(split: SourceSplit, file: str, place: str) -> SourceSplit:
    """Leave out the images that a text file does not name."""
    try:
        listed = class_list(file)
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from None
    by_last_part: dict[str, list[int]] = {}
    for index in range(split.size):
        by_last_part.setdefault(split.name(index).rpartition("/")[2], []).append(index)
    kept = set()
    for line in listed:
        candidates = by_last_part.get(line.rpartition("/")[2], [])
        matching = [index for index in candidates if f"/{split.name(index)}".endswith(f"/{line}")]
        if len(matching) != 1:
            found = (
                f"{len(matching)} images of the split are named so: write more of the path"
                if matching
                else (f"the split has no such image; its first is {excerpt(split.name(0))}")
            )
            raise ValueError(f"{place}: {excerpt(file)} names {excerpt(line)}, but {found}")
        kept.update(matching)
    return _subset(split, np.array(sorted(kept), np.int64))


def _divide(opened: OpenSource, card: Card) -> OpenSource:
    """Draw the splits with `from`, one after the other; each image is in one split only."""
    remaining = {name: np.arange(split.size) for name, split in opened.splits.items()}
    taken = {}
    for name, derived in card.source.derived.items():
        base = derived.from_
        place = f"{card.name}: source.splits.{name}"
        split = opened.splits[base]
        order = np.random.default_rng(derived.seed).permutation(remaining[base])
        if derived.fraction is not None:
            drawn = order[: round(derived.fraction * split.size)]
        else:
            labels = _labels_of(split, base, card.name)
            drawn = _draw_per_class(order, labels, derived.images_per_class or 0, opened.classes, place)
        if len(drawn) in (0, len(order)):
            raise ValueError(f"{place} takes {len(drawn)} of the {len(order)} images of {base!r}: take some, not all")
        taken[name] = (base, np.sort(drawn))
        remaining[base] = np.setdiff1d(remaining[base], drawn)
    splits = {}
    for name in card.splits:
        base, indices = taken[name] if name in taken else (name, remaining[name])
        split = opened.splits[base]
        splits[name] = split if len(indices) == split.size else _subset(split, indices)
    return OpenSource(opened.classes, splits)


def _draw_per_class(
    order: np.ndarray, labels: np.ndarray, count: int, classes: Sequence[str] | None, place: str
) -> np.ndarray:
    """Return the first images of each class in a random order."""
    drawn = []
    for label in np.unique(labels).tolist():
        if label < 0:
            raise ValueError(f"{place}: some images have no label: set `fraction` instead of images_per_class")
        members = order[labels[order] == label]
        if len(members) <= count:
            name = classes[label] if classes else label
            raise ValueError(f"{place}: the class {excerpt(name)} has {len(members)} images: take fewer than these")
        drawn.append(members[:count])
    return np.concatenate(drawn)


def _labels_of(split: SourceSplit, name: str, dataset: str) -> np.ndarray:
    """Return the label of each image; a library's images are read for it if it does not list them."""
    if split.labels is not None:
        return split.labels
    labels = np.empty(split.size, np.int64)
    with progress_bar(split.size, f"labels of {dataset} {name}", unit="images", leave=False) as bar:
        for index in range(split.size):
            record = split.read(index)
            if record.labels is not None:
                reason = "has several labels per image: only `fraction` can select images"
                raise ValueError(f"{dataset}: the split {name!r} {reason}")
            labels[index] = record.label
            bar.update()
    return labels


def _subset(split: SourceSplit, indices: np.ndarray, labels: np.ndarray | None = None) -> SourceSplit:
    """Return some images of a split, with new labels if they are given."""
    if labels is None and split.labels is not None:
        labels = split.labels[indices]

    def name(index: int) -> str:
        return split.name(int(indices[index]))

    def read(index: int) -> Record:
        record = split.read(int(indices[index]))
        return record if labels is None else record._replace(label=int(labels[index]))

    digest = hashlib.sha256(split.identity.encode() + indices.astype(np.int64).tobytes())
    if labels is not None:
        digest.update(labels.astype(np.int64).tobytes())
    return SourceSplit(len(indices), name, read, digest.hexdigest(), split.unread, labels)
