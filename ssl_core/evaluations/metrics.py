"""Measures of a representation without a classifier (Shi et al., 2022): distances between views of one image, between
images of one class and between all images, and the number of dimensions in use.

They are measured on a fixed set: some images per class as center crops, and two augmented copies of each. The shards,
the seed and the views determine the set, which is made on the CPU and in batches of one size on every device. The
results contain a digest of its pixels: numbers are comparable where it is equal.
Source: docs/sources.md#representation-metrics.
"""

import hashlib
import math
from collections.abc import Sequence
from typing import Any, ClassVar, Literal, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import PositiveFloat, PositiveInt
from torch import Tensor

from ssl_core.config import Dataset, Subset, parse
from ssl_core.data.loader import Loader, draw_subset
from ssl_core.data.shards import Manifest, read_labels
from ssl_core.data.views import View, Views, adjust
from ssl_core.evaluations.base import ImageConfig, Log, Outcome, Subjects, find_test_split
from ssl_core.evaluations.parts.features import BATCH_SIZE, allocate, center_view, draw_by_class, forward
from ssl_core.experiments.needs import Contract, Needs
from ssl_core.progress import progress_bar

CHUNK = 1024  # queries per comparison with all images


class Config(ImageConfig):
    """The images, their augmentation and the constants of the measures (Shi et al.'s code).

    The test split is measured, and may be the training split. The seed draws the images, their copies and the draws of
    uniformity.
    """

    contract: ClassVar = Contract(needs=Needs(labels="none", test_split="any"))

    protocol: Literal["metrics"] = "metrics"
    images_per_class: PositiveInt = 50  # or all images of a smaller class; accuracies are comparable at one number
    images: PositiveInt = 5000  # of a data set without labels
    area: tuple[PositiveFloat, PositiveFloat] = (0.2, 1.0)
    augmentation: str = "contrastive"  # a policy of ssl_core/data/views.py: MoCo v2's
    uniformity_t: PositiveFloat = 2.0  # from the code; not given in the paper
    uniformity_images: PositiveInt = 128
    uniformity_draws: PositiveInt = 50  # the code has 3, with a standard deviation of .02


class Set(NamedTuple):
    """One network's features (images, dim) of the originals and of their two copies."""

    original: Tensor
    first: Tensor
    second: Tensor


def run(config: Config, subjects: Subjects, manifest: Manifest, log: Log) -> Outcome:
    """Measure each network's features of the same images and copies."""
    split = find_test_split(config, manifest)
    images = choose(manifest, split, config)
    views = make_views(config, subjects.image_size, manifest.avoid)
    features, labels, digest = read_set(config, subjects, manifest, split, images, views)
    metrics = {name: measure(set_, labels, config) for name, set_ in features.items()}
    hyperparameters = config.settings(
        how="fixed by the configuration",
        images=len(images),  # an instance is compared with this many, minus one
        images_per_class=config.images_per_class if manifest.split(split).labelled else None,
        set=digest,
        views={name: view.model_dump(mode="json", exclude={"seen_by"}) for name, view in views.items()},
        image_size=subjects.image_size,
    )
    details = {"images": " ".join(map(str, images))}
    return Outcome("metrics/v1", split, metrics, hyperparameters, 0, len(images), "instance_top1", details)


def choose(manifest: Manifest, split: str, config: Config) -> list[int]:
    """Draw `images_per_class` of each class, or `images` of a split without labels; sorted indices."""
    count = manifest.split(split).images
    if not manifest.split(split).labelled:
        subset = Subset(images=min(config.images, count), seed=config.seed)
        return draw_subset(count, subset, manifest.dataset).tolist()
    return draw_by_class(read_labels(manifest, split), range(count), lambda _: config.images_per_class, config.seed)


def make_views(config: Config, image_size: int, avoid: tuple[str, ...]) -> Views:
    """Describe the originals and their two copies, without the augmentations that the card avoids."""
    section = {"size": image_size, "count": 2, "area": config.area, "augmentation": config.augmentation}
    copies = parse(View, section, "the augmented copies")
    return {
        "original": center_view(image_size, resize=config.resize),
        **adjust({"copies": copies}, {}, avoid=avoid),
    }


def read_set(
    config: Config, subjects: Subjects, manifest: Manifest, split: str, images: Sequence[int], views: Views
) -> tuple[dict[str, Set], Tensor, str]:
    """Extract every network's features of originals and copies, in the shards' order.

    Also returns the labels and the digest of the pixels.
    """
    loader = Loader(
        manifest,
        Dataset(name=config.dataset.name, split=split),
        views,
        batch_size=min(BATCH_SIZE, len(images)),
        seed=config.seed,
        shuffle=False,
        threads=subjects.threads if subjects.device != "cpu" else 1,
        mean=subjects.mean,
        std=subjects.std,
        only=images,
    )
    with loader:
        return _extract(subjects, loader)


def measure(features: Set, labels: Tensor, config: Config) -> dict[str, float]:
    """Return all measures of one network: accuracies in percent, the others as defined in the papers."""
    original, first, second = (F.normalize(rows, dim=1) for rows in features)
    metrics = {
        # "d-sd": an original among all originals; the average over its two copies
        "instance_top1": (instance_top1(original, first, original) + instance_top1(original, second, original)) / 2,
        # "sd-sd": a copy among all first copies
        "instance_copies_top1": instance_top1(first, second, first),
        "alignment": (alignment(original, first) + alignment(original, second)) / 2,
        "alignment_copies": alignment(first, second),
        "uniformity": uniformity(
            original, config.uniformity_t, config.uniformity_images, config.uniformity_draws, config.seed
        ),
        "rankme": rankme(features.original),
        "effective_rank": effective_rank(features.original),
    }
    within = intra_class_alignment(original, labels)
    if within is not None:
        metrics |= {"intra_class_alignment": within, "tolerance": 1 - within / 2}
    return {name: round(value, 6) for name, value in metrics.items()}


def alignment(first: Tensor, second: Tensor) -> float:
    """Return the mean squared distance of paired unit rows (images, dim): 0 is best, 2 is chance."""
    return (first - second).square().sum(dim=1).mean(dtype=torch.float64).item()


def uniformity(rows: Tensor, t: float = 2.0, images: int = 128, draws: int = 50, seed: int = 0) -> float:
    """Return log E exp(-t ||x - y||^2) over pairs of unit rows: 0 for a collapsed set, about -4 for a uniform one.

    The logarithm of the mean over all pairs of a random subset, averaged over `draws` subsets.
    """
    generator = torch.Generator().manual_seed(seed)
    values = []
    for _ in range(draws):
        part = rows[torch.randperm(len(rows), generator=generator)[:images]].double()
        values.append(F.pdist(part).square().mul(-t).exp().mean().log())
    return torch.stack(values).mean().item()


def intra_class_alignment(rows: Tensor, labels: Tensor) -> float | None:
    """Return the mean over classes of the mean squared distance of two unit rows of a class; None without labels.

    For n rows with sum s it is 2 - 2 (||s||^2 - n) / (n (n - 1)).
    """
    values = []
    for label in labels[labels >= 0].unique():
        part = rows[labels == label].double()
        if len(part) > 1:
            cosines = part.sum(dim=0).square().sum() - part.square().sum()
            values.append(2 - 2 * cosines / (len(part) * (len(part) - 1)))
    return torch.stack(values).mean().item() if values else None


def instance_top1(queries: Tensor, positives: Tensor, others: Tensor) -> float:
    """Return the share of queries, in percent, that are nearer to their positive than to all `others` but their own.

    All are unit rows (images, dim), row i of each from image i. A tie is no hit, so a collapsed encoder scores 0.
    """
    hits = 0
    for start in range(0, len(queries), CHUNK):
        part = queries[start : start + CHUNK]
        rows = torch.arange(len(part))
        cosines = part @ others.T
        cosines[rows, rows + start] = -math.inf
        to_positive = (part * positives[start : start + CHUNK]).sum(dim=1)
        # The sum of products and the matrix product round differently; with the margin equal vectors tie.
        hits += int((to_positive > cosines.max(dim=1).values + 1e-6).sum())
    return 100 * hits / len(queries)


def rankme(features: Tensor) -> float:
    """Return RankMe (Garrido et al., 2023): exp of the entropy of the singular values, not centered."""
    return _rank(features, epsilon=1e-7)


def effective_rank(features: Tensor) -> float:
    """Return the effective rank (Roy & Vetterli, 2007) of the centered features, which ignores their mean."""
    return _rank(features - features.mean(dim=0), epsilon=0.0)


def _rank(features: Tensor, *, epsilon: float) -> float:
    """Return exp of the entropy of the singular values' shares, from the Gram matrix of the smaller side."""
    smaller = features if features.shape[1] <= len(features) else features.T
    gram = torch.zeros(smaller.shape[1], smaller.shape[1], dtype=torch.float64)
    for part in smaller.split(8192):
        gram += part.double().T @ part.double()
    values = torch.linalg.eigvalsh(gram).clamp_min(0).sqrt()
    if values.sum() == 0:
        return 1.0
    shares = values / values.sum() + epsilon
    return torch.special.entr(shares).sum().exp().item()


def _extract(subjects: Subjects, loader: Loader) -> tuple[dict[str, Set], Tensor, str]:
    """Return every network's features of originals and copies, the labels, and the digest of the pixels."""
    tables: dict[str, list[Tensor]] = {}
    labels, digest, start = [], hashlib.sha256(), 0
    with progress_bar(loader.num_images, "metrics", unit="images", leave=False) as bar:
        for batch in loader.epoch():
            stop = start + len(batch.labels)
            for number, images in enumerate([*batch.views["original"], *batch.views["copies"]]):
                digest.update(_pixels(images, subjects))
                for name, features in forward(subjects.networks, images.to(subjects.device)).items():
                    if name not in tables:
                        tables[name] = [allocate(loader.num_images, features.shape[1]) for _ in Set._fields]
                    tables[name][number][start:stop] = features
            labels.append(batch.labels.clone())
            bar.update(stop - start)
            start = stop
    return {name: Set(*parts) for name, parts in tables.items()}, torch.cat(labels), digest.hexdigest()


def _pixels(images: Tensor, subjects: Subjects) -> Any:
    """Return the bytes of (batch, height, width, 3) without normalisation, so that the digest does not depend on it."""
    mean, std = torch.tensor(subjects.mean), torch.tensor(subjects.std)
    pixels = (images.permute(0, 2, 3, 1) * std + mean) * 255
    return pixels.round().clamp(0, 255).to(torch.uint8).contiguous().numpy().data
