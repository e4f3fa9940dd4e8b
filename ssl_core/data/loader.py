"""Batches of views from shards: exact epochs, data divided among ranks, and a state for exact resumption."""

import functools
import hashlib
import itertools
import json
import math
import re
import shutil
import tempfile
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import torch
from nvidia.dali.pipeline import Pipeline
from torch import Tensor

from ssl_core.config import Dataset, Subset
from ssl_core.data import pipeline
from ssl_core.data.batch import Batch
from ssl_core.data.image_files import has_plain_structure
from ssl_core.data.pipeline import Plan
from ssl_core.data.shards import (
    Manifest,
    index_text,
    read_index,
    read_member,
    source_name,
    verify,
)
from ssl_core.data.views import Views
from ssl_core.mistakes import excerpt, is_out_of_memory

HASHED_BYTES = 2**29  # splits of at most this size (half a second) are hashed before reading
SEARCH_SECONDS = 60  # for an image that DALI failed to read; images of 100 kB are checked at some thousands a second
SAMPLE = re.compile(r"^\S+ \S+ \S+ (\d{8})", re.MULTILINE)  # the dataset index in a line of an index file
SHUFFLE_BUFFER = 300_000  # images; an epoch of at most so many is a uniform permutation (0.9 KB of memory per image)


class Loader:
    """Endless batches of a data set's views.

    With `shuffle` every epoch is a new permutation without its incomplete last batch, divided among the ranks.
    Without it an epoch has each image exactly once, in the shards' order, and the last batch may be smaller.
    Raises `ValueError` for missing or truncated shards, a subset or batch larger than the data, and unreadable images.
    """

    def __init__(
        self,
        manifest: Manifest,
        dataset: Dataset,
        views: Views,
        *,
        batch_size: int,
        seed: int,
        shuffle: bool = True,
        rank: int = 0,
        world_size: int = 1,
        device: Literal["cpu", "cuda"] | str = "cpu",
        threads: int = 1,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        only: Sequence[int] | None = None,
    ) -> None:
        """Prepare the loader; `batch_size` is per rank, `mean` and `std` (of pixels in 0..1) replace the manifest's.

        `only` selects images of the split by their index, instead of the dataset's subset.
        """
        split = manifest.split(dataset.split)
        # DALI's decoder may crash on a damaged image, so shards are hashed first if that is quick.
        verify(manifest, dataset.split, deep=split.bytes <= HASHED_BYTES)
        tars, indices = manifest.tars(dataset.split), manifest.indices(dataset.split)
        self._verify = functools.partial(verify, manifest, dataset.split)
        self.num_images = split.images
        self._remove_folder: Callable[[], Any] = lambda: None
        self._position: Tensor | None = None  # dataset index -> position in the sorted subset
        if only is not None or dataset.subset is not None:
            if only is not None:
                chosen = np.unique(np.asarray(only, dtype=np.int64))
            else:
                assert dataset.subset is not None
                chosen = draw_subset(split.images, dataset.subset, f"{dataset.name}/{dataset.split}")
            self.num_images = len(chosen)
            self._position = torch.full((split.images,), -1, dtype=torch.int64)
            self._position[torch.from_numpy(chosen)] = torch.arange(len(chosen))
            folder = tempfile.mkdtemp(prefix="ssl-core-subset-")
            self._remove_folder = weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
            tars, indices = _filter_indices(tars, indices, self._position.numpy() >= 0, Path(folder))
        start, end = (self.num_images * part // world_size for part in (rank, rank + 1))  # as DALI divides the data
        most = math.ceil(self.num_images / world_size)  # with shuffling, ranks exchange their parts every epoch
        images = self.num_images // world_size if shuffle else end - start
        if shuffle and batch_size > images:
            raise ValueError(
                f"a batch of {batch_size} images per process is larger than {dataset.name}/{dataset.split} with "
                f"{images} images per process: give a batch_size of {images * world_size} or less"
            )
        self.batch_size, self.shuffle, self.views = batch_size, shuffle, views
        self.steps_per_epoch = images // batch_size if shuffle else math.ceil(images / batch_size)
        self.step = 0
        self._last_batch = images - (self.steps_per_epoch - 1) * batch_size  # smaller only without shuffling
        self._runs_per_epoch = math.ceil(most / batch_size)  # the pipeline pads all ranks to the largest part
        self._threads = threads
        self._plan = Plan(
            tars=tuple(map(str, tars)),
            indices=tuple(map(str, indices)),
            views=views,
            mean=tuple(manifest.mean if mean is None else mean),
            std=tuple(manifest.std if std is None else std),
            seed=seed,
            shuffle_buffer=min(most, SHUFFLE_BUFFER) if shuffle else 0,
            rank=rank,
            world_size=world_size,
            gpu=device == "cuda",
        )
        self._content = [shard.sha256 for shard in split.shards] + [str(dataset.subset)]
        self._content += [] if only is None else [str(sorted(only))]
        self._pipeline: Pipeline | None = None
        self._checkpoint: bytes | None = None  # the state in which the pipeline is built

    @property
    def normalisation(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and standard deviation per channel, of pixels in 0..1, that normalise the views."""
        return self._plan.mean, self._plan.std

    def next(self) -> Batch:
        """Return the next batch, of the next epoch after the last batch of an epoch."""
        position = self.step % self.steps_per_epoch
        if position == 0 and self.step > 0:
            self._skip(self._runs_per_epoch - self.steps_per_epoch)  # drop the incomplete batch at the end of the epoch
        outputs = self._run()
        self.step += 1
        meta, *tensors = (torch.from_dlpack(output.as_tensor()) for output in outputs)
        if not self.shuffle and position == self.steps_per_epoch - 1 and self._last_batch < self.batch_size:
            meta, *tensors = (tensor[: self._last_batch] for tensor in (meta, *tensors))
        indices = meta[:, 1]
        if self._position is not None:
            self._position = self._position.to(meta.device)
            indices = self._position[indices]
        images = (tensor.permute(0, 3, 1, 2) for tensor in tensors)
        views = {group: [next(images) for _ in range(view.count)] for group, view in self.views.items()}
        return Batch(views, meta[:, 0], indices)

    def epoch(self) -> Iterator[Batch]:
        """Iterate over exactly one epoch; the rest of an epoch that was begun is skipped first."""
        while self.step % self.steps_per_epoch:
            self.next()
        for _ in range(self.steps_per_epoch):
            yield self.next()

    def state(self) -> dict[str, Any]:
        """Return the position of the loader, in types that `torch.load(weights_only=True)` accepts."""
        pipe = self._pipeline
        checkpoint = self._checkpoint if pipe is None else pipe.checkpoint()
        return {**self._identity, "step": self.step, "pipeline": checkpoint or b""}

    def restore(self, state: dict[str, Any]) -> None:
        """Continue exactly from `state()`; raise `ValueError` with the differences if it is of another loader."""
        identity = self._identity
        different = [key for key in identity if state.get(key) != identity[key]]
        if different:
            differences = "; ".join(_differences(different, state, identity))
            raise ValueError(f"the loader's saved state does not fit: {differences}")
        self._stop()
        self.step = state["step"]
        self._checkpoint = state["pipeline"] or None

    def close(self) -> None:
        """Stop the pipeline and remove the subset's temporary index files."""
        self._stop()
        self._remove_folder()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @functools.cached_property
    def _identity(self) -> dict[str, Any]:
        """Return the values that must be equal to restore a state; DALI itself does not compare them."""
        plan = self._plan
        names = {"tars": _names(plan.tars), "indices": _names(plan.indices)}  # independent of the folder
        graph = pipeline.serialize(replace(plan, **names), batch_size=self.batch_size)
        return {
            "batch_size": self.batch_size,
            "seed": plan.seed,
            "rank": plan.rank,
            "world_size": plan.world_size,
            "shuffle": self.shuffle,
            "data": _digest("\n".join(self._content).encode()),
            "views": json.dumps({group: view.model_dump(mode="json") for group, view in self.views.items()}),
            "graph": _digest(graph),
        }

    def _run(self) -> Any:
        try:
            if self._pipeline is None:
                self._pipeline = pipeline.build(
                    self._plan,
                    batch_size=self.batch_size,
                    threads=self._threads,
                    device_id=torch.cuda.current_device() if self._plan.gpu else None,
                    checkpoint=self._checkpoint,
                )
            return self._pipeline.run()
        except RuntimeError as error:
            self._stop()
            self._verify()  # a tar that changed since the start
            raise _data_error(error, [Path(tar) for tar in self._plan.tars]) from error

    def _skip(self, runs: int) -> None:
        for _ in range(runs):
            self._run()

    def _stop(self) -> None:
        self._pipeline = self._checkpoint = None


def draw_subset(num_images: int, subset: Subset, name: str) -> np.ndarray:
    """Draw dataset indices without labels, sorted; raise `ValueError` if the split has fewer images."""
    if subset.images > num_images:
        raise ValueError(f"subset.images {subset.images} is more than {name} has ({num_images})")
    return np.sort(np.random.default_rng(subset.seed).permutation(num_images)[: subset.images])


def _filter_indices(
    tars: list[Path], indices: list[Path], is_chosen: np.ndarray, folder: Path
) -> tuple[list[Path], list[Path]]:
    """Write indices of the chosen samples only into `folder`; tars without any are left out.

    No loop over samples: ImageNet has 1.3 million.
    """
    kept_tars, kept_indices = [], []
    for tar, index in zip(tars, indices, strict=True):
        text = index.read_text(encoding="ascii")
        numbers = np.array(SAMPLE.findall(text), dtype=np.int64)
        kept = list(itertools.compress(text.splitlines()[1:], is_chosen[numbers]))
        if kept:
            filtered = folder / index.name
            filtered.write_text(index_text(kept), encoding="ascii")
            kept_tars.append(tar)
            kept_indices.append(filtered)
    return kept_tars, kept_indices


def _names(paths: Sequence[str]) -> tuple[str, ...]:
    return tuple(Path(path).name for path in paths)


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _differences(keys: list[str], was: dict[str, Any], now: dict[str, Any]) -> Iterator[str]:
    for key in keys:
        if key in ("batch_size", "seed", "rank", "world_size", "shuffle"):
            yield f"{key} was {was.get(key)}, is {now[key]}"
        elif key == "data":
            yield "the shards or the subset changed"
        elif key == "views":
            yield "the views changed"
        elif keys == ["graph"]:  # every other difference changes the graph too
            yield "the graph or DALI changed"


def _data_error(error: RuntimeError, tars: Sequence[Path]) -> Exception:
    """Turn DALI's error for unreadable data into a one-line `ValueError`; return other errors unchanged."""
    text = str(error)
    if is_out_of_memory(error) or ("fn.decoders" not in text and "fn.readers" not in text):
        return error
    sample = re.search(r"Failed to decode sample \S+ ?: ?(\S+?):\d+:(\S+)", text)
    place = (Path(sample[1]), sample[2]) if sample else _find_odd_image(tars)
    image = _describe(*place) if place else f"an image in {tars[0].parent}"
    reason = next((line for line in text.splitlines()[2:] if line and "Error in" not in line), text)
    remedy = f"remove {tars[0].parent} and run again: sharding re-encodes images that DALI does not read"
    return ValueError(f"{image} cannot be read ({excerpt(reason)}): {remedy}")


def _find_odd_image(tars: Sequence[Path]) -> tuple[Path, str] | None:
    """Search for an image that DALI may have failed to read, since its errors often name none: its tar and member."""
    end = time.monotonic() + SEARCH_SECONDS
    for path in tars:
        with open(path, "rb") as tar:
            for fields in read_index(path):
                if not has_plain_structure(read_member(tar, fields, 0)):
                    return path, fields[3]
                if time.monotonic() > end:
                    return None
    return None


def _describe(tar: Path, member: str) -> str:
    """Return an image's name in the source, as far as it is recorded, and its place in the shards."""
    name = source_name(tar, member)
    return f"image {member} in {tar}" if name is None else f"image {excerpt(name)} ({member} in {tar})"
