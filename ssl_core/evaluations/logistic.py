"""Transfer by logistic regression on frozen features (recipes E5: Kornblith et al., SimCLR, BYOL, ReSSL's Table 9).

Softmax regression with an l2 penalty, fitted by L-BFGS to features of center crops. The penalty is chosen from a grid
on a validation split, or on training images held out by the seed, and the classifier fitted again to both together.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import torch
from pydantic import Field, PositiveFloat, PositiveInt
from torch import Tensor

from ssl_core.config import Dataset, Strict
from ssl_core.data.shards import Manifest
from ssl_core.evaluations.parts.features import (
    CHUNK,
    Features,
    Log,
    Outcome,
    Precision,
    Subjects,
    allocate,
    center_view,
    correct,
    draw_by_class,
    find_test_split,
    fits,
    hold_out,
    in_parts,
    labelled_split,
    mean_per_class,
    num_classes,
    read_split,
)

TOLERANCE = 1e-9  # a fit ends where an iteration gains less, as a share of the objective at its start
EXACT = 2**23  # up to so many numbers features are float64: small sets become separable, where float32 stops early
# Where the papers report the mean over classes, by the card's name. Aircraft: SimCLR and BYOL do, ReSSL does not say.
MEAN_PER_CLASS = ("oxford_pets", "flowers102", "caltech101", "caltech101_background", "fgvc_aircraft")


class Config(Strict):
    """What is fitted, and how the penalty is chosen."""

    protocol: Literal["logistic"] = "logistic"
    dataset: Dataset
    test_split: str | None = None  # nothing said: test, else val
    val_split: str | None = None  # chooses the penalty; nothing said: val, if there is one beside the test split
    holdout: float = Field(default=0.2, gt=0, lt=1)  # without a val split: share of the training images that chooses
    train_per_class: PositiveInt | None = None  # Caltech-101: so many images of its one split train, the others test
    metric: Literal["top1", "mean_per_class"] | None = None  # nothing said: what the papers report for the data set
    l2_smallest: PositiveFloat = 1e-6  # SimCLR's grid; in the scale of scikit-learn's 1 / C, whose losses are summed
    l2_largest: PositiveFloat = 1e5
    l2_steps: PositiveInt = 45  # spaced evenly in the logarithm
    standardize: bool = False  # divide features by their standard deviation; moves the best penalty
    max_iterations: PositiveInt = 1000  # of one fit
    image_size: PositiveInt | None = None  # nothing said: the pre-training's; the papers have 224
    precision: Precision = "fp32"
    resize: float = Field(default=1.0, ge=1)  # shorter side before the center crop, times the image size
    interpolation: Literal["linear", "cubic"] = "cubic"
    seed: int = 0  # of the images held out, or drawn by class


class Sets(NamedTuple):
    """Features to fit and choose by, those that choose at the end, and features to test."""

    known: Features
    fitted: int  # so many of `known` fit while the penalty is chosen
    test: Features
    how: str


class Fit(NamedTuple):
    """A classifier: (classes, dim + 1) weights, the last column the bias; its objective and whether L-BFGS ended."""

    weights: Tensor
    objective: float
    converged: bool


def run(config: Config, subjects: Subjects, manifest: Manifest, log: Log) -> Outcome:
    """Choose a penalty, fit and test a classifier for each network."""
    training = config.dataset.split if config.train_per_class is None else None  # else it is divided
    split = find_test_split(manifest, config.test_split, training=training)
    sets = _read(config, subjects, manifest, split)
    classes = num_classes(manifest, config.dataset.split)
    metric = config.metric or ("mean_per_class" if manifest.dataset in MEAN_PER_CLASS else "top1")
    metrics, chosen, at_edge, unconverged = {}, {}, {}, {}
    for name in subjects.networks:
        weights, settings = fit_chosen(sets, name, classes, metric, config, subjects.device)
        logits = _logits(weights, sets.test.of[name], subjects.device)
        metrics[name] = scores(logits, sets.test.labels) | {f"validation_{metric}_by_l2": settings["validation"]}
        chosen[name], at_edge[name], unconverged[name] = (settings[key] for key in ("l2", "at_edge", "unconverged"))
    hyperparameters = {
        "l2": chosen,
        "l2_at_edge": at_edge,  # true: widen the grid
        "how": f"highest {metric} {sets.how}, then fitted to all {len(sets.known.labels)} training images",
        "l2_grid": [config.l2_smallest, config.l2_largest, config.l2_steps],
        "unconverged_fits": unconverged,
        "standardize": config.standardize,
        "image_size": subjects.image_size,
        "resize": config.resize,
        "interpolation": config.interpolation,
        "precision": config.precision,
    }
    counts = (len(sets.known.labels), len(sets.test.labels))
    return Outcome("logistic/v1", split, metrics, hyperparameters, *counts, metric)


def fit_chosen(
    sets: Sets, name: str, classes: int, metric: str, config: Config, device: str
) -> tuple[Tensor, dict[str, Any]]:
    """Return weights (classes, dim + 1) for raw features, and which penalty was chosen and how surely."""
    rows, restore = _rotate(sets.known.of[name], standardize=config.standardize)
    if fits(rows.numel()):
        rows = rows.to(device)
    labels = sets.known.labels.to(rows.device)
    fit_rows, fit_labels = rows[: sets.fitted], labels[: sets.fitted]
    held_rows, held_labels = rows[sets.fitted :], sets.known.labels[sets.fitted :]
    weights = before = rows.new_zeros(classes, rows.shape[1], dtype=torch.float64)
    best, table, unconverged = (-1.0, 0.0, weights), {}, 0
    for l2 in grid(config):  # from the strongest; the path of the weights is smooth: its next point is near this line
        starts = (weights, 2 * weights - before)
        before = weights
        weights, _, converged = fit(fit_rows, fit_labels, starts, l2, max_iterations=config.max_iterations)
        unconverged += not converged
        table[f"{l2:.4g}"] = score = scores(_products(held_rows, weights), held_labels)[metric]
        if score > best[0]:  # a tie goes to the stronger penalty
            best = (score, l2, weights)
    weights, _, converged = fit(rows, labels, [best[2]], best[1], max_iterations=config.max_iterations)
    settings = {
        "l2": best[1],
        "at_edge": config.l2_steps > 1 and best[1] in (grid(config)[0], grid(config)[-1]),
        "unconverged": unconverged + (not converged),
        "validation": table,
    }
    return restore(weights), settings


def grid(config: Config) -> list[float]:
    """List the penalties, the largest first."""
    largest, smallest = math.log10(config.l2_largest), math.log10(config.l2_smallest)
    return torch.logspace(largest, smallest, config.l2_steps, dtype=torch.float64).tolist()


def fit(rows: Tensor, labels: Tensor, starts: Sequence[Tensor], l2: float, *, max_iterations: int = 1000) -> Fit:
    """Minimise l2 / 2 ||W||^2 + the sum of cross-entropies over W (classes, dim + 1), from the best of `starts`.

    `rows` (n, dim + 1) end in a one, whose weight, the bias, is not penalised: scikit-learn's objective times l2. The
    columns should be nearly uncorrelated (`_rotate`), since L-BFGS sees each scaled by its curvature at the start; that
    changes the path to the minimum and not the minimum.
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
    weights = scaled.detach() * scale
    value, _ = objective(rows, labels, weights, penalty)
    return Fit(weights, value.item(), steps < max_iterations)


def _curvature(rows: Tensor, weights: Tensor) -> Tensor:
    """Return the diagonal of the cross-entropies' Hessian at `weights`, averaged over classes: (dim + 1,)."""
    total = torch.zeros_like(weights[0])
    for part in rows.split(CHUNK):
        shares = (weights.to(rows.dtype) @ part.T).softmax(dim=0)
        total += ((shares * (1 - shares)).mean(dim=0) @ part.square()).double()
    return total


def objective(rows: Tensor, labels: Tensor, weights: Tensor, penalty: Tensor) -> tuple[Tensor, Tensor]:
    """Return the penalised sum of cross-entropies and its gradient (classes, dim + 1), summed up in float64."""
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
    return correct(logits, labels) | {"mean_per_class": mean_per_class(logits.argmax(dim=1), labels)}


def _read(config: Config, subjects: Subjects, manifest: Manifest, split: str) -> Sets:
    """Extract features; the images that choose the penalty stand last among the known ones."""
    view = center_view(subjects.image_size, resize=config.resize, interpolation=config.interpolation)
    labelled_split(manifest, config.dataset.split)

    def features(part: str | Dataset) -> Features:
        return read_split(subjects, manifest, part, view, "logistic", precision=config.precision)

    train = features(config.dataset)
    if config.train_per_class is not None:
        train, test = _divide(train, split, config)
    else:
        test = features(split)
    validation = find_validation_split(manifest, config, split)
    if validation is not None:
        known = _join(train, features(validation))
        return Sets(known, len(train.labels), test, f"on the split '{validation}'")
    held = torch.isin(train.indices, hold_out(train.indices, config.holdout, config.seed))
    if held.all():
        raise ValueError(f"{len(train.labels)} training image is too few to hold some out")
    order = torch.cat([(~held).nonzero()[:, 0], held.nonzero()[:, 0]])
    how = f"on {int(held.sum())} training images held out by the seed"
    return Sets(_take(train, order), int((~held).sum()), test, how)


def find_validation_split(manifest: Manifest, config: Config, test_split: str) -> str | None:
    """Return the split that chooses the penalty, or None where training images are to be held out."""
    taken = {test_split, config.dataset.split}
    if config.val_split is None:
        free = "val" in manifest.splits and "val" not in taken and manifest.split("val").labelled
        return "val" if free else None
    if config.val_split in taken:
        raise ValueError(f"val_split '{config.val_split}' trains or tests already: choose another, or leave it out")
    return labelled_split(manifest, config.val_split)


def _divide(features: Features, split: str, config: Config) -> tuple[Features, Features]:
    """Draw `train_per_class` images of each class to train; the others test."""
    if split != config.dataset.split:
        raise ValueError(f"train_per_class divides one split: say `test_split: {config.dataset.split}`")
    assert config.train_per_class is not None
    most = config.train_per_class
    positions = range(len(features.labels))
    order = features.indices.argsort()  # so that the draw does not depend on how shards are shuffled
    drawn = order[draw_by_class(features.labels[order].tolist(), positions, lambda count: most, config.seed)]
    rest = torch.ones(len(order), dtype=torch.bool)
    rest[drawn] = False
    if not rest.any():
        raise ValueError(f"train_per_class {most} leaves no image of '{split}' to test: lower it")
    return _take(features, drawn), _take(features, rest.nonzero()[:, 0])


def _take(features: Features, rows: Tensor) -> Features:
    """Copy some rows, in chunks, for they may lie in a file."""
    of = {}
    for name, values in features.of.items():
        of[name] = allocate(len(rows), values.shape[1])
        for part, target in zip(rows.split(CHUNK), of[name].split(CHUNK)):
            target.copy_(values[part])
    return Features(of, features.labels[rows], features.indices[rows])


def _join(first: Features, second: Features) -> Features:
    """Put the images of one split after those of another."""
    of = {}
    for name, values in first.of.items():
        of[name] = allocate(len(values) + len(second.labels), values.shape[1])
        of[name][: len(values)] = values
        of[name][len(values) :] = second.of[name]
    labels, indices = (torch.cat([a, b]) for a, b in ((first.labels, second.labels), (first.indices, second.indices)))
    return Features(of, labels, indices)


def _rotate(features: Tensor, *, standardize: bool) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """Center features, turn them into their principal axes and append a one; also return the way back for weights.

    Neither step moves the minimum: the free bias takes up the shift, and ||W|| does not feel a rotation. Axes along
    which there cannot be any variance, beyond the number of images, are left out: their weights would be zero.
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
    """Apply (classes, dim + 1) weights to rotated `rows` (n, dim + 1), in their precision, on the CPU in the end."""
    slopes = weights.T.to(rows.dtype)
    return in_parts(lambda part: part @ slopes, rows, width=len(weights), dtype=rows.dtype)


def _logits(weights: Tensor, features: Tensor, device: str) -> Tensor:
    """Apply (classes, dim + 1) weights to raw features (n, dim), on the CPU in the end."""
    slopes, bias = weights[:, :-1].to(device), weights[:, -1].to(device)
    return in_parts(
        lambda part: part.to(device).double() @ slopes.T + bias, features, width=len(weights), dtype=torch.float64
    )
