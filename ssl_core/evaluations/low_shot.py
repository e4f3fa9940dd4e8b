"""Low-shot classification with linear SVMs on frozen features: PCL's protocol, ReSSL's Table 11.

One SVM per class separates it from all others (one against the rest), trained on k positive images per class. The
metric is the mean over classes of the average precision on the test split. Images may show several classes (VOC).
Source: docs/sources.md#low-shot.
"""

import warnings
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from pydantic import PositiveFloat, PositiveInt, model_validator
from torch import Tensor

from ssl_core.config import Dataset
from ssl_core.data import multilabels
from ssl_core.data.loader import draw_subset
from ssl_core.data.shards import Manifest
from ssl_core.evaluations.base import FrozenConfig, Log, Outcome, Subjects, find_test_split
from ssl_core.evaluations.parts.features import Features, apply_in_chunks, center_view, num_classes, read_split
from ssl_core.experiments.needs import Contract, Needs


class Config(FrozenConfig):
    """How many images train, how often they are drawn (by the seed), and the SVM (PCL's code)."""

    contract: ClassVar = Contract(needs=Needs(labels="several"))

    protocol: Literal["low_shot"] = "low_shot"
    shots: tuple[PositiveInt, ...] = (4, 8, 16, 32, 64)  # positive images per class
    draws: PositiveInt = 5  # of each number of shots
    full: bool = True  # also train on all images, once
    # Test images in which all objects of a class are marked difficult: negatives of the class (PCL), or left out of its
    # average precision (VISSL). In training they are negatives in both.
    difficult: Literal["negative", "ignore"] = "negative"
    cost: PositiveFloat = 0.5  # PCL reports the best of several; ReSSL follows PCL without further detail
    positive_weight: PositiveFloat = 2.0
    max_iterations: PositiveInt = 2000

    @model_validator(mode="after")
    def _trains_on_something(self) -> "Config":
        if not self.shots and not self.full:
            raise ValueError("shots is empty and full is false, so nothing trains: set one of them")
        return self


def run(config: Config, subjects: Subjects, manifest: Manifest, log: Log) -> Outcome:
    """Train and score SVMs for each number of shots and each network, on the same draws."""
    split = find_test_split(config, manifest)
    several = multilabels.has_labels(manifest, split)
    view = center_view(subjects.image_size, resize=config.resize)
    tests = Dataset(name=config.dataset.name, split=split)
    train, test = (
        read_split(subjects, manifest, part, view, "low-shot", precision=config.precision)
        for part in (config.dataset, tests)
    )
    targets, _ = read_targets(manifest, config.dataset, train)
    truth, difficult = read_targets(manifest, tests, test)
    counted = ~difficult if config.difficult == "ignore" else torch.ones_like(truth)
    fewest = int(targets.sum(dim=0)[targets.any(dim=0)].min())
    shots = [k for k in config.shots if k <= fewest]
    draws = {"full": [torch.arange(len(targets))]} if config.full else {}
    for k in shots:
        draws[str(k)] = [draw(targets, train.indices, k, (config.seed, k, n)) for n in range(config.draws)]
    if not draws:
        raise ValueError(
            f"the smallest class has {fewest} images, fewer than each of shots {list(config.shots)}: lower one of them"
        )
    metrics, unconverged = {}, {}
    for name in subjects.networks:
        metrics[name], unconverged[name] = _score(
            train.by_network[name], targets, test.by_network[name], truth, counted, draws, config
        )
    hyperparameters = config.settings(
        how="fixed by the configuration",
        loss="squared hinge, one class against the rest",
        average_precision="all-point interpolation",
        labels="several per image" if several else "one per image",
        shots_left_out=[k for k in config.shots if k > fewest],  # the smallest class has fewer images
        training_images={shot: [len(rows) for rows in drawn] for shot, drawn in draws.items()},
        unconverged_fits=unconverged,
        image_size=subjects.image_size,
    )
    headline = next(iter(metrics["pretrained"]))
    return Outcome("low_shot/v1", split, metrics, hyperparameters, len(targets), len(truth), headline)


def read_targets(manifest: Manifest, dataset: Dataset, features: Features) -> tuple[Tensor, Tensor]:
    """Return (images, classes) bool twice: the classes shown, and those of which all objects are difficult."""
    if not multilabels.has_labels(manifest, dataset.split):
        shown = one_against_rest(features.labels, num_classes(manifest, dataset.split))
        return shown, torch.zeros_like(shown)
    states = multilabels.read_labels(manifest, dataset.split)
    if dataset.subset is not None:  # indices of features count the images of the subset
        states = states[draw_subset(len(states), dataset.subset, dataset.name)]
    states = torch.from_numpy(states)[features.indices]
    return states == multilabels.PRESENT, states == multilabels.DIFFICULT


def one_against_rest(labels: Tensor, classes: int) -> Tensor:
    """Return one label per image as (images, classes) bool."""
    return labels[:, None] == torch.arange(classes)


def draw(targets: Tensor, indices: Tensor, k: int, seed: Sequence[int]) -> Tensor:
    """Draw k positive images of each class independently; return the rows of all of them, each once.

    A row of `targets` (images, classes) may have several classes, as in VOC, so an image may be drawn for two of them.
    The draw depends on the images' `indices` and the seed, not on the order of the rows.
    """
    generator = np.random.default_rng(seed)
    order = indices.argsort()
    drawn = [order[targets[order, label]] for label in range(targets.shape[1])]
    drawn = [rows[torch.from_numpy(generator.permutation(len(rows))[:k])] for rows in drawn if len(rows)]
    return torch.cat(drawn).unique()


def average_precision(scores: Tensor, positive: Tensor) -> float:
    """Return the area under the envelope of precision over recall, 0-1 (all-point interpolation, VOC 2010).

    Images of equal score enter together, so that their order does not matter.
    """
    from sklearn.metrics import precision_recall_curve

    precision, recall, _ = precision_recall_curve(positive.numpy(), scores.numpy())  # recall falls from 1 to 0
    envelope = np.maximum.accumulate(precision)
    return float(-(np.diff(recall) * envelope[:-1]).sum())


def mean_average_precision(scores: Tensor, targets: Tensor, counted: Tensor | None = None) -> float:
    """Return the mean over the classes that occur in `targets` (images, classes), in percent, to four decimals.

    `counted`, of the same shape, selects the images that count for each class; default: all.
    """
    counted = torch.ones_like(targets) if counted is None else counted
    values = []
    for label in (targets & counted).any(dim=0).nonzero()[:, 0].tolist():
        rows = counted[:, label]
        values.append(average_precision(scores[rows, label], targets[rows, label]))
    return round(100 * sum(values) / len(values), 4)


def fit(rows: Tensor, targets: Tensor, config: Config) -> tuple[Tensor, int]:
    """Train one SVM per class on float64 `rows` (images, dim).

    Returns weights (classes, dim + 1), the bias last, and the number of SVMs that did not converge. A class that no
    image or every image shows gets zeros.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.svm import LinearSVC

    features = rows.numpy()
    weights, unconverged = torch.zeros(targets.shape[1], rows.shape[1] + 1, dtype=torch.float64), 0
    for label, positive in enumerate(targets.T):
        if positive.all() or not positive.any():
            continue
        machine = LinearSVC(
            C=config.cost,
            class_weight={1: config.positive_weight, -1: 1.0},
            loss="squared_hinge",
            dual=True,  # pyright: ignore[reportArgumentType]
            tol=1e-4,
            max_iter=config.max_iterations,
            random_state=config.seed,
        )
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", ConvergenceWarning)
            machine.fit(features, np.where(positive.numpy(), 1, -1))
        unconverged += any(issubclass(warning.category, ConvergenceWarning) for warning in caught)
        weights[label, :-1] = torch.from_numpy(machine.coef_[0])
        weights[label, -1] = float(np.ravel(machine.intercept_)[0])
    return weights, unconverged


def scaled(rows: Tensor) -> Tensor:
    """Divide features by their length as in PCL's code; float64."""
    return rows.double() / (rows.norm(dim=1, keepdim=True) + 1e-5)


def _logits(weights: Tensor, features: Tensor) -> Tensor:
    """Multiply raw features (n, dim) by (classes, dim + 1) weights; float64."""
    slopes, bias = weights[:, :-1].T, weights[:, -1]
    return apply_in_chunks(lambda part: scaled(part) @ slopes + bias, features, width=len(weights), dtype=torch.float64)


def _score(
    train: Tensor,
    targets: Tensor,
    test: Tensor,
    truth: Tensor,
    counted: Tensor,
    draws: dict[str, list[Tensor]],
    config: Config,
) -> tuple[dict[str, Any], int]:
    """Return mean and deviation of the mAP per number of shots, and the number of SVMs that did not converge."""
    metrics, spread, unconverged = {}, {}, 0
    for shots, drawn in draws.items():
        values = []
        for rows in drawn:
            # liblinear copies its input
            prepared = apply_in_chunks(
                lambda part: scaled(train[part]), rows, width=train.shape[1], dtype=torch.float64
            )
            weights, failed = fit(prepared, targets[rows], config)
            unconverged += failed
            values.append(mean_average_precision(_logits(weights, test), truth, counted))
        metrics[f"map_{shots}"] = round(float(np.mean(values)), 4)
        if len(values) > 1:
            spread[shots] = round(float(np.std(values, ddof=1)), 4)
    return metrics | {"std_by_shots": spread}, unconverged
