"""Sharding: turn the images of a source into tars, indices and a manifest.

Each worker process makes one whole shard at a time: it reads the images that a fixed permutation assigns to the shard,
checks each (in several threads if there are fewer shards than workers; `image_files.py`) and writes the tar. So
memory is constant, and the bytes are the same for any number of workers. A finished shard appears by rename and is
recorded in `.state.jsonl`; a later run keeps it if the source is unchanged and the files still have their sha256.

Keys are positions in the source's order. Only if images were left out (`on_error: skip`) are shards written a second
time, with consecutive indices.
"""

import ctypes
import hashlib
import json
import multiprocessing
import os
import signal
import warnings
from bisect import bisect
from collections import Counter
from collections.abc import Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, ThreadPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np

from ssl_core.config import Strict
from ssl_core.data.boxes import Fitted, fit_objects, upright_size
from ssl_core.data.card import Card, Channels
from ssl_core.data.image_files import channel_moments, list_counts, prepare
from ssl_core.data.records import OpenSource, Record, SourceSplit
from ssl_core.data.shards import (
    MAX_IMAGES,
    Manifest,
    Objects,
    Rejected,
    Shard,
    Split,
    new_shard,
    renumber,
    write_names,
)
from ssl_core.data.sources.dispatch import open_source
from ssl_core.files import room_for, write_json, write_text
from ssl_core.mistakes import excerpt
from ssl_core.progress import progress_bar
from ssl_core.provenance import file_digest

IMAGES_PER_SHARD = 2000  # CIFAR: 25 tars of 6 MB; ImageNet: 641 of 240 MB, enough for DALI to shuffle whole tars
SHUFFLE_SEED = 0
MEASURED = 10_000  # at most about this many images of the first split give mean and std
AHEAD = 64  # images that the threads of one worker read before they are written
FORMAT = 3  # increase it to make the same source give other shards
PR_SET_PDEATHSIG = 1

_job: "Job"  # set in each worker process


class Bad(NamedTuple):
    """An image of the source, or an object of it, that cannot be used."""

    index: int
    name: str
    reason: str


class Packed(Strict):
    """A finished shard and its share of the split's statistics. The field names are those of `.state.jsonl`."""

    split: str
    number: int
    shard: Shard
    bad: tuple[Bad, ...]
    labels: dict[int, int]  # label -> images
    moments: tuple[tuple[float, ...], ...]  # sum of channel_moments over the measured images
    measured: int
    reduced: int = 0  # images that `max_side` made smaller
    closed: str = ""  # digest of the left-out images of the split that the shard's indices skip
    objects: tuple[int, int, int] | None = None  # objects, objects with a mask, images without objects
    unused: tuple[Bad, ...] = ()  # objects


class Task(NamedTuple):
    """One shard to make: these images of the split, in this order."""

    split: str
    number: int
    indices: np.ndarray
    stride: int  # every stride-th image of the source is measured; 0: none
    earlier: Packed | None  # the shard of an earlier run


class Prepared(NamedTuple):
    """A decodable image on its way from the source to a shard."""

    record: Record
    extension: str
    content: bytes
    is_reduced: bool
    moments: np.ndarray | None  # of the channels, if the image is measured
    fitted: Fitted | None  # the objects of an annotated image


class Job(NamedTuple):
    """The state that workers inherit from the parent process."""

    card: Card
    opened: OpenSource
    output: Path
    threads: int  # per worker
    done: Any  # number of images, over all workers
    stop: Any  # event: workers give up


def write_shards(card: Card, output: Path, *, threads: int) -> Manifest:
    """Write a card's shards and their manifest into `output`, with `threads` worker processes.

    Raises a one-line `ValueError` if the source or, with `on_error: fail`, an image cannot be used.
    """
    output.mkdir(parents=True, exist_ok=True)
    with open_source(card, scratch=output) as opened:
        state = State(output, _identity(card, opened))
        try:
            tasks = list(_tasks(opened, state))
            packed = _pack_all(card, opened, output, tasks, state, threads)
        except BrokenProcessPool:
            reason = "a worker process was killed, most likely for want of memory: run with fewer threads"
            raise ValueError(reason) from None
    splits = {}
    for name in opened.splits:
        of_split = [(task, part) for task, part in zip(tasks, packed, strict=True) if part.split == name]
        splits[name] = _close_gaps(of_split, output, state)
    manifest = _manifest(card, opened, splits)
    state.remove_others(manifest)
    write_json(output / "manifest.json", manifest.content())
    return manifest


def summary(manifest: Manifest) -> str:
    """Return lines with the images of each split and the size in MB, with pictures that are not read, and objects."""
    splits, unread, objects = [], [], []
    for name, split in manifest.splits.items():
        notes = [f"{len(split.rejected)} rejected"] if split.rejected else []
        notes += [f"{split.reduced} reduced to max_side"] if split.reduced else []
        splits.append(f"{name} {split.images} images" + (f" ({', '.join(notes)})" if notes else ""))
        if split.unread:
            unread.append(f"{name} {list_counts(split.unread)}")
        if split.objects is not None:
            left_out = f" ({len(split.objects.unused)} left out)" if split.objects.unused else ""
            objects.append(f"{name} {split.objects.count}{left_out}, {split.objects.empty} images without any")
    size = sum(split.bytes for split in manifest.splits.values()) / 1e6
    lines = [f"{manifest.dataset}: {', '.join(splits)}, {size:.1f} MB"]
    if unread:
        lines.append(f"{manifest.dataset}: left out, formats that are not read (convert them): {'; '.join(unread)}")
    if objects:
        lines.append(f"{manifest.dataset}: objects: {'; '.join(objects)}")
    return "\n".join(lines)


class State:
    """The finished shards of a folder, in a file, so that a later run can keep them."""

    def __init__(self, output: Path, identity: str) -> None:
        self._output, self._identity = output, identity
        self._path = output / ".state.jsonl"
        if not self._path.exists() and any(output.glob("*.tar")):
            raise ValueError(f"{output} has tars that sharding did not write: choose another folder or empty it")
        self._files: set[str] = set()  # of all runs
        self._finished: dict[tuple[str, int], Packed] = {}
        if self._path.exists():
            for line in self._path.read_text(encoding="utf-8").splitlines():
                self._recall(line)
        write_text(self._path, "".join(map(self._line, self._finished.values())))
        for leftover in [*output.glob(".*.tmp"), *output.glob(".spill-*")]:  # of a killed process
            leftover.unlink()
        (output / "manifest.json").unlink(missing_ok=True)  # invalid until sharding ends

    def earlier(self, split: str, number: int) -> Packed | None:
        """Return the shard of an earlier run with the same source, if there is one."""
        return self._finished.get((split, number))

    def note(self, part: Packed) -> None:
        """Record a finished shard."""
        self._finished[part.split, part.number] = part
        with room_for(self._path), open(self._path, "a", encoding="utf-8") as file:
            file.write(self._line(part))

    def remove_others(self, manifest: Manifest) -> None:
        """Remove the shards of earlier runs that are not in the manifest."""
        current = {shard.file for split in manifest.splits.values() for shard in split.shards}
        recorded = self._files | {part.shard.file for part in self._finished.values()}
        for file in recorded - current:
            tar = self._output / file
            tar.unlink(missing_ok=True)
            tar.with_suffix(".idx").unlink(missing_ok=True)
            tar.with_suffix(".names").unlink(missing_ok=True)

    def _line(self, part: Packed) -> str:
        return json.dumps([self._identity, part.model_dump(mode="json")]) + "\n"

    def _recall(self, line: str) -> None:
        try:
            identity, content = json.loads(line)
            part = Packed.model_validate(content)
        except ValueError:  # truncated when the process was killed
            return
        self._files.add(part.shard.file)
        if identity == self._identity:
            self._finished[part.split, part.number] = part


# In a worker process


def pack(task: Task) -> Packed:
    """Make one shard. With `on_error: fail` the first unusable image is a `ValueError`."""
    path = _job.output / f"{task.split}-{task.number:06d}.tar"
    if task.earlier is not None and _is_valid(path, task.earlier):
        _advance(len(task.indices))
        return task.earlier
    split = _job.opened.splits[task.split]
    bad: list[Bad] = []
    unused: list[Bad] = []
    objects: np.ndarray | None = None
    labels: Counter[int] = Counter()
    names: list[str] = []
    moments, measured, reduced = np.zeros((2, 3)), 0, 0
    with new_shard(path) as writer:
        for index, prepared in _prepare_all(split, task):
            _advance(1)
            if isinstance(prepared, Exception):
                bad.append(_bad(split, index, prepared))
                continue
            record = prepared.record
            fitted = prepared.fitted
            boxes = fitted.member if fitted is not None else None
            writer.add(index, prepared.extension, prepared.content, record.label, record.labels, boxes)
            if fitted is not None:
                unused += [Bad(index, f"{record.name}: {name}", reason) for name, reason in fitted.unused]
                objects = _count_objects(fitted) + (0 if objects is None else objects)
            reduced += prepared.is_reduced
            labels[record.label] += 1
            names.append(record.name)
            if prepared.moments is not None:
                moments += prepared.moments
                measured += 1
        shard = writer.close()
    write_names(path, names)
    return Packed(
        split=task.split,
        number=task.number,
        shard=shard,
        bad=tuple(bad),
        labels=dict(sorted(labels.items())),
        moments=tuple(tuple(row) for row in moments.tolist()),
        measured=measured,
        objects=None if objects is None else tuple(objects.tolist()),
        unused=tuple(unused),
        reduced=reduced,
    )


def _prepare_all(split: SourceSplit, task: Task) -> Iterator[tuple[int, Prepared | Exception]]:
    """Read and decode the images of a shard in order; in several threads if there are fewer shards than workers."""

    def fetch(index: int) -> Record | Exception:
        try:
            return split.read(index)
        except (ValueError, OSError) as error:
            return error

    def decode(index: int, record: Record | Exception) -> Prepared | Exception:
        if isinstance(record, Exception):
            return record
        try:
            extension, content, image, is_reduced = prepare(record.image, _job.card.max_side)
            fitted = _fit_objects(record, content)
        except ValueError as error:
            return error
        is_measured = task.stride and index % task.stride == 0
        moments = channel_moments(image) if is_measured else None
        return Prepared(record, extension, content, is_reduced, moments, fitted)

    indices = task.indices.tolist()
    if _job.threads == 1:
        for index in indices:
            yield index, decode(index, fetch(index))
        return
    with ThreadPoolExecutor(_job.threads) as pool:
        for start in range(0, len(indices), AHEAD):
            part = indices[start : start + AHEAD]
            records = map(fetch, part)  # in this thread: a library's data set may not be thread-safe
            yield from zip(part, pool.map(decode, part, records), strict=True)


def _fit_objects(record: Record, stored: bytes) -> Fitted | None:
    """Return the objects of an annotated image in pixels of the `stored` one.

    With `on_error: fail` the first object that cannot be used is a `ValueError`.
    """
    if record.boxes is None:
        return None
    assert isinstance(record.image, bytes)
    fitted = fit_objects(record.boxes, upright_size(record.image), upright_size(stored))
    if fitted.unused and _job.card.on_error == "fail":
        raise ValueError(": ".join(fitted.unused[0]))
    return fitted


def _count_objects(fitted: Fitted) -> np.ndarray:
    masks = sum("mask" in described for described in fitted.objects)
    return np.array([len(fitted.objects), masks, not fitted.objects], np.int64)


def _bad(split: SourceSplit, index: int, error: Exception) -> Bad:
    reason = error.strerror if isinstance(error, OSError) and error.strerror else " ".join(str(error).split())
    bad = Bad(index, split.name(index), reason)
    if _job.card.on_error == "fail":
        remedy = f"Repair or remove it, or set on_error: skip in {_job.card.name}'s card"
        raise ValueError(f"{excerpt(bad.name)}: {excerpt(reason)}. {remedy}")
    return bad


def _is_valid(path: Path, part: Packed) -> bool:
    """Return whether the shard of an earlier run is unchanged and acceptable for `on_error`."""
    if (part.bad or part.unused) and _job.card.on_error == "fail":
        return False
    index = path.with_suffix(".idx")
    if not (path.exists() and index.exists()):
        return False
    return file_digest(path) == part.shard.sha256 and file_digest(index) == part.shard.index_sha256


def _advance(images: int) -> None:
    with _job.done.get_lock():
        _job.done.value += images
    if _job.stop.is_set():
        raise InterruptedError("another process of this run was interrupted")


def _become_worker(job: Job) -> None:
    global _job
    _job = job
    warnings.filterwarnings("ignore", module="PIL")  # odd metadata does not matter
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C and sets job.stop
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # die with the parent, even if it is killed
    parent = multiprocessing.parent_process()
    if parent is None or os.getppid() != parent.pid:  # the parent died before prctl
        os._exit(1)


# In the parent process


def _tasks(opened: OpenSource, state: State) -> Iterator[Task]:
    for position, (name, split) in enumerate(opened.splits.items()):
        if split.size > MAX_IMAGES:
            raise ValueError(f"the split {name!r} has {split.size} images, more than {MAX_IMAGES}: divide it")
        order = np.random.default_rng(SHUFFLE_SEED).permutation(split.size)
        stride = -(-split.size // MEASURED) if position == 0 else 0
        for number, start in enumerate(range(0, split.size, IMAGES_PER_SHARD)):
            yield Task(name, number, order[start : start + IMAGES_PER_SHARD], stride, state.earlier(name, number))


def _pack_all(
    card: Card, opened: OpenSource, output: Path, tasks: list[Task], state: State, threads: int
) -> list[Packed]:
    """Make all shards in parallel, with one progress bar; return them in order."""
    context = multiprocessing.get_context("fork")  # the workers share lists and open files without copies
    job = Job(card, opened, output, max(1, threads // len(tasks)), context.Value("q", 0), context.Event())
    total = sum(len(task.indices) for task in tasks)
    with ProcessPoolExecutor(min(threads, len(tasks)), context, initializer=_become_worker, initargs=(job,)) as pool:
        futures = [pool.submit(pack, task) for task in tasks]
        pending = set(futures)
        try:
            with progress_bar(total, f"shards/{card.name}", unit="images") as bar:
                while pending and not any(map(_has_failed, futures)):
                    done, pending = wait(pending, timeout=0.3, return_when=FIRST_COMPLETED)
                    bar.update(job.done.value - bar.n)
                    for future in done:
                        if not _has_failed(future):
                            state.note(future.result())
        except BaseException:
            job.stop.set()
            raise
        finally:
            pool.shutdown(cancel_futures=True)
        return [future.result() for future in futures]  # raises the first error in order, which is always the same


def _has_failed(future: "Future[Packed]") -> bool:
    return future.done() and future.exception() is not None


def _close_gaps(packed: list[tuple[Task, Packed]], output: Path, state: State) -> list[Packed]:
    """Give the images of a split the indices 0, 1, 2, ... if some were left out; return its shards.

    The shards of an earlier run that left out other images are renumbered.
    """
    left_out = sorted(bad.index for _, part in packed for bad in part.bad)
    closed = hashlib.sha256(json.dumps(left_out).encode()).hexdigest() if left_out else ""
    parts = []
    for task, part in packed:
        if part.closed != closed:
            missing = {bad.index for bad in part.bad}
            indices = [index - bisect(left_out, index) for index in task.indices.tolist() if index not in missing]
            shard = renumber(output / part.shard.file, indices)
            part = part.model_copy(update={"shard": shard, "closed": closed})
            state.note(part)
        parts.append(part)
    return parts


def _manifest(card: Card, opened: OpenSource, splits: dict[str, list[Packed]]) -> Manifest:
    num_classes = _num_classes(card, opened, splits)
    if card.mean is not None and card.std is not None:
        mean, std = card.mean, card.std
    else:
        mean, std = _mean_and_std(next(iter(splits.values())))
    return Manifest(
        dataset=card.name,
        image_size=card.image_size,
        mean=mean,
        std=std,
        classes=opened.classes,
        avoid=card.avoid,
        splits={
            name: _split(card, name, parts, num_classes, opened.splits[name].unread) for name, parts in splits.items()
        },
    )


def _num_classes(card: Card, opened: OpenSource, splits: dict[str, list[Packed]]) -> int:
    highest = -1
    for parts in splits.values():
        for part in parts:
            highest = max(highest, *part.labels, -1)
    if opened.classes is None:
        return highest + 1
    if highest >= len(opened.classes):
        raise ValueError(f"{card.name}: a label is {highest}, but there are {len(opened.classes)} classes")
    return len(opened.classes)


def _split(card: Card, name: str, parts: list[Packed], num_classes: int, unread: Mapping[str, int]) -> Split:
    labels: Counter[int] = Counter()
    for part in parts:
        labels.update(part.labels)
    rejected = sorted(bad for part in parts for bad in part.bad)
    if not labels:
        first = f"{excerpt(rejected[0].name)}: {excerpt(rejected[0].reason)}"
        raise ValueError(f"{card.name}: no usable image in split {name!r}; first failure: {first}")
    is_labelled = min(labels) >= 0
    counts = [part.objects for part in parts if part.objects is not None]
    objects = None
    if counts:
        count, masks, empty = np.sum(counts, axis=0).tolist()
        unused = sorted(bad for part in parts for bad in part.unused)
        objects = Objects(count=count, masks=masks, empty=empty, unused=_rejected(unused))
    shards = tuple(part.shard for part in parts if part.shard.images)
    return Split(
        images=labels.total(),
        labelled=is_labelled,
        bytes=sum(shard.bytes for shard in shards),
        class_counts=tuple(labels[label] for label in range(num_classes)) if is_labelled else None,
        shards=shards,
        rejected=_rejected(rejected),
        unread=dict(unread),
        objects=objects,
        reduced=sum(part.reduced for part in parts),
    )


def _rejected(bad: list[Bad]) -> tuple[Rejected, ...]:
    return tuple(Rejected(name=each.name, reason=each.reason) for each in bad)


def _mean_and_std(parts: list[Packed]) -> tuple[Channels, Channels]:
    """Return mean and standard deviation per channel; every image has the same weight, whatever its size."""
    measured = sum(part.measured for part in parts)
    mean, square = np.sum([part.moments for part in parts], axis=0) / max(1, measured)
    std = np.sqrt(np.maximum(square - mean**2, 1e-6))  # above zero even for images of one colour
    return _channels(mean), _channels(std)


def _channels(values: np.ndarray) -> Channels:
    return cast(Channels, tuple(np.round(values, 4).tolist()))


def _identity(card: Card, opened: OpenSource) -> str:
    """Return a digest of everything that determines the shards: format, size limit, classes and content."""
    content = [FORMAT, SHUFFLE_SEED, IMAGES_PER_SHARD, MEASURED, card.max_side, opened.classes]
    content += [[name, split.size, split.identity] for name, split in opened.splits.items()]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()
