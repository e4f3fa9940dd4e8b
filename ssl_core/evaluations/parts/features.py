"""Frozen features: the networks that protocols compare, the views of their images, and one pass that extracts them."""

import json
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssl_core.config import Backbone, Dataset, parse
from ssl_core.data.loader import Loader
from ssl_core.data.shards import Manifest
from ssl_core.data.views import View, adjust
from ssl_core.evaluations.base import Precision, Subjects
from ssl_core.files import room_for
from ssl_core.networks.backbones import build_backbone
from ssl_core.progress import progress_bar

PIXEL_SIDE = 32  # raw pixels of larger images are averaged down to this size: at most 3,072 numbers per image
LEAST_PIXEL_SIDE = 8  # of sets whose features exceed the memory at every larger size
MEMORY_LIMIT = 4 * 2**30  # bytes of one network's features; larger sets go into a memory-mapped temporary file
CHUNK = 8192  # rows per operation where all rows may exceed the memory
GROUP = "probe"  # the name of the views, which seeds their augmentations: another name gives other numbers
BATCH_SIZE = 256  # of feature extraction; affects memory, never results


@dataclass(frozen=True)
class Features:
    """Features of the same images by several networks, rows in the order of the shards."""

    by_network: dict[str, Tensor]  # network -> (images, dim) float32 on the CPU
    labels: Tensor  # (images,) int64
    indices: Tensor  # (images,) int64


class Pixels(nn.Module):
    """The raw-pixel baseline: normalised pixels as features, averaged down where a side of the image exceeds `side`."""

    def __init__(self, side: int = PIXEL_SIDE) -> None:
        super().__init__()
        self.side = side

    def forward(self, images: Tensor) -> Tensor:
        """Flatten (batch, 3, h, w) to (batch, 3 * side * side)."""
        if images.shape[-1] > self.side:
            images = F.adaptive_avg_pool2d(images, self.side)
        return images.contiguous().flatten(1)


def pixel_side(images: int) -> int:
    """Return the side of the raw-pixel baseline for a training set: halved until its features fit in memory."""
    side = PIXEL_SIDE
    while side > LEAST_PIXEL_SIDE and not fits_in_memory(images * 3 * side**2):
        side //= 2
    return side


def gather_subjects(
    pretrained: nn.Module,
    header: Mapping[str, str],
    *,
    image_size: int | None,
    threads: int,
    model: Path | None = None,
    num_train: int = 0,
) -> Subjects:
    """Return the pre-trained network of `load_backbone` with its two baselines: the untrained network and raw pixels.

    Images have the pre-training's size unless `image_size` is given, and always the pre-training's normalisation,
    also those of other data sets. `num_train` is the number of training images, of which many make raw pixels smaller.
    """
    pixels = Pixels(pixel_side(num_train))
    networks = {"pretrained": pretrained, "untrained": build_untrained(header), "pixels": pixels}
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for network in networks.values():
        network.requires_grad_(False).to(device=device, memory_format=torch.channels_last)  # pyright: ignore
    size = image_size or int(header["image_size"])
    mean, std = (tuple(read_header(header, key)) for key in ("mean", "std"))
    return Subjects(networks, size, mean, std, device, threads, header, model)


def build_untrained(header: Mapping[str, str]) -> nn.Module:
    """Build the backbone of a safetensors header with the weights that the pre-training started from."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(read_header(header, "seed"))
        return build_backbone(Backbone.model_validate_json(header["backbone"]), int(header["image_size"]))


def count_images(manifest: Manifest, dataset: Dataset) -> int:
    """Count the images of a data set, or of its subset."""
    return dataset.subset.images if dataset.subset else manifest.split(dataset.split).images


def num_classes(manifest: Manifest, split: str) -> int:
    """Count the classes that labels of `split` may have."""
    return len(manifest.classes or manifest.split(split).class_counts or ())


def center_view(size: int, *, resize: float = 1.0, interpolation: Any = "linear") -> View:
    """Describe the test view: shorter side to `resize` times `size`, then a center crop."""
    return View(
        size=size,
        crop="center",
        resize=round(size * resize),
        interpolation=interpolation,
    )


def training_view(
    size: int,
    area: tuple[float, float],
    avoid: Sequence[str],
    *,
    interpolation: str = "linear",
    flip: float | None = None,
) -> View:
    """Describe the augmented view that trains classifiers: random resized crop, and a flip unless it changes labels."""
    section = {"size": size, "area": area, "interpolation": interpolation, "augmentation": "weak"}
    view = parse(View, section, "the training view")
    changes = {} if flip is None else {"view": {"augmentation": {"flip": flip}}}
    return adjust({"view": view}, changes, avoid=avoid)["view"]


def make_loader(
    subjects: Subjects,
    manifest: Manifest,
    dataset: Dataset,
    view: View,
    *,
    shuffle: bool = False,
    batch_size: int = BATCH_SIZE,
    seed: int = 0,
    only: Sequence[int] | None = None,
) -> Loader:
    """Return a loader of `dataset`, or of its images `only`, through one view and the pre-training's normalisation.

    The caller closes it.
    """
    return Loader(
        manifest,
        dataset,
        {GROUP: view},
        batch_size=batch_size,
        seed=seed,
        shuffle=shuffle,
        device=subjects.device,
        threads=1 if subjects.device == "cpu" else subjects.threads,  # the networks need the CPU's cores
        mean=subjects.mean,
        std=subjects.std,
        only=only,
    )


def draw_by_class(
    labels: Sequence[int], candidates: Sequence[int], count: Callable[[int], int], seed: int
) -> list[int]:
    """Draw `count(n)` of the n candidates of each class, or all n where there are fewer; return them sorted.

    `labels` are those of the whole split, `candidates` are indices into it. Only the seed moves the draw.
    """
    generator = np.random.default_rng(seed)
    members, truth = np.sort(np.asarray(candidates)), np.asarray(labels)
    drawn = []
    for label in np.unique(truth[members]):
        of_class = generator.permutation(members[truth[members] == label])
        drawn.append(of_class[: count(len(of_class))])
    return np.sort(np.concatenate(drawn)).tolist()


def hold_out(indices: Tensor, share: float, seed: int) -> Tensor:
    """Draw the images that choose a hyper-parameter, at least one; only their indices and the seed move the draw."""
    order = np.random.default_rng(seed).permutation(np.sort(indices.numpy()))
    return torch.from_numpy(order[: max(1, round(share * len(order)))])


@contextmanager
def frozen(networks: Mapping[str, nn.Module]) -> Iterator[None]:
    """Run networks in eval mode, without gradients and in full float32; restore the mode of each module at the end."""
    modes = [(module, module.training) for network in networks.values() for module in network.modules()]
    for network in networks.values():
        network.eval()
    try:
        with torch.no_grad(), torch.backends.cudnn.flags(benchmark=False, deterministic=True, allow_tf32=False):
            yield
    finally:
        for module, mode in modes:  # per module: parts of a network may be in eval mode on purpose
            module.training = mode


def forward(networks: Mapping[str, nn.Module], images: Tensor, precision: Precision = "fp32") -> dict[str, Tensor]:
    """Return each network's features of (batch, 3, h, w) as float32; with `bf16` matrix products are in bfloat16.

    Raises ValueError for features that are not finite.
    """
    with frozen(networks), torch.autocast(images.device.type, torch.bfloat16, enabled=precision == "bf16"):
        by_network = {name: network(images).float() for name, network in networks.items()}
    for name, features in by_network.items():
        if not features.isfinite().all():
            raise ValueError(
                f"the {name} network gives features that are not finite: it diverged or its numbers overflow; use "
                "weights of another training, a lower learning rate or precision fp32"
            )
    return by_network


def extract(
    networks: Mapping[str, nn.Module], loader: Loader, *, precision: Precision = "fp32", describe: str = "features"
) -> Features:
    """Extract every network's features in one pass over an unshuffled loader of one view; networks stay unchanged.

    The loader of one rank gives that rank's images; the rows of all ranks, concatenated, equal those of one process.
    """
    by_network: dict[str, Tensor] = {}
    # Filled in place: a list of small tensors between the freed features of the batches would fragment the heap.
    labels, indices = torch.empty(2, loader.num_images, dtype=torch.int64)
    start = 0
    with progress_bar(loader.num_images, describe, unit="images", leave=False) as progress:
        for batch in loader.epoch():
            ((images,),) = batch.views.values()
            stop = start + len(images)
            for name, features in forward(networks, images, precision).items():
                if name not in by_network:
                    by_network[name] = allocate(loader.num_images, features.shape[1])
                by_network[name][start:stop] = features
            labels[start:stop], indices[start:stop] = batch.labels, batch.indices
            progress.update(stop - start)
            start = stop
    filled = {name: rows[:start] for name, rows in by_network.items()}
    return Features(filled, labels[:start], indices[:start])


def read_split(
    subjects: Subjects,
    manifest: Manifest,
    split: str | Dataset,
    view: View,
    describe: str,
    *,
    networks: Mapping[str, nn.Module] | None = None,
    precision: Precision = "fp32",
) -> Features:
    """Extract the features of a split, or of its subset, by the networks of `subjects` or by other `networks`."""
    dataset = Dataset(name=manifest.dataset, split=split) if isinstance(split, str) else split
    with make_loader(subjects, manifest, dataset, view) as loader:
        return extract(
            networks or subjects.networks, loader, precision=precision, describe=f"{describe}: {dataset.split}"
        )


def accuracies(logits: Tensor, labels: Tensor) -> dict[str, float]:
    """Return top-1 accuracy in percent, and top-5 from ten classes on."""
    metrics = {"top1": percent(logits.argmax(dim=1) == labels)}
    if logits.shape[1] >= 10:
        metrics["top5"] = percent((logits.topk(5, dim=1).indices == labels[:, None]).any(dim=1))
    return metrics


def mean_per_class(predicted: Tensor, labels: Tensor) -> float:
    """Return the mean of the accuracies per class that occurs in `labels`, 0-100, to four decimals."""
    counts = labels.bincount()
    hits = labels[predicted == labels].bincount(minlength=len(counts))
    return round(100 * (hits[counts > 0] / counts[counts > 0]).double().mean().item(), 4)


def percent(hits: Tensor) -> float:
    """Return the share of true entries, 0-100, to four decimals."""
    return round(100 * hits.sum().item() / len(hits), 4)


def read_header(header: Mapping[str, str], key: str) -> Any:
    """Read a JSON value from the header of a backbone's file."""
    if key not in header:
        raise ValueError(
            f"the header of the backbone's file has no '{key}', expected a file of `ssl-core pretrain` or `adopt`"
        )
    return json.loads(header[key])


def allocate(rows: int, dim: int) -> Tensor:
    """Allocate (rows, dim) float32 in memory, or for large sets in a temporary file, deleted with the tensor."""
    if fits_in_memory(rows * dim):
        return torch.empty(rows, dim)
    with tempfile.NamedTemporaryFile(prefix="ssl-core-features-") as file, room_for(Path(file.name)):
        os.posix_fallocate(file.fileno(), 0, rows * dim * 4)  # else a full disk ends the process when a page is written
        return torch.from_file(file.name, shared=True, size=rows * dim).view(rows, dim)


def apply_in_chunks(function: Callable[[Tensor], Tensor], rows: Tensor, width: int, dtype: torch.dtype) -> Tensor:
    """Apply a function to all rows in chunks; return (rows, width) on the CPU.

    The result is allocated first: a list of small parts between large temporaries would fragment the heap.
    """
    result = torch.empty(len(rows), width, dtype=dtype)
    for part, target in zip(rows.split(CHUNK), result.split(CHUNK)):
        target.copy_(function(part))
    return result


def fits_in_memory(numbers: int) -> bool:
    """Return whether this many float32 numbers may be in memory."""
    return numbers * 4 <= MEMORY_LIMIT
