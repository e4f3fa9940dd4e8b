"""k-nearest-neighbour classification of frozen features (recipes E2).

`weighted` is NPID's and MoCo's: cosine, votes weighted by exp(cosine / temperature). `best` is Shi et al.'s best-NN
(2022): unweighted majority for every odd k up to 101, the best of which is reported, so k is chosen on the test split.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field, PositiveFloat, PositiveInt
from torch import Tensor

from ssl_core.config import Dataset, Strict
from ssl_core.data.shards import Manifest
from ssl_core.evaluations.parts.features import (
    Features,
    Log,
    Outcome,
    Precision,
    Subjects,
    center_view,
    find_test_split,
    labelled_split,
    num_classes,
    percent,
    read_split,
)

BEST_K = tuple(range(1, 102, 2))
SMALL_IMAGE = 96  # up to here the temperature is NPID's for CIFAR


class Config(Strict):
    """How neighbours are found and how they vote."""

    protocol: Literal["knn"] = "knn"
    dataset: Dataset
    test_split: str | None = None  # nothing said: test, else val
    variant: Literal["weighted", "best"] = "weighted"
    k: PositiveInt = 200  # capped at the number of training images
    more_k: tuple[PositiveInt, ...] = ()  # weighted: reported beside `k` from the same pass
    temperature: PositiveFloat | None = None  # nothing said: .1 up to 96 px (NPID on CIFAR), .07 above (ImageNet)
    space: Literal["raw", "l2", "shift"] = (
        "raw"  # best: Euclidean on features as they are, L2-normalised, or shifted first
    )
    resize: float = Field(
        default=1.0, ge=1
    )  # shorter side before the center crop, times the image size; 1.143 is 256/224
    image_size: PositiveInt | None = None  # nothing said: the pre-training's
    precision: Precision = "fp32"
    seed: int = 0  # nothing is drawn; recorded as in every protocol


def run(config: Config, subjects: Subjects, manifest: Manifest, log: Log) -> Outcome:
    """Classify the test split by the labelled training images, for each network."""
    split = find_test_split(manifest, config.test_split, training=config.dataset.split)
    labelled_split(manifest, config.dataset.split)
    view = center_view(subjects.image_size, resize=config.resize)
    bank, queries = (
        read_split(subjects, manifest, part, view, "knn", precision=config.precision)
        for part in (config.dataset, split)
    )
    classes = num_classes(manifest, config.dataset.split)
    metrics, hyperparameters = (_best if config.variant == "best" else _weighted)(
        config, subjects, bank, queries, classes
    )
    protocol = "knn-best/v1" if config.variant == "best" else "knn/v1"
    shared = {
        "variant": config.variant,
        "image_size": subjects.image_size,
        "resize": config.resize,
        "precision": config.precision,
    }
    counts = (len(bank.labels), len(queries.labels))
    headline = "best_nn_top1" if config.variant == "best" else "top1"
    return Outcome(protocol, split, metrics, shared | hyperparameters, *counts, headline)


def _weighted(config: Config, subjects: Subjects, bank: Features, queries: Features, classes: int):
    """Score the configured k, and further ones beside it."""
    temperature = config.temperature or default_temperature(subjects.image_size)
    k, *more = (min(k, len(bank.labels)) for k in (config.k, *config.more_k))
    metrics = {}
    for name in subjects.networks:
        rows, asked, most = bank.of[name], queries.of[name], max(k, *more, 0)
        cosines, nearest = neighbours(rows, asked, most, prepare=unit, euclidean=False, device=subjects.device)
        table = accuracy_by_k(
            bank.labels[nearest], vote_weights(cosines, temperature), queries.labels, sorted({k, *more}), classes
        )
        metrics[name] = {"top1": table[k]} | ({"top1_by_k": _named(table)} if more else {})
    how = "fixed by the configuration"
    if k < config.k:
        how = f"{config.k} capped at the {len(bank.labels)} training images"
    return metrics, {"k": k, "how": how, "temperature": temperature, "space": "l2", "metric": "cosine"}


def _best(config: Config, subjects: Subjects, bank: Features, queries: Features, classes: int):
    """Score every odd k and report the best one, named so."""
    ks = [k for k in BEST_K if k <= len(bank.labels)]
    metrics, chosen = {}, {}
    for name in subjects.networks:
        rows, asked, prepare = bank.of[name], queries.of[name], into_space(bank.of[name], config.space)
        _, nearest = neighbours(rows, asked, ks[-1], prepare=prepare, euclidean=True, device=subjects.device)
        labels = bank.labels[nearest]
        table = accuracy_by_k(labels, torch.ones(labels.shape), queries.labels, ks, classes)
        chosen[name] = max(ks, key=lambda k: (table[k], -k))
        metrics[name] = {"best_nn_top1": table[chosen[name]], "top1_by_k": _named(table)}
    return metrics, {"k": chosen, "how": "highest top1 on the test split", "space": config.space, "metric": "euclidean"}


def neighbours(
    bank: Tensor,
    queries: Tensor,
    k: int,
    *,
    prepare: Callable[[Tensor], Tensor],
    euclidean: bool,
    device: str = "cpu",
    chunk: int = 1024,
    bank_chunk: int = 16384,
) -> tuple[Tensor, Tensor]:
    """Find the k nearest rows of `bank` (n, dim) for each query, nearest first.

    In memory for `chunk` x `bank_chunk` similarities and queries x k results; the bank is read once.
    `prepare` brings rows of both into the space of the comparison. Returns similarities and rows, both (queries, k):
    inner products, or if `euclidean` q.b - b.b / 2, which orders the bank as the distance to q does.
    """
    found: list[tuple[Tensor, Tensor]] = []  # for each chunk of queries, the best so far
    for start in range(0, len(bank), bank_chunk):
        part = prepare(bank[start : start + bank_chunk]).to(device)  # each once: it may come from a file
        offset = part.square().sum(dim=1) / 2 if euclidean else None
        for number, asked in enumerate(queries.split(chunk)):
            similarity = prepare(asked).to(device) @ part.T
            if offset is not None:
                similarity -= offset
            values, rows = similarity.topk(min(k, len(part)), dim=1)
            values, rows = values.cpu(), rows.cpu() + start
            if start == 0:
                found.append((values, rows))
                continue
            values, rows = (torch.cat(pair, dim=1) for pair in zip(found[number], (values, rows)))
            values, order = values.topk(min(k, values.shape[1]), dim=1)
            found[number] = (values, rows.gather(1, order))
    return torch.cat([values for values, _ in found]), torch.cat([rows for _, rows in found])


def accuracy_by_k(labels: Tensor, weights: Tensor, truth: Tensor, ks: Sequence[int], classes: int) -> dict[int, float]:
    """Return top-1 in percent for each k from neighbours' `labels` and `weights` (queries, >= max k), nearest first."""
    return {k: percent(predicted == truth) for k, predicted in votes(labels, weights, ks, classes)}


def vote_weights(cosines: Tensor, temperature: float) -> Tensor:
    """Return exp(cosine / temperature) of neighbours (queries, k), nearest first, over that of the nearest.

    The common factor changes no vote and keeps the sums finite at any temperature.
    """
    return ((cosines - cosines[:, :1]) / temperature).exp()


def votes(labels: Tensor, weights: Tensor, ks: Sequence[int], classes: int) -> Iterator[tuple[int, Tensor]]:
    """Yield (k, predicted classes) for rising `ks`; each vote is added once, and a tie goes to the smallest class."""
    scores = torch.zeros(len(labels), classes)
    previous = 0
    for k in ks:
        scores.scatter_add_(1, labels[:, previous:k], weights[:, previous:k])
        previous = k
        yield k, scores.argmax(dim=1)


def default_temperature(image_size: int) -> float:
    """Return NPID's temperature for images of that size: CIFAR's or ImageNet's."""
    return 0.1 if image_size <= SMALL_IMAGE else 0.07


def unit(rows: Tensor) -> Tensor:
    """L2-normalise rows."""
    return F.normalize(rows, dim=1)


def into_space(bank: Tensor, space: str) -> Callable[[Tensor], Tensor]:
    """Return what brings features into the space of best-NN's distance; `shift` uses the mean of the training images.

    Shi's code shifts by the mean of each mini-batch, which makes a neighbour depend on the order of the images.
    """
    mean = bank.mean(dim=0)
    if space == "raw":
        return lambda rows: rows - mean  # no distance feels it, but sums of squares far from zero lose digits in fp32
    return unit if space == "l2" else lambda rows: unit(rows - mean)


def _named(table: dict[int, float]) -> dict[str, float]:
    return {str(k): value for k, value in table.items()}
