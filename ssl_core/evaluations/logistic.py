"""Transfer by logistic regression on frozen features, as in Kornblith et al., SimCLR, BYOL and ReSSL's Table 9.

Softmax regression with an l2 penalty, fitted by L-BFGS to features of center crops. The penalty is chosen from a grid
on a validation split, or on training images held out by the seed; then the classifier is fitted again to both sets.
Source: docs/sources.md#logistic-regression.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from pydantic import Field, PositiveFloat, PositiveInt
from torch import Tensor

from ssl_core.config import Dataset
from ssl_core.data.shards import Manifest
from ssl_core.evaluations.base import FrozenConfig, Log, Outcome, Subjects, find_test_split
from ssl_core.evaluations.parts.features import (
    CHUNK,
    Features,
    accuracies,
    allocate,
    apply_in_chunks,
    center_view,
    draw_by_class,
    fits_in_memory,
    hold_out,
    mean_per_class,
    num_classes,
    read_split,
)
from ssl_core.experiments.needs import ANY, Contract, Needs

TOLERANCE = 1e-9  # a fit ends when an iteration gains less than this share of the first objective
EXACT = 2**23  # up to this many numbers features are float64: small sets become separable, and float32 stops early
# Data sets for which the papers report the mean over classes. Aircraft: SimCLR and BYOL do, ReSSL does not specify.
MEAN_PER_CLASS = ("oxford_pets", "flowers102", "caltech101", "caltech101_background", "fgvc_aircraft")


class Config(FrozenConfig):
    """What is fitted, and how the penalty is chosen. The seed draws the held-out images and those drawn by class."""

    contract: ClassVar = Contract(needs_by_key={"train_per_class": {ANY: Needs(test_split="same")}})

    protocol: Literal["logistic"] = "logistic"
    val_split: str | None = None  # chooses the penalty; default: val, if the data set has one beside the test split
    holdout: float = Field(default=0.2, gt=0, lt=1)  # without a val split: share of the training images that chooses
    train_per_class: PositiveInt | None = None  # divides one split: this many images per class train, the others test
    metric: Literal["top1", "mean_per_class"] | None = None  # default: the metric of the papers for the data set
    l2_smallest: PositiveFloat = 1e-6  # SimCLR's grid; in the scale of scikit-learn's 1 / C, whose losses are summed
    l2_largest: PositiveFloat = 1e5
    l2_steps: PositiveInt = 45  # spaced evenly in the logarithm
    standardize: bool = False  # divide features by their standard deviation; moves the best penalty
    max_iterations: PositiveInt = 1000  # of one fit
    interpolation: Literal["linear", "cubic"] = "cubic"


class Sets(NamedTuple):
    """Features that train and features that test; the last rows of the first choose the penalty."""

    train: Features
    num_fitted: int  # the first rows of `train`, which fit while the penalty is chosen
    test: Features
    how: str  # which images choose, for the results


class Fit(NamedTuple):
    """A classifier: (classes, dim + 1) weights, the last column the bias; whether L-BFGS converged."""

    weights: Tensor
    converged: bool


def run(config: Config, subjects: Subjects, manifest: Manifest, log: Log) -> Outcome:
    """Choose a penalty, fit and test a classifier for each network."""
    split = find_test_split(config, manifest)
    sets = _read(config, subjects, manifest, split)
    classes = num_classes(manifest, config.dataset.split)
    metric = config.metric or ("mean_per_class" if manifest.dataset in MEAN_PER_CLASS else "top1")
    metrics, chosen, at_edge, unconverged = {}, {}, {}, {}
    for name in subjects.networks:
        weights, settings = fit_chosen(sets, name, classes, metric, config, subjects.device)
        logits = _logits(weights, sets.test.by_network[name], subjects.device)
        metrics[name] = scores(logits, sets.test.labels) | {f"validation_{metric}_by_l2": settings["validation"]}
        chosen[name], at_edge[name], unconverged[name] = (settings[key] for key in ("l2", "at_edge", "unconverged"))
    num_train = len(sets.train.labels)
    hyperparameters = config.settings(
        metric=metric,
        l2=chosen,
        l2_at_edge=at_edge,  # true: widen the grid
        how=f"highest {metric} {sets.how}, then fitted to all {num_train} training images",
        unconverged_fits=unconverged,
        image_size=subjects.image_size,
    )
    return Outcome("logistic/v1", split, metrics, hyperparameters, num_train, len(sets.test.labels), metric)


def fit_chosen(
    sets: Sets, name: str, classes: int, metric: str, config: Config, device: str
) -> tuple[Tensor, dict[str, Any]]:
    """Return weights (classes, dim + 1) for raw features; and the chosen penalty with the scores that chose it."""
    rows, restore = _rotate(sets.train.by_network[name], standardize=config.standardize)
    if fits_in_memory(rows.numel()):
        rows = rows.to(device)
    labels = sets.train.labels.to(rows.device)
    fit_rows, fit_labels = rows[: sets.num_fitted], labels[: sets.num_fitted]
    held_rows, held_labels = rows[sets.num_fitted :], sets.train.labels[sets.num_fitted :]
    weights = before = rows.new_zeros(classes, rows.shape[1], dtype=torch.float64)
    best, table, unconverged = (-1.0, 0.0, weights), {}, 0
    for l2 in grid(config):  # from the strongest; the weights move smoothly, so the line through two is a good start
        starts = (weights, 2 * weights - before)
        before = weights
        weights, converged = fit(fit_rows, fit_labels, starts, l2, max_iterations=config.max_iterations)
        unconverged += not converged
        table[f"{l2:.4g}"] = score = scores(_products(held_rows, weights), held_labels)[metric]
        if score > best[0]:  # a tie goes to the stronger penalty
            best = (score, l2, weights)
    weights, converged = fit(rows, labels, [best[2]], best[1], max_iterations=config.max_iterations)
    settings = {
        "l2": best[1],
        "at_edge": config.l2_steps > 1 and best[1] in (grid(config)[0], grid(config)[-1]),
        "unconverged": unconverged + (not converged),
        "validation": table,
    }
    return restore(weights), settings


def grid(config: Config) -> list[float]:
    """Return the penalties, the largest first."""
    largest, smallest = math.log10(config.l2_largest), math.log10(config.l2_smallest)
    return torch.logspace(largest, smallest, config.l2_steps, dtype=torch.float64).tolist()


def fit(rows: Tensor, labels: Tensor, starts: Sequence[Tensor], l2: float, *, max_iterations: int = 1000) -> Fit:
    """Minimise l2 / 2 ||W||^2 + the sum of cross-entropies over W (classes, dim + 1), from the best of `starts`.

    Each of `rows` (n, dim + 1) ends in a one, whose weight is the bias. The bias is not penalised, so this is
    scikit-learn's objective times l2. L-BFGS scales each column by its curvature at the start, which works well where
    columns are nearly uncorrelated (`_rotate`); it changes the path to the minimum, not the minimum.
    """
    penalty = torch.full_like(starts[0][0], l2)
    penalty[-1] = 0
    values = [objective(rows, labels, weights, penalty)[0].item() for weights in starts]
    unit, start = min(zip(values, starts), key=lambda pair: pair[0])
    scale = (penalty + _curvature(rows, start)).clamp_min(1e-30).rsqrt()
    scaled = (start / scale).requires_grad_()
    optimizer = torch.optim.LBFGS(
        [scaled],
        max_iter=max_iterations,
        max_eval=2 * max_iterations,
        history_size=20,
        tolerance_grad=0,
        tolerance_change=TOLERANCE,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        value, gradient = objective(rows, labels, scaled.detach() * scale, penalty)
        scaled.grad = gradient * scale / unit
        return value / unit

    optimizer.step(closure)  # pyright: ignore[reportArgumentType]
    steps = optimizer.state[scaled]["n_iter"]
    return Fit(scaled.detach() * scale, steps < max_iterations)


def _curvature(rows: Tensor, weights: Tensor) -> Tensor:
    """Return the diagonal of the cross-entropies' Hessian at `weights`, averaged over classes: (dim + 1,)."""
    total = torch.zeros_like(weights[0])
    for part in rows.split(CHUNK):
        shares = (weights.to(rows.dtype) @ part.T).softmax(dim=0)
        total += ((shares * (1 - shares)).mean(dim=0) @ part.square()).double()
    return total


def objective(rows: Tensor, labels: Tensor, weights: Tensor, penalty: Tensor) -> tuple[Tensor, Tensor]:
    """Return the penalised sum of cross-entropies and its gradient (classes, dim + 1), summed in float64."""
    value = (penalty * weights.square()).sum() / 2
    gradient = penalty * weights
    single = weights.to(rows.dtype)
    for part, truth in zip(rows.split(CHUNK), labels.split(CHUNK)):
        logits = single @ part.T  # (classes, images): several times faster on CPUs than its transpose
        normalizer = logits.logsumexp(dim=0)
        value = value + (normalizer - logits.gather(0, truth[None])[0]).sum(dtype=torch.float64)
        residual = logits.sub_(normalizer).exp_()
        residual.scatter_add_(0, truth[None], residual.new_full((1, len(truth)), -1.0))
        gradient = gradient + (residual @ part).double()
    return value, gradient


def scores(logits: Tensor, labels: Tensor) -> dict[str, float]:
    """Return accuracies of (images, classes), over images and averaged over classes."""
    return accuracies(logits, labels) | {"mean_per_class": mean_per_class(logits.argmax(dim=1), labels)}


def _read(config: Config, subjects: Subjects, manifest: Manifest, split: str) -> Sets:
    """Extract the features that train, those that choose the penalty last, and the features that test."""
    view = center_view(subjects.image_size, resize=config.resize, interpolation=config.interpolation)

    def features(part: str | Dataset) -> Features:
        return read_split(subjects, manifest, part, view, "logistic", precision=config.precision)

    train = features(config.dataset)
    if config.train_per_class is not None:
        train, test = _divide(train, split, config)
    else:
        test = features(split)
    validation = find_validation_split(manifest, config, split)
    if validation is not None:
        both = _concatenate(train, features(validation))
        return Sets(both, len(train.labels), test, f"on the split '{validation}'")
    held = torch.isin(train.indices, hold_out(train.indices, config.holdout, config.seed))
    if held.all():
        raise ValueError(f"found {len(train.labels)} training image, expected two or more to hold one out: add images")
    order = torch.cat([(~held).nonzero()[:, 0], held.nonzero()[:, 0]])
    how = f"on {int(held.sum())} training images held out by the seed"
    return Sets(_take(train, order), int((~held).sum()), test, how)


def find_validation_split(manifest: Manifest, config: Config, test_split: str) -> str | None:
    """Return the split that chooses the penalty, or None if training images are held out instead."""
    taken = {test_split, config.dataset.split}
    if config.val_split is None:
        free = "val" in manifest.splits and "val" not in taken and manifest.split("val").labelled
        return "val" if free else None
    if config.val_split in taken:
        raise ValueError(f"val_split '{config.val_split}' trains or tests already: choose another, or leave it out")
    if not manifest.split(config.val_split).labelled:
        raise ValueError(f"val_split '{config.val_split}' has no labels: choose another, or leave it out")
    return config.val_split


def _divide(features: Features, split: str, config: Config) -> tuple[Features, Features]:
    """Draw `train_per_class` images of each class to train; the others test."""
    assert config.train_per_class is not None
    per_class = config.train_per_class
    positions = range(len(features.labels))
    order = features.indices.argsort()  # so that the draw does not depend on the order of the shards
    drawn = order[draw_by_class(features.labels[order].tolist(), positions, lambda _: per_class, config.seed)]
    rest = torch.ones(len(order), dtype=torch.bool)
    rest[drawn] = False
    if not rest.any():
        raise ValueError(f"train_per_class {per_class} leaves no image of '{split}' to test: lower it")
    return _take(features, drawn), _take(features, rest.nonzero()[:, 0])


def _take(features: Features, rows: Tensor) -> Features:
    """Copy some rows, in chunks because features may be in a file."""
    by_network = {}
    for name, values in features.by_network.items():
        by_network[name] = allocate(len(rows), values.shape[1])
        for part, target in zip(rows.split(CHUNK), by_network[name].split(CHUNK)):
            target.copy_(values[part])
    return Features(by_network, features.labels[rows], features.indices[rows])


def _concatenate(first: Features, second: Features) -> Features:
    """Append the images of the second split to those of the first."""
    by_network = {}
    for name, values in first.by_network.items():
        by_network[name] = allocate(len(values) + len(second.labels), values.shape[1])
        by_network[name][: len(values)] = values
        by_network[name][len(values) :] = second.by_network[name]
    labels = torch.cat([first.labels, second.labels])
    indices = torch.cat([first.indices, second.indices])
    return Features(by_network, labels, indices)


def _rotate(features: Tensor, *, standardize: bool) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """Center features, rotate them to their principal axes and append a one; also return the inverse for weights.

    Neither step moves the minimum: the bias, which is free, absorbs the shift, and a rotation keeps ||W||. With fewer
    images than features the axes without variance are left out, because their weights would be zero.
    """
    count, dim = features.shape
    dtype = torch.float64 if features.numel() <= EXACT else torch.float32
    parts = features.split(CHUNK)
    mean = sum((part.sum(dim=0, dtype=torch.float64) for part in parts), torch.zeros(dim)).div(count)
    scatter = torch.zeros(dim, dim, dtype=torch.float64)
    for part in parts:
        centered = (part - mean).to(dtype)
        scatter += centered.T @ centered
    deviation = (scatter.diagonal() / count).sqrt() if standardize else torch.ones(dim, dtype=torch.float64)
    inverse = torch.where(deviation > 0, 1 / deviation, 0)
    _, axes = torch.linalg.eigh(scatter * inverse[:, None] * inverse)
    axes = axes[:, -max(1, min(dim, count - 1)) :] * inverse[:, None]  # (dim, kept); orthonormal unless standardised
    columns = axes.shape[1] + 1
    rows = allocate(count, columns) if dtype == torch.float32 else torch.empty(count, columns, dtype=dtype)
    for part, target in zip(parts, rows.split(CHUNK)):
        target[:, :-1] = (part - mean).to(dtype) @ axes.to(dtype)
        target[:, -1] = 1

    def restore(weights: Tensor) -> Tensor:
        weights = weights.cpu().double()
        slopes = weights[:, :-1] @ axes.T
        return torch.cat([slopes, weights[:, -1:] - slopes @ mean[:, None]], dim=1)

    return rows, restore


def _products(rows: Tensor, weights: Tensor) -> Tensor:
    """Multiply rotated `rows` (n, dim + 1) by (classes, dim + 1) weights in the rows' precision; return on the CPU."""
    slopes = weights.T.to(rows.dtype)
    return apply_in_chunks(lambda part: part @ slopes, rows, width=len(weights), dtype=rows.dtype)


def _logits(weights: Tensor, features: Tensor, device: str) -> Tensor:
    """Multiply raw features (n, dim) by (classes, dim + 1) weights; return on the CPU."""
    slopes, bias = weights[:, :-1].to(device), weights[:, -1].to(device)
    return apply_in_chunks(
        lambda part: part.to(device).double() @ slopes.T + bias, features, width=len(weights), dtype=torch.float64
    )
