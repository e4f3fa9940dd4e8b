from typing import Any

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from ssl_core.data.shards import Manifest
from ssl_core.evaluations import logistic
from ssl_core.evaluations.logistic import Config, Sets, fit, fit_chosen, grid, objective, run
from ssl_core.evaluations.parts.features import Features

from .conftest import SQUARES, quiet

SHORT = {"l2_steps": 5, "l2_smallest": 1e-2, "l2_largest": 1e2}


def problem(images=400, dim=12, classes=5, seed=0) -> tuple[Tensor, Tensor]:
    """Overlapping classes, correlated features of very different size, far from zero."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, classes, (images,), generator=generator)
    rows = torch.randn(classes, dim, generator=generator)[labels] + torch.randn(images, dim, generator=generator)
    mixing = torch.randn(dim, dim, generator=generator) * torch.logspace(0.5, -1.5, dim)
    return rows @ mixing + 3, labels


def penalised(weights: np.ndarray, bias: Any, rows: Tensor, labels: Tensor, l2: float) -> float:
    """l2 / 2 ||W||^2 + the summed cross-entropy, in float64 NumPy."""
    logits = rows.double().numpy() @ weights.T + bias
    shifted = logits - logits.max(axis=1, keepdims=True)
    losses = np.log(np.exp(shifted).sum(axis=1)) - shifted[np.arange(len(labels)), labels.numpy()]
    return losses.sum() + l2 / 2 * (weights**2).sum()


def oracle(rows: Tensor, labels: Tensor, l2: float) -> LogisticRegression:
    """Fit scikit-learn's by Newton steps, which end closer to the minimum than its L-BFGS."""
    return LogisticRegression(C=1 / l2, solver="newton-cholesky", tol=1e-9, max_iter=1000).fit(
        rows.double().numpy(), labels.numpy()
    )


def minimum(rows: Tensor, labels: Tensor, l2: float) -> float:
    """Return the objective at scikit-learn's solution."""
    other = oracle(rows, labels, l2)
    return penalised(other.coef_, other.intercept_, rows, labels, l2)


def fitted(rows, labels, l2, classes=5, **options):
    rotated, restore = logistic._rotate(rows, standardize=False)
    start = torch.zeros(classes, rotated.shape[1], dtype=torch.float64)
    found = fit(rotated, labels, [start], l2, **options)
    return found, restore(found.weights).numpy()


def objective_of(rows, labels, weights, l2):
    """Return the objective of weights for rotated rows."""
    penalty = torch.full_like(weights[0], l2)
    penalty[-1] = 0
    return objective(rows, labels, weights, penalty)[0].item()


@pytest.mark.parametrize("l2", [1e3, 1.0, 1e-2, 1e-4])
def test_the_objective_equals_that_of_scikit_learn(l2):
    rows, labels = problem()
    found, weights = fitted(rows, labels, l2)
    expected = minimum(rows, labels, l2)
    assert found.converged
    assert penalised(weights[:, :-1], weights[:, -1], rows, labels, l2) == pytest.approx(expected, rel=1e-4)


def test_features_in_float32_reach_the_same_objective(monkeypatch):
    rows, labels = problem()
    _, double = fitted(rows, labels, 0.1)
    monkeypatch.setattr(logistic, "EXACT", 0)
    monkeypatch.setattr(logistic, "CHUNK", 37)
    _, single = fitted(rows, labels, 0.1)
    values = [penalised(weights[:, :-1], weights[:, -1], rows, labels, 0.1) for weights in (single, double)]
    assert values[0] == pytest.approx(values[1], rel=1e-6)


def test_the_path_of_warm_starts_ends_at_the_objective_of_scikit_learn(monkeypatch):
    rows, labels = problem(images=120, dim=20)
    config = Config(dataset=SQUARES)
    rotated, _ = logistic._rotate(rows, standardize=False)
    weights = before = torch.zeros(5, rotated.shape[1], dtype=torch.float64)
    for l2 in grid(config)[:33]:  # down to 5e-4, where these classes are all but separated
        starts = (weights, 2 * weights - before)
        before = weights
        weights, _ = fit(rotated, labels, starts, l2)
    assert objective_of(rotated, labels, weights, l2) == pytest.approx(minimum(rows, labels, l2), rel=1e-4)


def test_fewer_images_than_features_lose_nothing_by_the_rotation():
    rows, labels = problem(images=30, dim=50)
    rotated, _ = logistic._rotate(rows, standardize=False)
    assert rotated.shape == (30, 30)  # 29 axes and the one
    _, weights = fitted(rows, labels, 1.0)
    expected = minimum(rows, labels, 1.0)
    assert penalised(weights[:, :-1], weights[:, -1], rows, labels, 1.0) == pytest.approx(expected, rel=1e-4)


def test_standardised_features_are_penalised_by_their_deviation():
    rows, labels = problem()
    rotated, restore = logistic._rotate(rows, standardize=True)
    start = torch.zeros(5, rotated.shape[1], dtype=torch.float64)
    found = fit(rotated, labels, [start], 1.0)
    standard = (rows - rows.mean(dim=0)) / rows.std(dim=0, correction=0)
    other = oracle(standard, labels, 1.0)
    expected = penalised(other.coef_, other.intercept_, standard, labels, 1.0)
    assert objective_of(rotated, labels, found.weights, 1.0) == pytest.approx(expected, rel=1e-5)
    weights = restore(found.weights).numpy()
    assert weights[:, :-1] == pytest.approx(other.coef_ / rows.std(dim=0, correction=0).numpy(), abs=1e-2)


def test_the_gradient_is_that_of_autograd():
    rows, labels = problem(images=20, dim=3)
    rows = torch.cat([rows, torch.ones(20, 1)], dim=1).double()
    weights = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    penalty = torch.tensor([0.5, 0.5, 0.5, 0.0], dtype=torch.float64)
    loss = torch.nn.functional.cross_entropy(rows @ weights.T, labels, reduction="sum")
    expected = loss + 0.25 * weights[:, :-1].square().sum()
    (gradient,) = torch.autograd.grad(expected, [weights])
    value, found = objective(rows, labels, weights.detach(), penalty)
    torch.testing.assert_close(value, expected.detach())
    torch.testing.assert_close(found, gradient)


def test_the_grid_is_simclrs():
    penalties = grid(Config(dataset=SQUARES))
    assert (len(penalties), penalties[0], penalties[-1]) == (45, pytest.approx(1e5), pytest.approx(1e-6))


def test_the_best_penalty_is_the_one_of_the_highest_validation_score():
    rows, labels = problem(images=600, classes=5)
    features = Features({"network": rows[:400]}, labels[:400], torch.arange(400))
    config = Config(dataset=SQUARES, l2_steps=9, l2_smallest=1e-4, l2_largest=1e4)
    sets = Sets(features, 300, features, "")
    _, settings = fit_chosen(sets, "network", 5, "top1", config, "cpu")
    scores = {}
    for l2 in grid(config):
        other = oracle(rows[:300], labels[:300], l2)
        hits = other.predict(rows[300:400].double().numpy()) == labels[300:400].numpy()
        scores[l2] = 100 * np.mean(hits)
    assert list(settings["validation"].values()) == pytest.approx(list(scores.values()))
    assert settings["l2"] == max(scores, key=lambda l2: scores[l2])
    assert settings["unconverged"] == 0


def test_a_penalty_at_the_edge_of_the_grid_is_reported():
    rows, labels = problem()
    features = Features({"network": rows}, labels, torch.arange(400))
    config = Config(dataset=SQUARES, l2_steps=2, l2_smallest=1e-1, l2_largest=1.0)
    assert fit_chosen(Sets(features, 300, features, ""), "network", 5, "top1", config, "cpu")[1]["at_edge"]


def test_a_fit_that_ran_out_of_iterations_is_counted():
    rows, labels = problem()
    assert not fitted(rows, labels, 1e-4, max_iterations=3)[0].converged


def test_colours_are_told_apart(subjects, manifest):
    outcome = run(Config(dataset=SQUARES, **SHORT), subjects, manifest, quiet)
    assert outcome.metrics["pixels"]["top1"] == outcome.metrics["pixels"]["mean_per_class"] == 100.0
    assert (outcome.num_train, outcome.num_test, outcome.split, outcome.headline) == (60, 31, "test", "top1")
    assert "on 12 training images held out by the seed" in outcome.hyperparameters["how"]


def with_split(manifest: Manifest, name: str, of: str) -> Manifest:
    """The same shards, one split known by a further name."""
    other = manifest.model_copy(update={"splits": {**manifest.splits, name: manifest.splits[of]}})
    other._folder = manifest.folder
    return other


def test_a_validation_split_chooses_and_then_trains_too(subjects, manifest):
    outcome = run(Config(dataset=SQUARES, **SHORT), subjects, with_split(manifest, "val", "test"), quiet)
    assert "on the split 'val'" in outcome.hyperparameters["how"]
    assert outcome.num_train == 91


def test_the_images_of_one_split_can_be_divided_by_class(subjects, manifest):
    config = Config(dataset=SQUARES, test_split="train", train_per_class=7, **SHORT)
    outcome = run(config, subjects, manifest, quiet)
    assert (outcome.num_train, outcome.num_test) == (21, 39)
    assert outcome.metrics["pixels"]["top1"] == 100.0


def test_data_sets_whose_papers_average_over_classes_do(subjects, manifest):
    pets = manifest.model_copy(update={"dataset": "oxford_pets"})
    pets._folder = manifest.folder
    assert run(Config(dataset=SQUARES, **SHORT), subjects, pets, quiet).headline == "mean_per_class"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"test_split": "train"}, "split 'train' trains and tests"),
        ({"val_split": "test"}, "val_split 'test' trains or tests already"),
        ({"train_per_class": 5}, "set `test_split: train`"),
        ({"train_per_class": 20, "test_split": "train"}, "leaves no image of 'train' to test"),
    ],
)
def test_splits_that_cannot_be_used_are_a_clear_error(subjects, manifest, options, message):
    with pytest.raises(ValueError, match=message):
        run(Config(dataset=SQUARES, **SHORT, **options), subjects, manifest, quiet)
