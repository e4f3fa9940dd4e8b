"""Shard a data set: from a card to tars, indices and a manifest.

One worker makes one whole shard: it reads the images that a fixed permutation puts there, proves each decodable (with
several threads where there are fewer shards than workers) and writes the tar. So memory stays constant and the result
is the same, byte for byte, for any number of workers. A finished shard appears by rename and is noted in
`.state.jsonl`; a later run keeps it if the source is the same and the tar still has the noted sha256. Keys are
positions in the source's order; only if images were left out (`on_error: skip`) are the shards written once more, with
indices that have no gaps.
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
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, ThreadPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np

from ssl_core.config import Strict
from ssl_core.data.card import Card, Channels
from ssl_core.data.image_files import channel_moments, prepare
from ssl_core.data.multilabels import new_shard, renumber
from ssl_core.data.shards import MAX_IMAGES, Manifest, Rejected, Shard, Split, file_sha256
from ssl_core.data.sources.dispatch import Opened, Record, Samples, open_source
from ssl_core.files import room_for, write_json, write_text
from ssl_core.progress import progress_bar

IMAGES_PER_SHARD = 2000  # CIFAR: 25 tars of 6 MB; ImageNet: 641 of 240 MB, enough for DALI to shuffle whole tars
SHUFFLE_SEED = 0
MEASURED = 10_000  # images of the first split that mean and std are measured on, at most
AHEAD = 64  # images that threads of one worker read before any of them is written
FORMAT = 2  # counts up when the same source is to give other shards
PR_SET_PDEATHSIG = 1

_job: "Job"  # in a worker


class Bad(NamedTuple):
    """An image of the source that cannot be used."""

    index: int
    name: str
    reason: str


class Packed(Strict):
    """What one finished shard adds to its split."""

    split: str
    number: int
    shard: Shard
    bad: tuple[Bad, ...]
    labels: dict[int, int]  # label -> images
    moments: tuple[tuple[float, ...], ...]  # channel_moments, summed over the measured images
    measured: int
    closed: str = ""  # digest of the split's images that its indices pass over, since they were left out


class Task(NamedTuple):
    """One shard to make: these images of the split, in this order."""

    split: str
    number: int
    indices: np.ndarray
    stride: int  # every stride-th image of the source is measured; 0: none
    known: Packed | None  # from an earlier run


def write_shards(card: Card, output: Path, *, threads: int) -> Manifest:
    """Write a card's shards and their manifest into `output`, with `threads` worker processes.

    Raises a one-line `ValueError` if the source or, with `on_error: fail`, an image cannot be used.
    """
    output.mkdir(parents=True, exist_ok=True)
    with open_source(card, scratch=output) as opened:
        state = State(output, _identity(opened))
        try:
            tasks = list(_tasks(opened, state))
            parts = _pack_all(card, opened, output, tasks, state, threads)
        except BrokenProcessPool:
            reason = "a worker process was killed, most likely for want of memory: run with fewer threads"
            raise ValueError(reason) from None
    splits = {}
    for name in opened.splits:
        packed = [(task, part) for task, part in zip(tasks, parts, strict=True) if part.split == name]
        splits[name] = _close_gaps(packed, output, state)
    manifest = _manifest(card, opened, splits)
    state.remove_others(manifest)
    write_json(output / "manifest.json", manifest.content())
    return manifest


class Proved(NamedTuple):
    """An image that can be decoded, on its way from the source into a shard."""

    record: Record
    extension: str
    stored: bytes
    moments: np.ndarray | None  # of the channels, if it is measured


class Job(NamedTuple):
    """What the workers inherit from the process that starts them."""

    card: Card
    opened: Opened
    output: Path
    threads: int  # of each worker
    done: Any  # images, counted over all workers
    stop: Any  # set: give up


class State:
    """Which shards in a folder are finished, kept in a file so that a later run can tell and prove it."""

    def __init__(self, output: Path, identity: str) -> None:
        self._output, self._identity = output, identity
        self._path = output / ".state.jsonl"
        if not self._path.exists() and any(output.glob("*.tar")):
            raise ValueError(f"{output} holds tars that were not written here: choose another folder or empty it")
        self._files: set[str] = set()  # all that any run wrote
        self._known: dict[tuple[str, int], Packed] = {}
        for line in self._path.read_text().splitlines() if self._path.exists() else ():
            self._recall(line)
        write_text(self._path, "".join(map(self._line, self._known.values())))
        for left in [*output.glob(".*.tmp"), *output.glob(".spill-*")]:  # of a process that was killed
            left.unlink()
        (output / "manifest.json").unlink(missing_ok=True)  # until it is true again

    def known(self, split: str, number: int) -> Packed | None:
        """Return what an earlier run noted of this shard."""
        return self._known.get((split, number))

    def note(self, part: Packed) -> None:
        """Write down that a shard is finished."""
        self._known[part.split, part.number] = part
        with room_for(self._path), open(self._path, "a") as file:
            file.write(self._line(part))

    def remove_others(self, manifest: Manifest) -> None:
        """Remove the shards of earlier runs that the manifest does not name."""
        named = {shard.file for split in manifest.splits.values() for shard in split.shards}
        for file in self._files | {part.shard.file for part in self._known.values()}:
            if file not in named:
                (self._output / file).unlink(missing_ok=True)
                (self._output / file).with_suffix(".idx").unlink(missing_ok=True)

    def _line(self, part: Packed) -> str:
        return json.dumps([self._identity, part.model_dump(mode="json")]) + "\n"

    def _recall(self, line: str) -> None:
        try:
            identity, content = json.loads(line)
            part = Packed.model_validate(content)
        except ValueError:  # cut short by a kill
            return
        self._files.add(part.shard.file)
        if identity == self._identity:
            self._known[part.split, part.number] = part


def pack(task: Task) -> Packed:
    """Make one shard, in a worker; with `on_error: fail` the first unusable image is a `ValueError`."""
    path = _job.output / f"{task.split}-{task.number:06d}.tar"
    if task.known is not None and _is_kept(path, task.known):
        _advance(len(task.indices))
        return task.known
    samples = _job.opened.splits[task.split]
    bad, labels, moments, measured = [], Counter(), np.zeros((2, 3)), 0
    with new_shard(path) as writer:
        for index, found in _proved(samples, task):
            _advance(1)
            if isinstance(found, Exception):
                bad.append(_bad(samples, index, found))
                continue
            record = found.record
            if record.labels is None:
                writer.add(index, found.extension, found.stored, record.label)
            else:
                writer.add_labels(index, found.extension, found.stored, record.labels)
            labels[record.label] += 1
            if found.moments is not None:
                moments += found.moments
                measured += 1
        shard = writer.close()
    sums = tuple(tuple(row) for row in moments.tolist())
    return Packed(
        split=task.split,
        number=task.number,
        shard=shard,
        bad=tuple(bad),
        labels=dict(sorted(labels.items())),
        moments=sums,
        measured=measured,
    )


def _proved(samples: Samples, task: Task) -> Iterator[tuple[int, Proved | Exception]]:
    """Read and prove a shard's images, in its order; in several threads where there are fewer shards than workers."""

    def fetch(index: int) -> Record | Exception:
        try:
            return samples.read(index)
        except (ValueError, OSError) as error:
            return error

    def prove(index: int, record: Record | Exception) -> Proved | Exception:
        if isinstance(record, Exception):
            return record
        try:
            extension, stored, image = prepare(record.image)
        except ValueError as error:
            return error
        measured = task.stride and index % task.stride == 0
        return Proved(record, extension, stored, channel_moments(image) if measured else None)

    indices = task.indices.tolist()
    if _job.threads == 1:
        yield from zip(indices, map(prove, indices, map(fetch, indices)), strict=True)
        return
    with ThreadPoolExecutor(_job.threads) as pool:
        for start in range(0, len(indices), AHEAD):
            part = indices[start : start + AHEAD]  # fetched here: a library's data set may be one thread's
            yield from zip(part, pool.map(prove, part, map(fetch, part)), strict=True)


def _bad(samples: Samples, index: int, error: Exception) -> Bad:
    reason = error.strerror if isinstance(error, OSError) and error.strerror else " ".join(str(error).split())
    bad = Bad(index, samples.name(index), reason)
    if _job.card.on_error == "fail":
        raise ValueError(f"{bad.name}: {reason}. Mend or remove it, or say on_error: skip in {_job.card.name}'s card")
    return bad


def _is_kept(path: Path, part: Packed) -> bool:
    index = path.with_suffix(".idx")
    there = path.exists() and index.exists() and file_sha256(path) == part.shard.sha256
    there = there and file_sha256(index) == part.shard.index_sha256
    return there and not (part.bad and _job.card.on_error == "fail")


def _advance(images: int) -> None:
    with _job.done.get_lock():
        _job.done.value += images
    if _job.stop.is_set():
        raise InterruptedError("another process of this run was interrupted")


def _become_worker(job: Job) -> None:
    global _job
    _job = job
    warnings.filterwarnings("ignore", module="PIL")  # an odd EXIF block is no reason to complain
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent hears Ctrl-C and sets job.stop
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # die with the parent, whatever kills it
    parent = multiprocessing.parent_process()
    if parent is None or os.getppid() != parent.pid:  # it died before this line was reached
        os._exit(1)


def _pack_all(card: Card, opened: Opened, output: Path, tasks: list[Task], state: State, threads: int) -> list[Packed]:
    """Make all shards in parallel, under one progress bar; return them in order."""
    context = multiprocessing.get_context("fork")  # the workers share the listing and open files without copies
    job = Job(card, opened, output, max(1, threads // len(tasks)), context.Value("q", 0), context.Event())
    with ProcessPoolExecutor(threads, context, initializer=_become_worker, initargs=(job,)) as pool:
        futures = [pool.submit(pack, task) for task in tasks]
        pending, total = set(futures), sum(len(task.indices) for task in tasks)
        try:
            with progress_bar(total, f"shards/{card.name}", unit="images") as bar:
                while pending and not any(future.exception() for future in futures if future.done()):
                    done, pending = wait(pending, timeout=0.3, return_when=FIRST_COMPLETED)
                    bar.update(job.done.value - bar.n)
                    for future in done:
                        if future.exception() is None:
                            state.note(future.result())
        except BaseException:
            job.stop.set()
            raise
        finally:
            pool.shutdown(cancel_futures=True)
        return [future.result() for future in futures]  # of several errors always the same one, the first in order


def _tasks(opened: Opened, state: State) -> Iterator[Task]:
    for position, (name, samples) in enumerate(opened.splits.items()):
        if samples.size > MAX_IMAGES:
            raise ValueError(f"the split {name!r} has {samples.size} images, more than {MAX_IMAGES}: split it")
        order = np.random.default_rng(SHUFFLE_SEED).permutation(samples.size)
        stride = -(-samples.size // MEASURED) if position == 0 else 0
        for number, start in enumerate(range(0, samples.size, IMAGES_PER_SHARD)):
            yield Task(name, number, order[start : start + IMAGES_PER_SHARD], stride, state.known(name, number))


def _close_gaps(packed: list[tuple[Task, Packed]], output: Path, state: State) -> list[Packed]:
    """Give the images of a split the indices 0, 1, 2, ... if some were left out; return its shards.

    Shards kept from a run that left out other images are numbered anew.
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


def _manifest(card: Card, opened: Opened, splits: dict[str, list[Packed]]) -> Manifest:
    highest = max((label for parts in splits.values() for part in parts for label in part.labels), default=-1)
    if opened.classes is not None and highest >= len(opened.classes):
        raise ValueError(f"{card.name}: a label is {highest}, but there are {len(opened.classes)} classes")
    num_classes = len(opened.classes) if opened.classes is not None else highest + 1
    mean, std = (card.mean, card.std) if card.mean and card.std else _measured(next(iter(splits.values())))
    return Manifest(
        dataset=card.name,
        image_size=card.image_size,
        mean=mean,
        std=std,
        classes=opened.classes,
        avoid=card.avoid,
        splits={name: _split(card, name, parts, num_classes) for name, parts in splits.items()},
    )


def _split(card: Card, name: str, parts: list[Packed], num_classes: int) -> Split:
    labels = Counter()
    for part in parts:
        labels.update(part.labels)
    rejected = sorted(bad for part in parts for bad in part.bad)
    if not labels:
        first = f"{rejected[0].name}: {rejected[0].reason}"
        raise ValueError(f"{card.name}: no image of {name!r} can be used, neither {first}")
    labelled = min(labels) >= 0
    shards = tuple(part.shard for part in parts if part.shard.images)
    return Split(
        images=labels.total(),
        labelled=labelled,
        bytes=sum(shard.bytes for shard in shards),
        class_counts=tuple(labels[label] for label in range(num_classes)) if labelled else None,
        shards=shards,
        rejected=tuple(Rejected(name=bad.name, reason=bad.reason) for bad in rejected),
    )


def _measured(parts: list[Packed]) -> tuple[Channels, Channels]:
    """Return mean and standard deviation of the channels; every image counts alike, whatever its size."""
    mean, square = np.sum([part.moments for part in parts], axis=0) / max(1, sum(part.measured for part in parts))
    std = np.sqrt(np.maximum(square - mean**2, 1e-6))  # images of one colour must not divide by zero
    return cast(Channels, tuple(np.round(mean, 4).tolist())), cast(Channels, tuple(np.round(std, 4).tolist()))


def _identity(opened: Opened) -> str:
    """Return a digest that changes when the shards would: of the format, the classes and all that is read."""
    content = [FORMAT, SHUFFLE_SEED, IMAGES_PER_SHARD, MEASURED, opened.classes]
    content += [[name, samples.size, samples.identity] for name, samples in opened.splits.items()]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def summary(manifest: Manifest) -> str:
    """Return one line: the images of each split and the size in MB."""
    splits = [
        f"{name} {split.images} images" + (f" ({len(split.rejected)} rejected)" if split.rejected else "")
        for name, split in manifest.splits.items()
    ]
    size = sum(split.bytes for split in manifest.splits.values()) / 1e6
    return f"{manifest.dataset}: {', '.join(splits)}, {size:.1f} MB"
