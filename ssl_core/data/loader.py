"""Batches of views from shards: exact epochs, ranks that share the data, a state from which a run continues exactly."""

import functools
import hashlib
import json
import math
import re
import shutil
import tempfile
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
from ssl_core.data.pipeline import Plan
from ssl_core.data.shards import Manifest, verify
from ssl_core.data.views import Views
from ssl_core.mistakes import is_out_of_memory

HASHED_BYTES = 2**29  # shards up to here (half a second) are hashed before they are read
SHUFFLE_BUFFER = 300_000  # images: up to here an epoch is a uniform permutation (about 0.9 KB of memory an image)


class Loader:
    """Endless batches of a data set's views.

    With `shuffle` every epoch is a new permutation and ends with its last full batch, and each rank sees its own part.
    Without, each image comes exactly once, in the shards' order, and the last batch may be smaller.
    Raises `ValueError` for missing or cut shards, a subset or a batch larger than the data, and unreadable images.
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
        """Plan the reading; `batch_size` is per rank, `mean` and `std` (of pixels in 0..1) replace the manifest's.

        `only` names images of the split by their index, in the place of the dataset's subset.
        """
        split = manifest.split(dataset.split)
        # DALI's decoder may crash on a damaged image instead of failing, so damage is looked for where that is quick.
        verify(manifest, dataset.split, deep=split.bytes <= HASHED_BYTES)
        tars, indices = manifest.tars(dataset.split), manifest.indices(dataset.split)
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
            tars, indices = _filter_indices(tars, indices, set(chosen.tolist()), Path(folder))
        start, end = (self.num_images * part // world_size for part in (rank, rank + 1))  # as DALI cuts the data
        most = math.ceil(self.num_images / world_size)  # ranks trade their parts from epoch to epoch when shuffling
        images = self.num_images // world_size if shuffle else end - start
        if shuffle and batch_size > images:
            raise ValueError(
                f"a batch of {batch_size} images (a process) is larger than {dataset.name}/{dataset.split} with "
                f"{images} images (a process): give a batch_size of {images * world_size} or less"
            )
        self.batch_size, self.shuffle, self.views = batch_size, shuffle, views
        self.steps_per_epoch = images // batch_size if shuffle else math.ceil(images / batch_size)
        self.step = 0
        self._last_batch = images - (self.steps_per_epoch - 1) * batch_size  # only without shuffling can it be small
        self._runs_per_epoch = math.ceil(most / batch_size)  # of the pipeline, which pads all ranks to the largest part
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
        self._checkpoint: bytes | None = None  # where the pipeline starts once it is built

    @property
    def normalisation(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and standard deviation by channel, of pixels in 0..1, that make up a view's numbers."""
        return self._plan.mean, self._plan.std

    def next(self) -> Batch:
        """Return the next batch; epochs follow each other without end."""
        position = self.step % self.steps_per_epoch
        if position == 0 and self.step > 0:
            self._skip(self._runs_per_epoch - self.steps_per_epoch)  # the incomplete batch at the end of an epoch
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
        """Iterate over exactly one whole epoch; one that was begun and left is ended first, unseen."""
        while self.step % self.steps_per_epoch:
            self.next()
        for _ in range(self.steps_per_epoch):
            yield self.next()

    def state(self) -> dict[str, Any]:
        """Return where the loader stands, in types that `torch.load(weights_only=True)` accepts."""
        pipe = self._pipeline
        checkpoint = self._checkpoint if pipe is None else pipe.checkpoint()
        return {**self._identity, "step": self.step, "pipeline": checkpoint or b""}

    def restore(self, state: dict[str, Any]) -> None:
        """Continue exactly from `state()`; raise a `ValueError` that says what differs if this loader is another."""
        own = self._identity
        different = [key for key in own if state.get(key) != own[key]]
        if different:
            raise ValueError(f"the loader's saved state does not fit: {'; '.join(_differences(different, state, own))}")
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
        """Return what must agree for a state to fit; DALI would take another seed or batch size without a word."""
        plan = self._plan
        names = {"tars": _names(plan.tars), "indices": _names(plan.indices)}  # wherever the folder lies
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
            raise _data_error(error, Path(self._plan.tars[0]).parent) from error

    def _skip(self, runs: int) -> None:
        for _ in range(runs):
            self._run()

    def _stop(self) -> None:
        self._pipeline = self._checkpoint = None


def draw_subset(num_images: int, subset: Subset, name: str) -> np.ndarray:
    """Draw dataset indices without looking at labels, sorted; a `ValueError` if there are not so many."""
    if subset.images > num_images:
        raise ValueError(f"subset.images {subset.images} is more than {name} has ({num_images})")
    return np.sort(np.random.default_rng(subset.seed).permutation(num_images)[: subset.images])


def _filter_indices(
    tars: list[Path], indices: list[Path], chosen: set[int], folder: Path
) -> tuple[list[Path], list[Path]]:
    """Write indices that only name the chosen samples; tars without any are left out."""
    kept_tars, kept_indices = [], []
    for tar, index in zip(tars, indices, strict=True):
        header, *samples = index.read_text(encoding="ascii").splitlines()
        # A line reads `jpg <offset> <size> 00000042.jpg meta.i64 ...`.
        kept = [sample for sample in samples if int(sample.split(" ", 4)[3][:8]) in chosen]
        if kept:
            version = header.split()[0]
            filtered = folder / index.name
            filtered.write_text("\n".join([f"{version} {len(kept)}", *kept, ""]), encoding="ascii")
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
        elif key != "graph" or keys == ["graph"]:  # every difference above makes another graph
            yield {"data": "the shards or the subset", "views": "the views", "graph": "the graph or DALI"}[
                key
            ] + " changed"


def _data_error(error: RuntimeError, folder: Path) -> Exception:
    """Turn what DALI says of unreadable data into a `ValueError`; anything else stays what it is."""
    text = str(error)
    if is_out_of_memory(error) or ("fn.decoders" not in text and "fn.readers" not in text):
        return error
    sample = re.search(r"Failed to decode sample \S+ ?: ?(\S+?):\d+:(\S+)", text)
    what = f"image {sample[2]} in {sample[1]}" if sample else f"an image in {folder}"
    reason = next((line for line in text.splitlines()[2:] if line and "Error in" not in line), text)
    return ValueError(f"{what} cannot be read ({reason}): remove {folder} and shard the data set again")
