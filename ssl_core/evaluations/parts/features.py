"""Frozen features: what the protocols compare, where their images come from, and one pass that reads them out."""

import json
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssl_core.config import Backbone, Dataset, parse
from ssl_core.data import multilabels
from ssl_core.data.loader import Loader
from ssl_core.data.shards import Manifest
from ssl_core.data.views import View, adjust
from ssl_core.files import room_for
from ssl_core.networks.backbones import build_backbone
from ssl_core.progress import progress_bar

PIXEL_SIDE = 32  # raw pixels of larger images are averaged down to this: 3,072 numbers an image at most
MEMORY_LIMIT = 4 * 2**30  # bytes of one network's features; more goes into a memory-mapped temporary file
TEST_SPLITS = ("test", "val")
CHUNK = 8192  # rows that are worked on at once where all may be too many for the memory
BATCH_SIZE = 256  # of feature extraction; decides memory, never results

# Of frozen networks' forward passes; bf16 is twice as fast on CPUs that have it. Probes and neighbours stay float32.
Precision = Literal["fp32", "bf16"]
Log = Callable[[dict[str, float], int], None]  # (metrics, epoch), for curves


@dataclass(frozen=True)
class Subjects:
    """The networks under the same probe, how they see images, and what they run on."""

    networks: dict[str, nn.Module]  # "pretrained", "untrained" and "pixels"; each (batch, 3, h, w) -> (batch, dim)
    image_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    device: str = "cpu"
    threads: int = 1
    header: Mapping[str, str] = field(default_factory=dict)  # of the backbone's file
    model: Path | None = None  # the whole pre-trained model, for protocols that ask for it


@dataclass(frozen=True)
class Outcome:
    """What a protocol found out; `metrics` has one entry a network, accuracies in percent."""

    protocol: str
    split: str
    metrics: dict[str, dict[str, Any]]
    hyperparameters: dict[str, Any]
    num_train: int
    num_test: int
    headline: str = "top1"  # the metric, in percent, that stands for the evaluation
    details: dict[str, Any] = field(default_factory=dict)  # what is too long for a table, for example which images
    pictures: dict[str, bytes] = field(default_factory=dict)  # file name -> content, in a folder beside the JSON


@dataclass(frozen=True)
class Features:
    """Features of the same images by several networks, rows in the order of the shards."""

    of: dict[str, Tensor]  # network -> (images, dim) float32 on the CPU
    labels: Tensor  # (images,) int64
    indices: Tensor  # (images,) int64


class Pixels(nn.Module):
    """The network that is none: normalised pixels as features, averaged down where a side exceeds `PIXEL_SIDE`."""

    def forward(self, images: Tensor) -> Tensor:
        """Flatten (batch, 3, h, w) to (batch, 3 * side * side)."""
        if images.shape[-1] > PIXEL_SIDE:
            images = F.adaptive_avg_pool2d(images, PIXEL_SIDE)
        return images.contiguous().flatten(1)


def gather_subjects(
    pretrained: nn.Module,
    header: Mapping[str, str],
    *,
    image_size: int | None,
    threads: int,
    model: Path | None = None,
) -> Subjects:
    """Set the untrained network and the pixels beside the pre-trained one that `load_backbone` gave with its header.

    Images come at the pre-training's size, unless `image_size` says otherwise, and in its normalisation, those of
    other data sets included.
    """
    networks = {"pretrained": pretrained, "untrained": build_untrained(header), "pixels": Pixels()}
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for network in networks.values():
        network.requires_grad_(False).to(device=device, memory_format=torch.channels_last)  # pyright: ignore
    size = image_size or int(header["image_size"])
    mean, std = (tuple(_said(header, key)) for key in ("mean", "std"))
    return Subjects(networks, size, mean, std, device, threads, header, model)


def build_untrained(header: Mapping[str, str]) -> nn.Module:
    """Build the backbone of a safetensors header as the pre-training did, first thing after its seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_said(header, "seed"))
        return build_backbone(Backbone.model_validate_json(header["backbone"]), int(header["image_size"]))


def labelled_split(manifest: Manifest, split: str) -> str:
    """Return `split` if its images have labels; else a `ValueError` says which split of which data set lacks them."""
    if not manifest.split(split).labelled:
        known = [name for name, other in manifest.splits.items() if other.labelled]
        if multilabels.has_labels(manifest, split):
            raise ValueError(f"data set '{manifest.dataset}': images have several labels each: evaluate by `low_shot`")
        advice = f"evaluate on one that has: {', '.join(known)}" if known else "no split of it has; evaluate elsewhere"
        raise ValueError(f"data set '{manifest.dataset}': split '{split}' has no labels; {advice}")
    return split


def find_test_split(manifest: Manifest, split: str | None, *, training: str | None, several: bool = False) -> str:
    """Return the labelled split to test on: `split` where it is said, else `test`, else `val`.

    With `several` its images may have several labels each (`multilabels`). Raises ValueError if it is `training`.
    """
    if split is None:
        split = next((name for name in TEST_SPLITS if name in manifest.splits), None)
    if split is None:
        have = ", ".join(manifest.splits)
        raise ValueError(f"data set '{manifest.dataset}' has no test or val split (it has {have}): say `test_split`")
    if split == training:
        advice = "say another `test_split`, or divide it (`logistic` with `train_per_class`)"
        raise ValueError(f"data set '{manifest.dataset}': the split '{split}' would train and test: {advice}")
    return split if several and multilabels.has_labels(manifest, split) else labelled_split(manifest, split)


def count_images(manifest: Manifest, dataset: Dataset) -> int:
    """Count the images of a data set, or of the drawn part of it."""
    return dataset.subset.images if dataset.subset else manifest.split(dataset.split).images


def overridden(config: Any) -> list[str]:
    """List the settings that differ from those of the protocol's variant, `config.variant`."""
    own = type(config)(dataset=config.dataset, variant=config.variant)
    chosen = type(config).model_fields.keys() - {"protocol", "dataset", "test_split", "variant", "seed", "image_size"}
    return sorted(key for key in chosen if getattr(config, key) != getattr(own, key))


def num_classes(manifest: Manifest, split: str) -> int:
    """Count the classes that labels of `split` may name."""
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
    """Describe the augmented view of probes: random resized crop and flip, unless flipping changes the label."""
    said = {"size": size, "area": area, "interpolation": interpolation, "augmentation": "weak"}
    view = parse(View, said, "the training view")
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
    """Read `dataset`, or `only` these of its images, through one view, normalised as the pre-training normalised.

    Close it after use.
    """
    return Loader(
        manifest,
        dataset,
        {"probe": view},
        batch_size=batch_size,
        seed=seed,
        shuffle=shuffle,
        device=subjects.device,
        threads=1 if subjects.device == "cpu" else subjects.threads,  # networks need the CPU's cores more
        mean=subjects.mean,
        std=subjects.std,
        only=only,
    )


def draw_by_class(
    labels: Sequence[int], candidates: Sequence[int], count: Callable[[int], int], seed: int
) -> list[int]:
    """Draw `count(n)` of the n candidates of each class, by their order and the seed alone; return them sorted.

    `labels` are those of the whole split, `candidates` indices into it; no class gives more than it has.
    """
    generator = np.random.default_rng(seed)
    members, truth = np.sort(np.asarray(candidates)), np.asarray(labels)
    drawn = []
    for label in np.unique(truth[members]):
        own = generator.permutation(members[truth[members] == label])
        drawn.append(own[: count(len(own))])
    return np.sort(np.concatenate(drawn)).tolist()


def hold_out(indices: Tensor, share: float, seed: int) -> Tensor:
    """Draw the images that choose a hyper-parameter, by their indices and the seed alone; at least one."""
    order = np.random.default_rng(seed).permutation(np.sort(indices.numpy()))
    return torch.from_numpy(order[: max(1, round(share * len(order)))])


@contextmanager
def frozen(networks: Mapping[str, nn.Module]) -> Iterator[None]:
    """Run networks as they will be used: eval mode (no statistics move), no gradient, full fp32; restore each mode."""
    modes = [(module, module.training) for network in networks.values() for module in network.modules()]
    for network in networks.values():
        network.eval()
    try:
        with torch.no_grad(), torch.backends.cudnn.flags(benchmark=False, deterministic=True, allow_tf32=False):
            yield
    finally:
        for module, mode in modes:  # one by one: a network may hold some parts in eval mode on purpose
            module.training = mode


def forward(networks: Mapping[str, nn.Module], images: Tensor, precision: Precision = "fp32") -> dict[str, Tensor]:
    """Return each network's features of (batch, 3, h, w) as float32; `bf16` has matrix products in bfloat16."""
    with frozen(networks), torch.autocast(images.device.type, torch.bfloat16, enabled=precision == "bf16"):
        return {name: network(images).float() for name, network in networks.items()}


def extract(
    networks: Mapping[str, nn.Module], loader: Loader, *, precision: Precision = "fp32", describe: str = "features"
) -> Features:
    """Read out every network's features in one pass over an unshuffled loader of one view; networks stay untouched.

    A loader that is one rank's of several gives that rank's images; the ranks' rows, in their order, are those of one.
    """
    of: dict[str, Tensor] = {}
    # Filled in place: what is kept of each batch would lie between the batches' freed features and keep that memory.
    labels, indices = torch.empty(2, loader.num_images, dtype=torch.int64)
    start = 0
    with progress_bar(loader.num_images, describe, unit="images", leave=False) as progress:
        for batch in loader.epoch():
            ((images,),) = batch.views.values()
            stop = start + len(images)
            for name, features in forward(networks, images, precision).items():
                if name not in of:
                    of[name] = allocate(loader.num_images, features.shape[1])
                of[name][start:stop] = features
            labels[start:stop], indices[start:stop] = batch.labels, batch.indices
            progress.update(stop - start)
            start = stop
    return Features({name: rows[:start] for name, rows in of.items()}, labels[:start], indices[:start])


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
    """Read out a split, or the drawn part of one, by the subjects' own networks or by others."""
    dataset = Dataset(name=manifest.dataset, split=split) if isinstance(split, str) else split
    with make_loader(subjects, manifest, dataset, view) as loader:
        own = networks or subjects.networks
        return extract(own, loader, precision=precision, describe=f"{describe}: {dataset.split}")


def correct(logits: Tensor, labels: Tensor) -> dict[str, float]:
    """Return top-1 accuracy in percent, and top-5 from ten classes on (below that it says nothing)."""
    metrics = {"top1": percent(logits.argmax(dim=1) == labels)}
    if logits.shape[1] >= 10:
        metrics["top5"] = percent((logits.topk(5, dim=1).indices == labels[:, None]).any(dim=1))
    return metrics


def mean_per_class(predicted: Tensor, labels: Tensor) -> float:
    """Return the mean over the classes that occur in `labels` of the accuracy on each, 0-100, to four decimals."""
    counts = labels.bincount()
    hits = labels[predicted == labels].bincount(minlength=len(counts))
    return round(100 * (hits[counts > 0] / counts[counts > 0]).double().mean().item(), 4)


def percent(hits: Tensor) -> float:
    """Return the share of true entries, 0-100, to four decimals."""
    return round(100 * hits.sum().item() / len(hits), 4)


def _said(header: Mapping[str, str], key: str) -> Any:
    """Read a JSON value that the pre-training stage writes into a backbone's header."""
    if key not in header:
        raise ValueError(f"the backbone's header does not say its '{key}': it was not written by `ssl-core pretrain`")
    return json.loads(header[key])


def allocate(rows: int, dim: int) -> Tensor:
    """Make room for (rows, dim) float32, in memory or, for large sets, in a file that vanishes with the tensor."""
    if fits(rows * dim):
        return torch.empty(rows, dim)
    with tempfile.NamedTemporaryFile(prefix="ssl-core-features-") as file, room_for(Path(file.name)):
        os.posix_fallocate(file.fileno(), 0, rows * dim * 4)  # a full disk would end the process when it is written
        return torch.from_file(file.name, shared=True, size=rows * dim).view(rows, dim)


def in_parts(function: Callable[[Tensor], Tensor], rows: Tensor, width: int, dtype: torch.dtype) -> Tensor:
    """Apply a function of some rows to all of them, chunk by chunk; return (rows, width) on the CPU.

    The result is made first: a list of small parts, each made between large temporaries, would break up the heap, and
    memory would grow with the number of rows.
    """
    result = torch.empty(len(rows), width, dtype=dtype)
    for part, target in zip(rows.split(CHUNK), result.split(CHUNK)):
        target.copy_(function(part))
    return result


def fits(numbers: int) -> bool:
    """Tell whether so many float32 may be in memory."""
    return numbers * 4 <= MEMORY_LIMIT
