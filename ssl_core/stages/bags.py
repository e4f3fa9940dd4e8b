"""The stage `bags`: the nearest images of each training image by the features of a frozen teacher."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ssl_core.blocks.frozen_teacher import FrozenTeacher
from ssl_core.config import Dataset, parse
from ssl_core.data.loader import Loader
from ssl_core.data.shards import Manifest, verify
from ssl_core.evaluations.knn import neighbours, unit
from ssl_core.evaluations.parts.features import BATCH_SIZE, Features, center_view, extract
from ssl_core.experiments import needs
from ssl_core.experiments.processes import report_bus_error
from ssl_core.files import atomic
from ssl_core.methods.bingo import Config
from ssl_core.training.memory import device

RESIZE = 256 / 224  # of the shorter side before the center crop (docs/sources.md#bingo)


def splits(arguments: Mapping[str, Any]) -> list[str]:
    """Return the splits that the stage reads."""
    return [needs.training_split(arguments["spec"])]


def run(experiment: str, *, spec: dict[str, Any], manifest: Path, output: Path, threads: int) -> None:
    """Write the rows of each image's neighbours, int32 (images, bag_size), nearest first, as the NumPy file `output`.

    `spec` has the experiment's data set and the method's teacher and bag size. Rows are the indices of batches:
    positions in the sorted subset or in the split. Raises `ValueError` for fewer images than a bag needs.
    """
    torch.set_num_threads(threads)
    dataset, config = parse(Dataset, spec["dataset"], "dataset"), parse(Config, spec["method"], "method")
    data = Manifest.load(manifest)
    report_bus_error(lambda: verify(data, dataset.split))
    where = device()
    features = _features(config, data, dataset, where, threads)
    images, size = len(features.indices), config.bag_size
    if images <= size:
        raise ValueError(f"method.bag_size {size} needs more than {size} images, {dataset.name} has {images}")
    table = np.empty((images, size), dtype=np.int32)
    rows = nearest(features.by_network["teacher"], size, device=where.type)
    table[features.indices.numpy()] = features.indices[rows].numpy()
    with atomic(output) as temporary, open(temporary, "wb") as file:
        np.save(file, table)
    print(f"{experiment}: the {size} nearest of {images} images -> {output}")


def _features(config: Config, manifest: Manifest, dataset: Dataset, where: torch.device, threads: int) -> Features:
    """Return the teacher's pooled features of center crops, in the order of the shards."""
    teacher = FrozenTeacher(config.teacher.model_copy(update={"projector": None}))  # pooled features
    teacher.to(device=where, memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    view = center_view(config.teacher.size or manifest.image_size, resize=RESIZE)
    options: dict[str, Any] = {"shuffle": False, "device": where.type, "threads": 1 if where.type == "cpu" else threads}
    with Loader(manifest, dataset, {"center": view}, batch_size=BATCH_SIZE, seed=0, **options) as loader:
        teacher.prepare(loader, where)
        return extract({"teacher": teacher}, loader, describe="bags")


def nearest(features: Tensor, count: int, *, device: str = "cpu") -> Tensor:
    """Return the `count` other rows with the largest cosine to each row of (rows, dim), nearest first."""
    _, found = neighbours(features, features, count + 1, prepare=unit, euclidean=False, device=device)
    is_self = found == torch.arange(len(found))[:, None]  # first, except where images are equal
    return found.gather(1, is_self.int().argsort(dim=1, stable=True))[:, :count]
