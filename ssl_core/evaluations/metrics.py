"""What a representation looks like without any classifier (recipes E3; Shi et al., 2022): where the views of an image,
of a class and of everything lie on the sphere, and how many dimensions are used.

All is measured on a fixed set: some images a class as center crops and two augmented copies of each. The set follows
from the shards, the seed and the views, is made on the CPU in batches of one size whatever the networks run on, and a
digest of its pixels stands in the results, so that numbers of the same set can be told from others.
"""

import hashlib
import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field, PositiveFloat, PositiveInt
from torch import Tensor

from ssl_core.config import Dataset, Strict, parse
from ssl_core.data.loader import Batch, Loader, draw_subset
from ssl_core.data.shards import Manifest, read_labels
from ssl_core.data.views import View, Views, adjust
from ssl_core.evaluations.parts.features import (
    BATCH_SIZE,
    TEST_SPLITS,
    Log,
    Outcome,
    Subjects,
    allocate,
    center_view,
    draw_by_class,
    forward,
)
from ssl_core.progress import progress_bar

CHUNK = 1024  # queries compared with all images at once


class Config(Strict):
    """Which images, how they are augmented, and the constants of the measures (Shi et al.'s code)."""

    protocol: Literal["metrics"] = "metrics"
    dataset: Dataset
    test_split: str | None = None  # the split that is measured; nothing said: test, else val
    images_per_class: PositiveInt = 50  # fewer where a class has fewer; accuracies compare only at one number
    images: PositiveInt = 5000  # instead, where there are no labels
    area: tuple[PositiveFloat, PositiveFloat] = (0.2, 1.0)
    augmentation: str = "contrastive"  # a policy of ssl_core/data/views.py: MoCo v2's
    resize: float = Field(
        default=1.0, ge=1
    )  # originals: shorter side before the center crop, times the size; 224: 1.143
    uniformity_t: PositiveFloat = 2.0  # from the code; the paper leaves it open
    uniformity_images: PositiveInt = 128
    uniformity_draws: PositiveInt = 50  # the code has 3, whose standard deviation is .02
    image_size: PositiveInt | None = None  # nothing said: the pre-training's
    seed: int = 0  # of the images, their copies and uniformity's draws


class Set(NamedTuple):
    """One network's features (images, dim) of the originals and of their two copies."""

    original: Tensor
    first: Tensor
    second: Tensor


def run(config: Config, subjects: Subjects, manifest: Manifest, log: Log) -> Outcome:
    """Measure each network's features of the same images and copies."""
    split = _find_split(manifest, config.test_split)
    images = choose(manifest, split, config)
    views = make_views(config, subjects.image_size, manifest.avoid)
    features, labels, digest = read_set(config, subjects, manifest, split, images, views)
    metrics = {name: measure(set_, labels, config) for name, set_ in features.items()}
    hyperparameters = {
        "how": "fixed by the configuration",
        "images": len(images),  # an instance is told from so many others, less one
        "images_per_class": config.images_per_class if manifest.split(split).labelled else None,
        "set": digest,
        "views": {name: view.model_dump(mode="json", exclude={"seen_by"}) for name, view in views.items()},
        "uniformity": {"t": config.uniformity_t, "images": config.uniformity_images, "draws": config.uniformity_draws},
        "image_size": subjects.image_size,
    }
    details = {"images": " ".join(map(str, images))}
    return Outcome("metrics/v1", split, metrics, hyperparameters, 0, len(images), "instance_top1", details)


def choose(manifest: Manifest, split: str, config: Config) -> list[int]:
    """Draw as many images of each class, or images regardless of labels where there are none; sorted indices."""
    count = manifest.split(split).images
    if not manifest.split(split).labelled:
        subset = {"images": min(config.images, count), "seed": config.seed}
        chosen = Dataset.model_validate({"name": manifest.dataset, "subset": subset}).subset
        assert chosen is not None
        return draw_subset(count, chosen, manifest.dataset).tolist()
    return draw_by_class(read_labels(manifest, split), range(count), lambda _: config.images_per_class, config.seed)


def make_views(config: Config, image_size: int, avoid: tuple[str, ...]) -> Views:
    """Describe the originals and their two copies, without what the card says changes the label."""
    said = {"size": image_size, "count": 2, "area": config.area, "augmentation": config.augmentation}
    copies = parse(View, said, "the augmented copies")
    return {
        "original": center_view(image_size, resize=config.resize),
        **adjust({"copies": copies}, {}, avoid=avoid),
    }


def read_set(
    config: Config, subjects: Subjects, manifest: Manifest, split: str, images: Sequence[int], views: Views
) -> tuple[dict[str, Set], Tensor, str]:
    """Read out every network's features of originals and copies, in the shards' order.

    Returns with them the labels and the digest of the pixels.
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
    """Compute all measures of one network; accuracies in percent, the others as the papers define them."""
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
    """Return the mean squared distance of unit rows (images, dim) that belong together: 0 is best, 2 is chance."""
    return (first - second).square().sum(dim=1).mean(dtype=torch.float64).item()


def uniformity(rows: Tensor, t: float = 2.0, images: int = 128, draws: int = 50, seed: int = 0) -> float:
    """Return log E exp(-t ||x - y||^2) over pairs of unit rows: 0 for a collapsed set, about -4 for a uniform one.

    The mean over `draws` random subsets of the logarithm of the mean over the pairs of each.
    """
    generator = torch.Generator().manual_seed(seed)
    values = []
    for _ in range(draws):
        part = rows[torch.randperm(len(rows), generator=generator)[:images]].double()
        values.append(F.pdist(part).square().mul(-t).exp().mean().log())
    return torch.stack(values).mean().item()


def intra_class_alignment(rows: Tensor, labels: Tensor) -> float | None:
    """Return the mean over classes of the mean squared distance between two unit rows of a class; None without any.

    Of n rows with sum s: 2 - 2 (||s||^2 - n) / (n (n - 1)).
    """
    values = []
    for label in labels[labels >= 0].unique():
        part = rows[labels == label].double()
        if len(part) > 1:
            cosines = part.sum(dim=0).square().sum() - part.square().sum()
            values.append(2 - 2 * cosines / (len(part) * (len(part) - 1)))
    return torch.stack(values).mean().item() if values else None


def instance_top1(queries: Tensor, positives: Tensor, others: Tensor) -> float:
    """Return how often a query is nearer to its own positive than to all `others` but its own, in percent.

    All are unit rows (images, dim), row i of each from image i. A tie is no hit, so a collapsed encoder scores 0.
    """
    hits = 0
    for start in range(0, len(queries), CHUNK):
        part = queries[start : start + CHUNK]
        rows = torch.arange(len(part))
        cosines = part @ others.T
        cosines[rows, rows + start] = -math.inf
        own = (part * positives[start : start + CHUNK]).sum(dim=1)
        # The sum of products above and the matrix product round differently; equal vectors must tie.
        hits += int((own > cosines.max(dim=1).values + 1e-6).sum())
    return 100 * hits / len(queries)


def rankme(features: Tensor) -> float:
    """Return RankMe (Garrido et al., 2023): exp of the entropy of the singular values of (images, dim), as they are."""
    return _rank(features, epsilon=1e-7)


def effective_rank(features: Tensor) -> float:
    """Return the effective rank (Roy & Vetterli, 2007) of the centered features: their mean is no direction of use."""
    return _rank(features - features.mean(dim=0), epsilon=0.0)


def _rank(features: Tensor, *, epsilon: float) -> float:
    """Exponentiate the entropy of the shares of the singular values, found from the Gram matrix of the smaller side."""
    smaller = features if features.shape[1] <= len(features) else features.T
    gram = torch.zeros(smaller.shape[1], smaller.shape[1], dtype=torch.float64)
    for part in smaller.split(8192):
        gram += part.double().T @ part.double()
    values = torch.linalg.eigvalsh(gram).clamp_min(0).sqrt()
    if values.sum() == 0:
        return 1.0
    shares = values / values.sum() + epsilon
    return torch.special.entr(shares).sum().exp().item()


def _find_split(manifest: Manifest, split: str | None) -> str:
    """Return the split to measure: labels are not needed."""
    name = split or next((name for name in TEST_SPLITS if name in manifest.splits), None)
    if name is None:
        have = ", ".join(manifest.splits)
        raise ValueError(f"data set '{manifest.dataset}' has no test or val split (it has {have}): say `test_split`")
    manifest.split(name)
    return name


def _extract(subjects: Subjects, loader: Loader) -> tuple[dict[str, Set], Tensor, str]:
    """Read out every network's features of originals and copies, the labels, and the digest of what was seen."""
    tables: dict[str, list[Tensor]] = {}
    labels, digest, start = [], hashlib.sha256(), 0
    with progress_bar(loader.num_images, "metrics", unit="images", leave=False) as bar:
        for batch in loader.epoch():
            stop = start + len(batch.labels)
            for number, images in enumerate(_views(batch)):
                digest.update(_pixels(images, subjects))
                for name, features in forward(subjects.networks, images.to(subjects.device)).items():
                    if name not in tables:
                        tables[name] = [allocate(loader.num_images, features.shape[1]) for _ in Set._fields]
                    tables[name][number][start:stop] = features
            labels.append(batch.labels.clone())
            bar.update(stop - start)
            start = stop
    return {name: Set(*parts) for name, parts in tables.items()}, torch.cat(labels), digest.hexdigest()


def _views(batch: Batch) -> list[Tensor]:
    return [*batch.views["original"], *batch.views["copies"]]


def _pixels(images: Tensor, subjects: Subjects) -> Any:
    """Undo the normalisation, so that the digest does not depend on it: the bytes of (batch, height, width, 3)."""
    mean, std = torch.tensor(subjects.mean), torch.tensor(subjects.std)
    pixels = (images.permute(0, 2, 3, 1) * std + mean) * 255
    return pixels.round().clamp(0, 255).to(torch.uint8).contiguous().numpy().data
