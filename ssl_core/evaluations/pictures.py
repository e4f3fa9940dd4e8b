"""What a representation looks like (recipes E9): t-SNE by class, the triangles of Shi et al. (2022), the nearest
neighbours of ReSSL's Figure 2, the confusion matrix of the weighted kNN classifier, and the spectrum of the features.

The same images are seen through the pre-trained backbone and through the untrained one. The metrics are the numbers
that belong beside the pictures, which come as bytes: the stage writes them.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from matplotlib.figure import Figure
from pydantic import Field, PositiveFloat, PositiveInt
from sklearn.manifold import TSNE, trustworthiness
from threadpoolctl import threadpool_limits
from torch import Tensor

from ssl_core.config import Dataset, Strict
from ssl_core.data.loader import draw_subset
from ssl_core.data.shards import Manifest, read_labels
from ssl_core.data.views import View
from ssl_core.drawing.figures import (
    NETWORKS,
    Neighbours,
    draw_confusion,
    draw_neighbours,
    draw_points,
    draw_spectrum,
    render,
)
from ssl_core.evaluations import knn, metrics
from ssl_core.evaluations.parts.features import (
    Log,
    Outcome,
    Subjects,
    center_view,
    draw_by_class,
    find_test_split,
    labelled_split,
    make_loader,
    num_classes,
    percent,
    read_split,
)

TRUST_NEIGHBOURS = 10  # of each point, that trustworthiness looks at
FEWEST_IMAGES = 5  # below these there is nothing to see


class Config(Strict):
    """Which images, and the constants of each picture."""

    protocol: Literal["pictures"] = "pictures"
    dataset: Dataset  # its labelled images are the bank of neighbours
    test_split: str | None = None  # nothing said: test, else val
    images: PositiveInt = 2000  # of the test split in the t-SNE, as many of each class
    classes: int = Field(default=10, ge=1, le=20)  # in t-SNE and triangles; where there are more, so many are drawn
    perplexity: PositiveFloat = 30.0  # Shi et al.; at most a third of the points
    triangles: PositiveInt = 50  # images with their two copies
    area: tuple[PositiveFloat, PositiveFloat] = (0.2, 1.0)  # of the copies, as in the protocol `metrics`
    augmentation: str = "contrastive"
    queries: PositiveInt = 5
    neighbours: PositiveInt = 10  # shown of each query (ReSSL, Figure 2)
    k: PositiveInt = 200  # votes of the classifier behind the confusion matrix; with the rest as in `knn`
    temperature: PositiveFloat | None = None
    resize: float = Field(default=1.0, ge=1)
    image_size: PositiveInt | None = None  # nothing said: the pre-training's
    seed: int = 0  # of classes, images, copies and t-SNE


class Chosen(NamedTuple):
    """Images of the test split by their index, sorted but for the queries."""

    shown: list[int]  # in the t-SNE
    cornered: list[int]  # in the triangles, a part of those
    queries: list[int]


@dataclass(frozen=True)
class Seen:
    """What the networks gave: features by network, and the labels of the same rows."""

    tests: Mapping[str, Tensor]  # (test images, dim), row i of image i
    truth: Tensor
    bank: Mapping[str, Tensor]  # (training images, dim)
    bank_labels: Tensor
    bank_indices: np.ndarray  # image in the split
    corners: Mapping[str, metrics.Set]
    corner_labels: Tensor
    corner_digest: str


@dataclass(frozen=True)
class Look:
    """What one network makes of the images, ready to be drawn."""

    points: np.ndarray  # (images shown, 2)
    kl: float  # what t-SNE has left of what it minimises
    trust: float
    triangles: np.ndarray  # (images, 3, 2): each image, then its two copies
    triangles_kl: float
    nearest: Tensor  # (test images, neighbours) rows of the bank, nearest first
    right: Tensor  # whether those are of the query's class
    predicted: Tensor  # (test images,) by the weighted kNN classifier
    spectrum: np.ndarray
    rankme: float
    effective_rank: float


def run(config: Config, subjects: Subjects, manifest: Manifest, log: Log) -> Outcome:
    """Draw all pictures of the test split; raises `ValueError` for missing labels and fewer than five test images."""
    split = find_test_split(manifest, config.test_split, training=config.dataset.split)
    labelled_split(manifest, config.dataset.split)
    networks = {name: network for name, network in subjects.networks.items() if name in NETWORKS}
    subjects = replace(subjects, networks=networks)
    chosen = choose(np.array(read_labels(manifest, split)), config)
    if len(chosen.shown) < FEWEST_IMAGES:
        raise ValueError(f"{manifest.dataset}/{split}: {len(chosen.shown)} images are too few for pictures")
    view = center_view(subjects.image_size, resize=config.resize)
    seen = _see(config, subjects, manifest, split, chosen, view)
    settings = {
        "how": "fixed by the configuration",
        "images": len(chosen.shown),
        "perplexity": _capped(config.perplexity, len(chosen.shown)),
        "triangles": len(chosen.cornered),
        "triangles_set": seen.corner_digest,
        "neighbours": min(config.neighbours, len(seen.bank_labels)),
        "k": min(config.k, len(seen.bank_labels)),
        "temperature": config.temperature or knn.default_temperature(subjects.image_size),
        "image_size": subjects.image_size,
    }
    classes = num_classes(manifest, config.dataset.split)
    looks = {name: _look(name, seen, chosen, classes, config, settings) for name in networks}
    where = f"{manifest.dataset}/{split}"
    names = manifest.classes or tuple(map(str, range(classes)))
    figures = _draw(looks, seen, chosen, names, where, settings)
    tests = _read_images(subjects, manifest, Dataset(name=config.dataset.name, split=split), view, chosen.queries)
    found = {
        name: Neighbours(
            _read_images(subjects, manifest, config.dataset, view, seen.bank_indices[each.nearest[chosen.queries]]),
            seen.bank_labels[each.nearest[chosen.queries]].numpy(),
        )
        for name, each in looks.items()
    }
    title = (
        f"Queries of {where} and their {settings['neighbours']} nearest of {len(seen.bank_labels):,} training images"
    )
    figures["neighbours"] = draw_neighbours(tests, seen.truth[chosen.queries].numpy(), found, names, title=title)
    pictures = {
        f"{name}.{kind}": content for name, figure in figures.items() for kind, content in render(figure).items()
    }
    numbers = {name: _numbers(each, seen.truth) for name, each in looks.items()}
    details = {name: " ".join(map(str, images)) for name, images in chosen._asdict().items()}
    counts = (len(seen.bank_labels), len(seen.truth))
    return Outcome("pictures/v1", split, numbers, settings, *counts, details=details, pictures=pictures)


def choose(labels: np.ndarray, config: Config) -> Chosen:
    """Draw the classes that get a colour, as many images of each, and queries of as many classes as there are."""
    generator = np.random.default_rng(config.seed)
    classes = np.sort(generator.permutation(np.unique(labels))[: config.classes])
    of_classes = np.flatnonzero(np.isin(labels, classes)).tolist()

    def draw(candidates: Sequence[int], images: int) -> list[int]:
        return draw_by_class(labels.tolist(), candidates, lambda _: max(1, images // len(classes)), config.seed)

    shown = draw(of_classes, config.images)
    order, before = generator.permutation(len(labels)), Counter[int]()
    turns = []  # how many images of its class come before each
    for label in labels[order].tolist():
        turns.append(before[label])
        before[label] += 1
    queries = order[np.argsort(turns, kind="stable")][: config.queries]
    return Chosen(shown, draw(shown, config.triangles), queries.tolist())


def embed(rows: Tensor, perplexity: float, seed: int) -> tuple[np.ndarray, float]:
    """Return the t-SNE (images, 2) of L2-normalised rows, and its divergence.

    On one thread: with more, scikit-learn adds up in the order in which they end, which rounds differently each time.
    """
    unit = knn.unit(rows).numpy()
    start = "pca" if np.ptp(unit, axis=0).max() > 0 else "random"  # a collapsed backbone has no axes to start from
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


def _see(config: Config, subjects: Subjects, manifest: Manifest, split: str, chosen: Chosen, view: View) -> Seen:
    """Read out the networks' features of training and test images, and of the triangles' corners."""
    bank, tests = (read_split(subjects, manifest, part, view, "pictures") for part in (config.dataset, split))
    order = tests.indices.argsort()  # rows come in the shards' order
    said = {name: getattr(config, name) for name in ("dataset", "area", "augmentation", "resize", "seed")}
    of_copies = metrics.Config(**said)
    views = metrics.make_views(of_copies, subjects.image_size, manifest.avoid)
    corners, corner_labels, digest = metrics.read_set(of_copies, subjects, manifest, split, chosen.cornered, views)
    return Seen(
        tests={name: rows[order] for name, rows in tests.of.items()},
        truth=tests.labels[order],
        bank=bank.of,
        bank_labels=bank.labels,
        bank_indices=_in_split(bank.indices.numpy(), config.dataset, manifest),
        corners=corners,
        corner_labels=corner_labels,
        corner_digest=digest,
    )


def _look(name: str, seen: Seen, chosen: Chosen, classes: int, config: Config, settings: dict[str, Any]) -> Look:
    """Compute what is drawn of one network."""
    rows, bank = seen.tests[name], seen.bank[name]
    points, kl = embed(rows[chosen.shown], config.perplexity, config.seed)
    corners = torch.stack(seen.corners[name], dim=1)  # (images, 3, dim)
    triangles, triangles_kl = embed(corners.flatten(0, 1), config.perplexity, config.seed)
    k, shown = settings["k"], settings["neighbours"]
    cosines, nearest = knn.neighbours(bank, rows, max(k, shown), prepare=knn.unit, euclidean=False)
    labels, weights = seen.bank_labels[nearest], knn.vote_weights(cosines, settings["temperature"])
    ((_, predicted),) = knn.votes(labels, weights, [k], classes)
    return Look(
        points=points,
        kl=kl,
        trust=float(
            trustworthiness(
                knn.unit(rows[chosen.shown]).numpy(),
                points,
                n_neighbors=min(TRUST_NEIGHBOURS, (len(points) - 1) // 2),
            )
        ),
        triangles=triangles.reshape(-1, 3, 2),
        triangles_kl=triangles_kl,
        nearest=nearest[:, :shown],
        right=labels[:, :shown] == seen.truth[:, None],
        predicted=predicted,
        spectrum=spectrum(rows),
        rankme=metrics.rankme(rows),
        effective_rank=metrics.effective_rank(rows),
    )


def _numbers(look: Look, truth: Tensor) -> dict[str, float]:
    """Name the numbers that stand beside the pictures."""
    return {
        "top1": percent(look.predicted == truth),
        "neighbours_right": percent(look.right.flatten()),  # of the neighbours of all test images, in percent
        "tsne_kl": round(look.kl, 4),
        "trustworthiness": round(look.trust, 4),
        "triangles_kl": round(look.triangles_kl, 4),
        "rankme": round(look.rankme, 4),
        "effective_rank": round(look.effective_rank, 4),
    }


def _draw(
    looks: Mapping[str, Look], seen: Seen, chosen: Chosen, names: Sequence[str], where: str, settings: dict[str, Any]
) -> dict[str, Figure]:
    """Draw what needs no images."""
    pretrained = looks["pretrained"]
    accuracy = ", ".join(
        f"{NETWORKS[name][0]} {percent(each.predicted == seen.truth):.1f} %" for name, each in looks.items()
    )
    return {
        "tsne": draw_points(
            {name: each.points for name, each in looks.items()},
            seen.truth[chosen.shown].numpy(),
            names,
            title=f"t-SNE of {len(chosen.shown):,} images of {where}, perplexity {settings['perplexity']:g}",
            notes={name: f"divergence {each.kl:.2f}, trustworthiness {each.trust:.3f}" for name, each in looks.items()},
        ),
        "triangles": draw_points(
            {name: each.triangles for name, each in looks.items()},
            seen.corner_labels.numpy(),
            names,
            title=f"t-SNE of {len(chosen.cornered):,} images of {where}, each joined to its two augmented copies",
            notes={name: f"divergence {each.triangles_kl:.2f}" for name, each in looks.items()},
        ),
        "confusion": draw_confusion(
            confusion(seen.truth, pretrained.predicted, len(names)),
            names,
            title=f"Weighted {settings['k']}-nearest-neighbour classifier on {where}\n{accuracy}",
        ),
        "spectrum": draw_spectrum(
            {name: each.spectrum for name, each in looks.items()},
            {
                name: f"RankMe {each.rankme:.1f}, effective rank {each.effective_rank:.1f}"
                for name, each in looks.items()
            },
            title=f"Spectrum of {len(seen.truth):,} centered features of {where}",
        ),
    }


def _read_images(subjects: Subjects, manifest: Manifest, dataset: Dataset, view: View, indices: Any) -> np.ndarray:
    """Read images of the split by their indices, an array of any shape, as (*shape, size, size, 3) in 0..1."""
    wanted, places = np.unique(np.asarray(indices), return_inverse=True)
    pixels = torch.empty(len(wanted), view.size, view.size, 3)
    with make_loader(subjects, manifest, dataset, view, only=wanted.tolist()) as loader:
        mean, std = (torch.tensor(values) for values in loader.normalisation)
        for batch in loader.epoch():
            ((images,),) = batch.views.values()
            pixels[batch.indices.cpu()] = images.float().cpu().permute(0, 2, 3, 1) * std + mean
    return pixels.clamp(0, 1).numpy()[places.reshape(np.shape(indices))]


def _in_split(positions: np.ndarray, dataset: Dataset, manifest: Manifest) -> np.ndarray:
    """Return which images of the split stand at these positions of the data set's subset, if it is one."""
    if dataset.subset is None:
        return positions
    return draw_subset(manifest.split(dataset.split).images, dataset.subset, dataset.name)[positions]


def _capped(perplexity: float, points: int) -> float:
    return min(perplexity, (points - 1) / 3)
