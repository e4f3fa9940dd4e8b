"""k-nearest-neighbour classification of frozen features (docs/sources.md#knn).

`weighted` is the classifier of NPID and MoCo: cosine, votes weighted by exp(cosine / temperature). `best` is Shi et
al.'s best-NN (2022): unweighted majority vote for each odd k up to 101. It reports the best k on the test split.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import PositiveFloat, PositiveInt
from torch import Tensor

from ssl_core.data.shards import Manifest
from ssl_core.evaluations.base import FrozenConfig, Log, Outcome, Subjects, find_test_split
from ssl_core.evaluations.parts.features import Features, center_view, num_classes, percent, read_split

BEST_K = tuple(range(1, 102, 2))
MIN_GROUP = 4  # columns; below, groups save no time
SMALL_IMAGE = 96  # images up to this size have NPID's temperature for CIFAR


class Config(FrozenConfig):
    """How neighbours are found and how they vote."""

    protocol: Literal["knn"] = "knn"
    variant: Literal["weighted", "best"] = "weighted"
    k: PositiveInt = 200  # at most the number of training images
    more_k: tuple[PositiveInt, ...] = ()  # weighted: further k, reported beside `k` from the same pass
    temperature: PositiveFloat | None = None  # default: .1 up to 96 px (NPID on CIFAR), .07 above (ImageNet)
    # best: Euclidean distance of raw features, of L2-normalised ones, or of ones shifted by their mean first
    space: Literal["raw", "l2", "shift"] = "raw"


def run(config: Config, subjects: Subjects, manifest: Manifest, log: Log) -> Outcome:
    """Classify the test split by the labelled training images, for each network."""
    split = find_test_split(config, manifest)
    view = center_view(subjects.image_size, resize=config.resize)
    bank, queries = (
        read_split(subjects, manifest, part, view, "knn", precision=config.precision)
        for part in (config.dataset, split)
    )
    classes = num_classes(manifest, config.dataset.split)
    best = config.variant == "best"
    score = _score_best if best else _score_weighted
    metrics, resolved = score(config, subjects, bank, queries, classes)
    return Outcome(
        "knn-best/v1" if best else "knn/v1",
        split,
        metrics,
        config.settings(image_size=subjects.image_size, **resolved),
        num_train=len(bank.labels),
        num_test=len(queries.labels),
        headline="best_nn_top1" if best else "top1",
    )


Scores = tuple[dict[str, dict[str, Any]], dict[str, Any]]  # metrics per network, settings that were resolved


def _score_weighted(config: Config, subjects: Subjects, bank: Features, queries: Features, classes: int) -> Scores:
    """Score `k` and, from the same neighbours, `more_k`."""
    temperature = config.temperature or default_temperature(subjects.image_size)
    k, *more = (min(k, len(bank.labels)) for k in (config.k, *config.more_k))
    metrics = {}
    for name in subjects.networks:
        cosines, nearest = neighbours(
            bank.by_network[name],
            queries.by_network[name],
            max(k, *more, 0),
            prepare=unit,
            euclidean=False,
            device=subjects.device,
        )
        weights = vote_weights(cosines, temperature)
        table = accuracy_by_k(bank.labels[nearest], weights, queries.labels, sorted({k, *more}), classes)
        metrics[name] = {"top1": table[k]}
        if more:
            metrics[name]["top1_by_k"] = _with_text_keys(table)
    how = "fixed by the configuration"
    if k < config.k:
        how = f"{config.k} capped at the {len(bank.labels)} training images"
    return metrics, {"k": k, "how": how, "temperature": temperature, "space": "l2", "metric": "cosine"}


def _score_best(config: Config, subjects: Subjects, bank: Features, queries: Features, classes: int) -> Scores:
    """Score each odd k and report the best one under a name of its own."""
    ks = [k for k in BEST_K if k <= len(bank.labels)]
    metrics, chosen = {}, {}
    for name in subjects.networks:
        rows = bank.by_network[name]
        _, nearest = neighbours(
            rows,
            queries.by_network[name],
            ks[-1],
            prepare=into_space(rows, config.space),
            euclidean=True,
            device=subjects.device,
        )
        labels = bank.labels[nearest]
        table = accuracy_by_k(labels, torch.ones(labels.shape), queries.labels, ks, classes)
        chosen[name] = max(ks, key=lambda k: (table[k], -k))
        metrics[name] = {"best_nn_top1": table[chosen[name]], "top1_by_k": _with_text_keys(table)}
    return metrics, {"k": chosen, "how": "highest top1 on the test split", "metric": "euclidean"}


def neighbours(
    bank: Tensor,
    queries: Tensor,
    k: int,
    *,
    prepare: Callable[[Tensor], Tensor],
    euclidean: bool,
    device: str = "cpu",
    chunk: int = 512,
    bank_chunk: int = 16384,
) -> tuple[Tensor, Tensor]:
    """Find the k nearest rows of `bank` (n, dim) for each query, nearest first.

    `prepare` maps rows of both into the space of the comparison. Returns similarities and rows, both (queries, k):
    inner products, or if `euclidean` q.b - b.b / 2, which orders the bank as the distance to q does.
    Needs memory for `chunk` x `bank_chunk` similarities and queries x k results; reads the bank once.
    """
    best: list[tuple[Tensor, Tensor]] = []  # for each chunk of queries, the best so far
    for start in range(0, len(bank), bank_chunk):
        part = prepare(bank[start : start + bank_chunk]).to(device)  # once per part: it may come from a file
        offset = part.square().sum(dim=1) / 2 if euclidean else None
        for number, few_queries in enumerate(queries.split(chunk)):
            similarity = prepare(few_queries).to(device) @ part.T
            if offset is not None:
                similarity -= offset
            values, rows = _largest(similarity, min(k, len(part)))
            values, rows = values.cpu(), rows.cpu() + start
            if start == 0:
                best.append((values, rows))
                continue
            values, rows = (torch.cat(pair, dim=1) for pair in zip(best[number], (values, rows)))
            values, order = values.topk(min(k, values.shape[1]), dim=1)
            best[number] = (values, rows.gather(1, order))
    return torch.cat([values for values, _ in best]), torch.cat([rows for _, rows in best])


def _largest(similarity: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return the k largest numbers of each row, largest first, and their columns.

    `topk` over all columns costs almost as much as the matrix product. The k largest numbers of a row lie in the k
    groups of columns with the largest maxima, so only these groups are sorted.
    """
    columns = similarity.shape[1]
    size = math.isqrt(columns // k)  # columns per group; groups and candidates together are then fewest
    if size < MIN_GROUP:
        return similarity.topk(k, dim=1)
    groups = columns // size
    maxima = similarity[:, : groups * size].unflatten(1, (size, groups)).amax(dim=1)
    chosen = maxima.topk(k, dim=1, sorted=False).indices
    members = groups * torch.arange(size, device=chosen.device)
    candidates = (chosen[:, None] + members[:, None]).flatten(1)
    rest = torch.arange(groups * size, columns, device=chosen.device).expand(len(chosen), -1)
    candidates = torch.cat([candidates, rest], dim=1)
    values, order = similarity.gather(1, candidates).topk(k, dim=1)
    return values, candidates.gather(1, order)


def accuracy_by_k(labels: Tensor, weights: Tensor, truth: Tensor, ks: Sequence[int], classes: int) -> dict[int, float]:
    """Return top-1 in percent for each k from neighbours' `labels` and `weights` (queries, >= max k), nearest first."""
    return {k: percent(predicted == truth) for k, predicted in votes(labels, weights, ks, classes)}


def vote_weights(cosines: Tensor, temperature: float) -> Tensor:
    """Return exp(cosine / temperature) of neighbours (queries, k), nearest first, divided by that of the nearest.

    The common factor changes no vote and keeps the sums finite at any temperature.
    """
    return ((cosines - cosines[:, :1]) / temperature).exp()


def votes(labels: Tensor, weights: Tensor, ks: Sequence[int], classes: int) -> Iterator[tuple[int, Tensor]]:
    """Yield (k, predicted classes) for rising `ks`; a tie goes to the smallest class."""
    scores = torch.zeros(len(labels), classes)
    previous = 0
    for k in ks:
        scores.scatter_add_(1, labels[:, previous:k], weights[:, previous:k])
        previous = k
        yield k, scores.argmax(dim=1)


def default_temperature(image_size: int) -> float:
    """Return NPID's temperature for images of this size: that for CIFAR or that for ImageNet."""
    return 0.1 if image_size <= SMALL_IMAGE else 0.07


def unit(rows: Tensor) -> Tensor:
    """L2-normalise rows."""
    return F.normalize(rows, dim=1)


def into_space(bank: Tensor, space: str) -> Callable[[Tensor], Tensor]:
    """Return the function that maps features into the space of best-NN's distance.

    `shift` subtracts the mean of the training images. Shi et al.'s code subtracts the mean of each mini-batch, which
    makes a neighbour depend on the order of the images.
    """
    mean = bank.mean(dim=0)
    if space == "raw":
        return lambda rows: rows - mean  # distances stay, but squares of numbers far from zero lose digits in float32
    return unit if space == "l2" else lambda rows: unit(rows - mean)


def _with_text_keys(table: dict[int, float]) -> dict[str, float]:
    return {str(k): value for k, value in table.items()}
