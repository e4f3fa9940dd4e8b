import numpy as np
import pytest
import torch
from sklearn.svm import LinearSVC

from ssl_core.evaluations.low_shot import (
    Config,
    average_precision,
    draw,
    fit,
    mean_average_precision,
    one_against_rest,
    run,
)

from .conftest import SQUARES, quiet


@pytest.mark.parametrize(
    ("positive", "expected"),
    [
        ([1, 1, 0, 0], 1.0),
        ([0, 1, 0, 1], 0.5),  # precision 1/2 at both recalls
        ([1, 0, 0, 1, 1], 1 / 3 + 2 / 3 * 3 / 5),  # 2/4 at recall 2/3 is lifted to the 3/5 behind it
        ([0, 0, 0, 1], 0.25),
    ],
)
def test_average_precision_interpolates_at_all_points(positive, expected):
    scores = torch.linspace(1, 0, len(positive))
    assert average_precision(scores, torch.tensor(positive).bool()) == pytest.approx(expected)


def brute_force(scores: np.ndarray, positive: np.ndarray) -> float:
    """All-point interpolation as in VOC's development kit: at each recall the best precision from there on."""
    values = []
    for wanted in range(1, positive.sum() + 1):
        reached = [positive[scores >= cut] for cut in scores]
        values.append(max(found.mean() for found in reached if found.sum() >= wanted))
    return float(np.mean(values))


def test_average_precision_agrees_with_brute_force():
    generator = np.random.default_rng(0)
    for _ in range(20):
        scores = generator.integers(0, 12, 30) / 12  # with ties
        positive = generator.random(30) < 0.4
        found = average_precision(torch.from_numpy(scores), torch.from_numpy(positive))
        assert found == pytest.approx(brute_force(scores, positive))


def test_equal_scores_give_the_share_of_positives_in_any_order():
    positive = torch.tensor([1, 1, 0, 0, 0]).bool()
    assert average_precision(torch.zeros(5), positive) == average_precision(torch.zeros(5), positive.flip(0)) == 0.4


def test_classes_that_no_test_image_shows_do_not_count():
    targets = one_against_rest(torch.tensor([0, 0, 2]), 3)
    scores = torch.tensor([[1.0, 9.0, 0.0], [1.0, 9.0, 0.0], [0.0, 9.0, 1.0]])
    assert mean_average_precision(scores, targets) == 100.0


def test_a_draw_has_k_of_each_class_and_does_not_depend_on_the_order_of_the_shards():
    labels, indices = torch.arange(40) % 4, torch.arange(40)
    rows = draw(one_against_rest(labels, 4), indices, 3, (0, 3, 1))
    assert labels[rows].bincount().tolist() == [3, 3, 3, 3]
    shuffled = torch.randperm(40)
    again = draw(one_against_rest(labels[shuffled], 4), indices[shuffled], 3, (0, 3, 1))
    assert set(indices[shuffled][again].tolist()) == set(rows.tolist())
    assert set(draw(one_against_rest(labels, 4), indices, 3, (0, 3, 2)).tolist()) != set(rows.tolist())


def test_an_image_of_two_classes_may_be_drawn_for_both_and_trains_once():
    targets = torch.tensor([[1, 1], [0, 0]]).bool()
    assert draw(targets, torch.arange(2), 1, (0,)).tolist() == [0]


def test_an_svm_is_trained_for_each_class_as_pcl_does():
    generator = torch.Generator().manual_seed(0)
    rows, labels = torch.randn(60, 5, generator=generator), torch.arange(60) % 3
    weights, unconverged = fit(rows, one_against_rest(labels, 3), Config(dataset=SQUARES))
    for label in range(3):
        # The primal problem has the same minimum; liblinear solves it by other means.
        primal = LinearSVC(C=0.5, class_weight={1: 2.0, -1: 1.0}, dual=False, tol=1e-8, max_iter=10000)  # pyright: ignore
        primal.fit(rows.double().numpy(), np.where(labels.numpy() == label, 1, -1))
        assert weights[label, :-1].numpy() == pytest.approx(primal.coef_[0], abs=1e-3)
        assert weights[label, -1:].numpy() == pytest.approx(primal.intercept_, abs=1e-3)
    assert unconverged == 0


def test_svms_that_do_not_converge_are_counted():
    rows, labels = torch.randn(60, 5), torch.arange(60) % 3
    assert fit(rows, one_against_rest(labels, 3), Config(dataset=SQUARES, max_iterations=1))[1] == 3


def test_colours_are_told_apart_by_few_shots(subjects, manifest):
    outcome = run(Config(dataset=SQUARES, shots=(2, 4, 64), draws=3), subjects, manifest, quiet)
    pixels = outcome.metrics["pixels"]
    assert list(pixels) == ["map_full", "map_2", "map_4", "std_by_shots"]
    assert pixels["map_full"] == pixels["map_4"] == 100.0
    assert outcome.headline == "map_full"
    assert outcome.hyperparameters["shots_left_out"] == [64]  # a class has 20 images
    assert outcome.hyperparameters["training_images"] == {"full": [60], "2": [6, 6, 6], "4": [12, 12, 12]}
    assert list(pixels["std_by_shots"]) == ["2", "4"]


def test_too_many_shots_without_full_are_a_clear_error(subjects, manifest):
    with pytest.raises(ValueError, match=r"the smallest class has 20 images, fewer than each of shots \[64\]"):
        run(Config(dataset=SQUARES, shots=(64,), full=False), subjects, manifest, quiet)
