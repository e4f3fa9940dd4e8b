"""The numbers behind five pictures of a representation: t-SNE by class, the triangles of Shi et al. (2022), the nearest
neighbours of ReSSL's Figure 2, the confusion matrix of the weighted kNN classifier, and the spectrum of the features.

The pre-trained and the untrained backbone get the same images. The metrics are the numbers shown with the pictures.
`Outcome.drawing` has the arrays from which the stage `draw` makes the pictures; nothing is drawn here.
Source: docs/sources.md#pictures-and-cost.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
import torch
from pydantic import Field, PositiveFloat, PositiveInt
from sklearn.manifold import TSNE, trustworthiness
from threadpoolctl import threadpool_limits
from torch import Tensor

from ssl_core.config import Dataset, parse
from ssl_core.data.loader import Loader, draw_subset
from ssl_core.data.shards import Manifest, read_labels
from ssl_core.data.views import View, adjust
from ssl_core.evaluations import knn, metrics
from ssl_core.evaluations.base import ImageConfig, Log, Outcome, Subjects, find_test_split
from ssl_core.evaluations.parts.features import (
    center_view,
    draw_by_class,
    forward,
    make_loader,
    num_classes,
    percent,
    read_split,
)
from ssl_core.experiments.needs import Contract

NETWORKS = ("pretrained", "untrained")  # raw pixels are not drawn
TRUST_NEIGHBOURS = 10  # neighbours of each point that trustworthiness compares
FEWEST_IMAGES = 5  # fewer make no picture


class Config(ImageConfig):
    """The images and the constants of each picture.

    The labelled images of `dataset` are the bank of neighbours. The seed draws classes, images and copies, and starts
    t-SNE.
    """

    contract: ClassVar = Contract(rule="pictures")

    protocol: Literal["pictures"] = "pictures"
    images: PositiveInt = 2000  # of the test split in the t-SNE, equally many per class
    classes: int = Field(default=10, ge=1, le=20)  # in t-SNE and triangles; of more classes this many are drawn
    perplexity: PositiveFloat = 30.0  # Shi et al.; at most a third of the points
    triangles: PositiveInt = 50  # images with their two copies
    area: tuple[PositiveFloat, PositiveFloat] = (0.2, 1.0)  # of the copies, as in the protocol `metrics`
    augmentation: str = "contrastive"
    queries: PositiveInt = 5
    neighbours: PositiveInt = 10  # shown per query (ReSSL, Figure 2)
    # Policies, such as [weak, contrastive]: training images augmented by each are further queries, for a figure.
    query_views: tuple[str, ...] = ()
    k: PositiveInt = 200  # votes of the classifier behind the confusion matrix, otherwise as in `knn`
    temperature: PositiveFloat | None = None


class Sample(NamedTuple):
    """Images of the test split by their indices; sorted, except the queries."""

    shown: list[int]  # in the t-SNE
    cornered: list[int]  # in the triangles, a subset of `shown`
    queries: list[int]


@dataclass(frozen=True)
class Extracted:
    """Features by network, and the labels of the same rows."""

    tests: Mapping[str, Tensor]  # (test images, dim), row i of image i
    truth: Tensor
    bank: Mapping[str, Tensor]  # (training images, dim)
    bank_labels: Tensor
    bank_indices: np.ndarray  # image in the split
    corners: Mapping[str, metrics.Set]
    corner_labels: Tensor
    corner_digest: str


class Measures(NamedTuple):
    """Results of one network."""

    numbers: dict[str, float]  # for the results and under the pictures
    arrays: dict[str, np.ndarray]  # points (images shown, 2), triangles (images, 3, 2), spectrum
    nearest: Tensor  # (test images, neighbours) rows of the bank, nearest first
    predicted: Tensor  # (test images,) by the weighted kNN classifier


def run(config: Config, subjects: Subjects, manifest: Manifest, log: Log) -> Outcome:
    """Measure everything that the pictures show; raises `ValueError` for fewer than five test images."""
    split = find_test_split(config, manifest)
    networks = {name: network for name, network in subjects.networks.items() if name in NETWORKS}
    subjects = replace(subjects, networks=networks)
    sample = choose(np.array(read_labels(manifest, split)), config)
    if len(sample.shown) < FEWEST_IMAGES:
        raise ValueError(
            f"{manifest.dataset}/{split}: {len(sample.shown)} images are too few for pictures: give {FEWEST_IMAGES} or "
            "more"
        )
    view = center_view(subjects.image_size, resize=config.resize)
    extracted = _extract(config, subjects, manifest, split, sample, view)
    settings = config.settings(
        how="fixed by the configuration",
        images=len(sample.shown),
        perplexity=_capped(config.perplexity, len(sample.shown)),
        triangles=len(sample.cornered),
        triangles_set=extracted.corner_digest,
        neighbours=min(config.neighbours, len(extracted.bank_labels)),
        k=min(config.k, len(extracted.bank_labels)),
        temperature=config.temperature or knn.default_temperature(subjects.image_size),
        image_size=subjects.image_size,
    )
    classes = num_classes(manifest, config.dataset.split)
    measured = {name: _measure(name, extracted, sample, classes, config, settings) for name in networks}
    drawing = {
        "data": np.array(f"{manifest.dataset}/{split}"),
        "classes": np.array(manifest.classes or tuple(map(str, range(classes)))),
        "confusion": confusion(extracted.truth, measured["pretrained"].predicted, classes),
        "num_bank": np.array(len(extracted.bank_labels)),
        "num_tests": np.array(len(extracted.truth)),
        "perplexity": np.array(settings["perplexity"]),
        "k": np.array(settings["k"]),
        "labels": extracted.truth[sample.shown].numpy(),
        "corner_labels": extracted.corner_labels.numpy(),
        "query_labels": extracted.truth[sample.queries].numpy(),
        "query_images": _read_images(
            subjects, manifest, Dataset(name=config.dataset.name, split=split), view, sample.queries
        ),
    }
    for name, measures in measured.items():
        rows = measures.nearest[sample.queries]  # (queries, neighbours)
        images = _read_images(subjects, manifest, config.dataset, view, extracted.bank_indices[rows])
        arrays: dict[str, Any] = measures.arrays | measures.numbers
        del arrays["neighbours_right"]  # in no picture
        arrays |= {"neighbour_images": images, "neighbour_labels": extracted.bank_labels[rows].numpy()}
        drawing |= {f"{name}.{key}": np.asarray(value) for key, value in arrays.items()}
    if config.query_views:
        drawing |= _augmented_queries(config, subjects, manifest, extracted, view, settings["neighbours"])
    return Outcome(
        "pictures/v1",
        split,
        {name: _rounded(measures.numbers) for name, measures in measured.items()},
        settings,
        num_train=len(extracted.bank_labels),
        num_test=len(extracted.truth),
        details={name: " ".join(map(str, images)) for name, images in sample._asdict().items()},
        drawing=drawing,
    )


def choose(labels: np.ndarray, config: Config) -> Sample:
    """Draw the classes that get a colour, equally many images of each, and queries of as many classes as possible."""
    generator = np.random.default_rng(config.seed)
    classes = np.sort(generator.permutation(np.unique(labels))[: config.classes])
    of_classes = np.flatnonzero(np.isin(labels, classes)).tolist()

    def draw(candidates: Sequence[int], images: int) -> list[int]:
        return draw_by_class(labels.tolist(), candidates, lambda _: max(1, images // len(classes)), config.seed)

    shown = draw(of_classes, config.images)
    order, before = generator.permutation(len(labels)), Counter[int]()
    turns = []  # for each image, how many of its class come before it
    for label in labels[order].tolist():
        turns.append(before[label])
        before[label] += 1
    queries = order[np.argsort(turns, kind="stable")][: config.queries]
    return Sample(shown, draw(shown, config.triangles), queries.tolist())


def embed(rows: Tensor, perplexity: float, seed: int) -> tuple[np.ndarray, float]:
    """Return the t-SNE (images, 2) of L2-normalised rows, and its divergence.

    Runs on one thread: with several, scikit-learn sums in the order in which threads end, which rounds differently
    from run to run.
    """
    unit = knn.unit(rows).numpy()
    has_axes = np.ptp(unit, axis=0).max() > 0  # features of a collapsed backbone have no principal axes
    start = "pca" if has_axes else "random"
    tsne = TSNE(perplexity=_capped(perplexity, len(unit)), init=start, random_state=seed)
    with threadpool_limits(1):
        return tsne.fit_transform(unit), float(tsne.kl_divergence_)


def spectrum(rows: Tensor) -> np.ndarray:
    """Return the singular values of the centered rows (images, dim), largest first."""
    rows = rows.double()
    return torch.linalg.svdvals(rows - rows.mean(dim=0)).numpy()


def confusion(truth: Tensor, predicted: Tensor, classes: int) -> np.ndarray:
    """Count images by true and predicted class, (classes, classes)."""
    return (truth * classes + predicted).bincount(minlength=classes**2).view(classes, classes).numpy()


def _extract(
    config: Config, subjects: Subjects, manifest: Manifest, split: str, sample: Sample, view: View
) -> Extracted:
    """Extract the networks' features of training and test images, and of the triangles' corners."""
    bank, tests = (read_split(subjects, manifest, part, view, "pictures") for part in (config.dataset, split))
    order = tests.indices.argsort()  # rows are in the shards' order
    shared = {name: getattr(config, name) for name in ("dataset", "area", "augmentation", "resize", "seed")}
    set_config = metrics.Config(**shared)
    views = metrics.make_views(set_config, subjects.image_size, manifest.avoid)
    corners, corner_labels, digest = metrics.read_set(set_config, subjects, manifest, split, sample.cornered, views)
    return Extracted(
        tests={name: rows[order] for name, rows in tests.by_network.items()},
        truth=tests.labels[order],
        bank=bank.by_network,
        bank_labels=bank.labels,
        bank_indices=_in_split(bank.indices.numpy(), config.dataset, manifest),
        corners=corners,
        corner_labels=corner_labels,
        corner_digest=digest,
    )


def _measure(
    name: str, extracted: Extracted, sample: Sample, classes: int, config: Config, settings: dict[str, Any]
) -> Measures:
    """Compute what is drawn of one network."""
    rows, bank = extracted.tests[name], extracted.bank[name]
    points, kl = embed(rows[sample.shown], config.perplexity, config.seed)
    trust = trustworthiness(
        knn.unit(rows[sample.shown]).numpy(), points, n_neighbors=min(TRUST_NEIGHBOURS, (len(points) - 1) // 2)
    )
    corners = torch.stack(extracted.corners[name], dim=1)  # (images, 3, dim)
    triangles, triangles_kl = embed(corners.flatten(0, 1), config.perplexity, config.seed)
    k, shown = settings["k"], settings["neighbours"]
    cosines, nearest = knn.neighbours(bank, rows, max(k, shown), prepare=knn.unit, euclidean=False)
    labels, weights = extracted.bank_labels[nearest], knn.vote_weights(cosines, settings["temperature"])
    ((_, predicted),) = knn.votes(labels, weights, [k], classes)
    numbers = {
        "top1": percent(predicted == extracted.truth),
        "neighbours_right": percent((labels[:, :shown] == extracted.truth[:, None]).flatten()),  # of all test images
        "tsne_kl": kl,
        "trustworthiness": float(trust),
        "triangles_kl": triangles_kl,
        "rankme": metrics.rankme(rows),
        "effective_rank": metrics.effective_rank(rows),
    }
    arrays = {"points": points, "triangles": triangles.reshape(-1, 3, 2), "spectrum": spectrum(rows)}
    return Measures(numbers, arrays, nearest[:, :shown], predicted)


def _augmented_queries(
    config: Config, subjects: Subjects, manifest: Manifest, extracted: Extracted, view: View, shown: int
) -> dict[str, np.ndarray]:
    """Return training images augmented by each policy, and their nearest other training images, as arrays to draw.

    Rows are the policies of the first image, then those of the next.
    """
    split, policies = config.dataset.split, config.query_views
    queries = choose(np.array(read_labels(manifest, split)), config).queries
    sections = {"area": config.area, "size": subjects.image_size}
    views = {policy: parse(View, {**sections, "augmentation": policy}, "query_views") for policy in policies}
    loader = Loader(
        manifest,
        Dataset(name=config.dataset.name, split=split),
        adjust(views, {}, avoid=manifest.avoid),
        batch_size=len(queries),
        seed=config.seed,
        shuffle=False,
        mean=subjects.mean,
        std=subjects.std,
        only=queries,
    )
    with loader:
        batch = loader.next()
        images = torch.stack([batch.views[policy][0].cpu() for policy in policies], dim=1).flatten(0, 1)
        pixels = _pixels(images, loader.normalisation)
    (rows,) = forward({"pretrained": subjects.networks["pretrained"]}, images.to(subjects.device)).values()
    bank = extracted.bank["pretrained"]
    _, nearest = knn.neighbours(bank, rows.cpu(), min(shown + 1, len(bank)), prepare=knn.unit, euclidean=False)
    own = np.repeat(batch.indices.cpu().numpy(), len(policies))
    found = np.array([of[extracted.bank_indices[of] != image][:shown] for of, image in zip(nearest.numpy(), own)])
    return {
        "augmented.policies": np.array(policies * len(queries)),
        "augmented.images": pixels,
        "augmented.labels": np.repeat(batch.labels.cpu().numpy(), len(policies)),
        "augmented.neighbour_images": _read_images(
            subjects, manifest, config.dataset, view, extracted.bank_indices[found]
        ),
        "augmented.neighbour_labels": extracted.bank_labels[torch.from_numpy(found)].numpy(),
    }


def _read_images(subjects: Subjects, manifest: Manifest, dataset: Dataset, view: View, indices: Any) -> np.ndarray:
    """Read images of the split by their indices, an array of any shape, as (*shape, size, size, 3) uint8."""
    unique, positions = np.unique(np.asarray(indices), return_inverse=True)
    pixels = np.empty((len(unique), view.size, view.size, 3), np.uint8)
    with make_loader(subjects, manifest, dataset, view, only=unique.tolist()) as loader:
        for batch in loader.epoch():
            ((images,),) = batch.views.values()
            pixels[batch.indices.cpu()] = _pixels(images, loader.normalisation)
    return pixels[positions.reshape(np.shape(indices))]


def _pixels(images: Tensor, normalisation: Any) -> np.ndarray:
    """Undo the normalisation of (images, 3, height, width); return (images, height, width, 3) uint8."""
    mean, std = (torch.tensor(values) for values in normalisation)
    pixels = images.float().cpu().permute(0, 2, 3, 1) * std + mean
    return (255 * pixels.clamp(0, 1)).to(torch.uint8).numpy()  # rounded down, as matplotlib does with floats


def _in_split(positions: np.ndarray, dataset: Dataset, manifest: Manifest) -> np.ndarray:
    """Return the indices in the split of images at these positions of `dataset`, which may be a subset."""
    if dataset.subset is None:
        return positions
    return draw_subset(manifest.split(dataset.split).images, dataset.subset, dataset.name)[positions]


def _rounded(numbers: Mapping[str, float]) -> dict[str, float]:
    return {name: round(value, 4) for name, value in numbers.items()}


def _capped(perplexity: float, points: int) -> float:
    return min(perplexity, (points - 1) / 3)
