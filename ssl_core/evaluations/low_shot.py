"""Low-shot classification with linear SVMs on frozen features (recipes E7: PCL's protocol, ReSSL's Table 11).

For each class an SVM of its own tells it from all others (one against the rest), trained on k positive images a class;
what counts is the mean over classes of the average precision on the test split. Images may show several classes (VOC).
"""

import warnings
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field, PositiveFloat, PositiveInt, model_validator
from torch import Tensor

from ssl_core.config import Dataset, Strict
from ssl_core.data import multilabels
from ssl_core.data.loader import draw_subset
from ssl_core.data.shards import Manifest
from ssl_core.evaluations.parts.features import (
    Features,
    Log,
    Outcome,
    Precision,
    Subjects,
    center_view,
    find_test_split,
    in_parts,
    labelled_split,
    num_classes,
    read_split,
)


class Config(Strict):
    """How many images train, how often they are drawn, and the SVM (PCL's code)."""

    protocol: Literal["low_shot"] = "low_shot"
    dataset: Dataset
    test_split: str | None = None  # nothing said: test, else val
    shots: tuple[PositiveInt, ...] = (4, 8, 16, 32, 64)  # positive images a class
    draws: PositiveInt = 5  # of each number of shots
    full: bool = True  # also train on all images, once
    # Test images that show a class only by objects marked as difficult: without it (PCL), or not counted (VISSL). In
    # training they are without it, in both.
    difficult: Literal["negative", "ignore"] = "negative"
    cost: PositiveFloat = 0.5  # PCL takes the best of several; ReSSL only says that it follows PCL
    positive_weight: PositiveFloat = 2.0
    max_iterations: PositiveInt = 2000
    resize: float = Field(default=1.0, ge=1)  # shorter side before the center crop, times the image size; 224: 1.143
    image_size: PositiveInt | None = None  # nothing said: the pre-training's; the papers have 224
    precision: Precision = "fp32"
    seed: int = 0  # of the draws

    @model_validator(mode="after")
    def _trains_on_something(self) -> "Config":
        if not self.shots and not self.full:
            raise ValueError("shots is empty and full is off: nothing would be trained")
        return self


def run(config: Config, subjects: Subjects, manifest: Manifest, log: Log) -> Outcome:
    """Train and score SVMs for each number of shots and each network, on the same draws."""
    split = find_test_split(manifest, config.test_split, training=config.dataset.split, several=True)
    several = multilabels.has_labels(manifest, split)
    if not (several and multilabels.has_labels(manifest, config.dataset.split)):
        labelled_split(manifest, config.dataset.split)
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
    draws = {str(k): [draw(targets, train.indices, k, (config.seed, k, n)) for n in range(config.draws)] for k in shots}
    if config.full:
        draws = {"full": [torch.arange(len(targets))]} | draws
    if not draws:
        raise ValueError(f"the smallest class has {fewest} images, fewer than each of shots {list(config.shots)}")
    metrics, unconverged = {}, {}
    for name in subjects.networks:
        metrics[name], unconverged[name] = _score(train.of[name], targets, test.of[name], truth, counted, draws, config)
    hyperparameters = {
        "how": "fixed by the configuration",
        "cost": config.cost,
        "positive_weight": config.positive_weight,
        "loss": "squared hinge, one class against the rest",
        "average_precision": "all-point interpolation",
        "labels": "several an image" if several else "one an image",
        **({"difficult": config.difficult} if several else {}),
        "draws": config.draws,
        "shots_left_out": [k for k in config.shots if k > fewest],  # some class has fewer images
        "training_images": {shot: [len(rows) for rows in drawn] for shot, drawn in draws.items()},
        "unconverged_fits": unconverged,
        "image_size": subjects.image_size,
        "resize": config.resize,
        "precision": config.precision,
    }
    headline = next(iter(metrics["pretrained"]))
    return Outcome("low_shot/v1", split, metrics, hyperparameters, len(targets), len(truth), headline)


def read_targets(manifest: Manifest, dataset: Dataset, features: Features) -> tuple[Tensor, Tensor]:
    """Return which classes each image shows, and which by difficult objects only; both (images, classes) bool."""
    if not multilabels.has_labels(manifest, dataset.split):
        shown = one_against_rest(features.labels, num_classes(manifest, dataset.split))
        return shown, torch.zeros_like(shown)
    states = multilabels.read_labels(manifest, dataset.split)
    if dataset.subset is not None:  # whose images are numbered anew
        states = states[draw_subset(len(states), dataset.subset, dataset.name)]
    states = torch.from_numpy(states)[features.indices]
    return states == multilabels.PRESENT, states == multilabels.DIFFICULT


def one_against_rest(labels: Tensor, classes: int) -> Tensor:
    """Return which classes each image shows, (images, classes) bool; with one label an image, one a row."""
    return labels[:, None] == torch.arange(classes)


def draw(targets: Tensor, indices: Tensor, k: int, seed: Sequence[int]) -> Tensor:
    """Return the rows of k positive images of each class, drawn independently, together and each once.

    `targets` (images, classes) may have several classes a row, as VOC has: then an image may be drawn for two classes.
    The draw depends on the images' `indices` and the seed, not on their order.
    """
    generator = np.random.default_rng(seed)
    order = indices.argsort()
    drawn = [order[targets[order, label]] for label in range(targets.shape[1])]
    drawn = [rows[torch.from_numpy(generator.permutation(len(rows))[:k])] for rows in drawn if len(rows)]
    return torch.cat(drawn).unique()


def average_precision(scores: Tensor, positive: Tensor) -> float:
    """Return the area under the precision envelope over recall, 0-1 (VOC 2010's all-point interpolation).

    Images of equal score are counted together, so that their order does not matter.
    """
    scores, order = scores.sort(descending=True)
    hits = positive[order].double().cumsum(dim=0)
    last = torch.cat([scores[1:] != scores[:-1], torch.ones(1, dtype=torch.bool)])  # of those of equal score
    ranks = torch.arange(1, len(scores) + 1)
    precision, recall = (hits / ranks)[last], (hits / hits[-1])[last]
    envelope = precision.flip(0).cummax(dim=0).values.flip(0)
    return (recall.diff(prepend=torch.zeros(1, dtype=recall.dtype)) * envelope).sum().item()


def mean_average_precision(scores: Tensor, targets: Tensor, counted: Tensor | None = None) -> float:
    """Return the mean over the classes that `targets` (images, classes) show, in percent, to four decimals.

    `counted`, of the same shape, says which images count for which class; all without it.
    """
    counted = torch.ones_like(targets) if counted is None else counted
    present = (targets & counted).any(dim=0).nonzero()[:, 0].tolist()
    values = [
        average_precision(scores[rows, label], targets[rows, label])
        for label, rows in ((label, counted[:, label]) for label in present)
    ]
    return round(100 * sum(values) / len(values), 4)


def fit(rows: Tensor, targets: Tensor, config: Config) -> tuple[Tensor, int]:
    """Train an SVM a class on float64 `rows` (images, dim).

    Returns weights (classes, dim + 1), the bias last, and how many did not converge. A class that is shown by none or
    by all of the images gets zeros.
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
    """Divide features by their length, as PCL's code does it; float64."""
    return rows.double() / (rows.norm(dim=1, keepdim=True) + 1e-5)


def _logits(weights: Tensor, features: Tensor) -> Tensor:
    """Apply (classes, dim + 1) weights to raw features (n, dim); float64."""
    slopes, bias = weights[:, :-1].T, weights[:, -1]
    return in_parts(lambda part: scaled(part) @ slopes + bias, features, width=len(weights), dtype=torch.float64)


def _score(
    train: Tensor,
    targets: Tensor,
    test: Tensor,
    truth: Tensor,
    counted: Tensor,
    draws: dict[str, list[Tensor]],
    config: Config,
) -> tuple[dict[str, Any], int]:
    """Return mean and spread of the mAP by the number of shots, and the number of SVMs that did not converge."""
    metrics, spread, unconverged = {}, {}, 0
    for shots, drawn in draws.items():
        values = []
        for rows in drawn:
            # liblinear makes a copy of its own
            prepared = in_parts(lambda part: scaled(train[part]), rows, width=train.shape[1], dtype=torch.float64)
            weights, failed = fit(prepared, targets[rows], config)
            unconverged += failed
            values.append(mean_average_precision(_logits(weights, test), truth, counted))
        metrics[f"map_{shots}"] = round(float(np.mean(values)), 4)
        if len(values) > 1:
            spread[shots] = round(float(np.std(values, ddof=1)), 4)
    return metrics | {"std_by_shots": spread}, unconverged
