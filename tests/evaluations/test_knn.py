import math

import numpy as np
import pytest
import torch

from ssl_core.evaluations.base import Subjects
from ssl_core.evaluations.knn import (
    BEST_K,
    Config,
    _largest,
    _score_best,
    _score_weighted,
    into_space,
    neighbours,
    run,
    unit,
    vote_weights,
    votes,
)
from ssl_core.evaluations.parts.features import Features

from .conftest import MEAN, SQUARES, STD, quiet


@pytest.fixture
def rows():
    generator = torch.Generator().manual_seed(0)
    bank, queries = torch.randn(90, 6, generator=generator) + 1, torch.randn(17, 6, generator=generator) + 1
    return (
        bank,
        queries,
        torch.randint(0, 4, (90,), generator=generator),
        torch.randint(0, 4, (17,), generator=generator),
    )


def make_features(rows, labels):
    return Features({"pretrained": rows}, labels, torch.arange(len(labels)))


def oracle(bank, queries, labels, k, *, temperature=None):
    """Classify in float64 NumPy, one query at a time; Euclidean and unweighted without a temperature."""
    bank, queries, labels = bank.double().numpy(), queries.double().numpy(), labels.numpy()
    predictions = []
    for query in queries:
        if temperature is None:
            order, weights = np.argsort(((bank - query) ** 2).sum(1), kind="stable")[:k], np.ones(len(bank))
        else:
            cosine = bank @ query / np.linalg.norm(bank, axis=1) / np.linalg.norm(query)
            order, weights = np.argsort(-cosine, kind="stable")[:k], np.exp(cosine / temperature)
        scores = [weights[order][labels[order] == label].sum() for label in range(4)]
        predictions.append(int(np.argmax(scores)))
    return np.array(predictions)


@pytest.mark.parametrize("k", [1, 5, 90])
@pytest.mark.parametrize("temperature", [0.07, 1.0])
def test_weighted_knn_agrees_with_brute_force(rows, k, temperature):
    bank, queries, labels, truth = rows
    config = Config(dataset=SQUARES, k=k, temperature=temperature)
    subjects = Subjects({"pretrained": torch.nn.Identity()}, 16, MEAN, STD)
    metrics, _ = _score_weighted(config, subjects, make_features(bank, labels), make_features(queries, truth), 4)
    hits = oracle(bank, queries, labels, k, temperature=temperature) == truth.numpy()
    assert metrics["pretrained"]["top1"] == pytest.approx(100 * hits.mean(), abs=1e-3)


def test_best_nn_agrees_with_brute_force_and_states_that_k_is_chosen_on_test(rows):
    bank, queries, labels, truth = rows
    subjects = Subjects({"pretrained": torch.nn.Identity()}, 16, MEAN, STD)
    metrics, settings = _score_best(
        Config(dataset=SQUARES, variant="best"), subjects, make_features(bank, labels), make_features(queries, truth), 4
    )
    expected = {k: 100 * (oracle(bank, queries, labels, k) == truth.numpy()).mean() for k in BEST_K if k <= 90}
    table = metrics["pretrained"]["top1_by_k"]
    assert {int(k): value for k, value in table.items()} == pytest.approx(expected, abs=1e-3)
    assert metrics["pretrained"]["best_nn_top1"] == max(table.values())
    assert "top1" not in metrics["pretrained"]
    assert settings["how"] == "highest top1 on the test split"


@pytest.mark.parametrize(("columns", "k"), [(40, 20), (5003, 1), (5003, 7), (5003, 300), (16384, 200)])
def test_the_largest_similarities_are_those_of_topk(columns, k):
    similarity = torch.randn(9, columns, generator=torch.Generator().manual_seed(0))
    for found, expected in zip(_largest(similarity, k), similarity.topk(k, dim=1), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("euclidean", [True, False])
def test_chunks_do_not_change_the_neighbours(rows, euclidean):
    bank, queries, _, _ = rows
    _, whole = neighbours(bank, queries, 20, prepare=unit, euclidean=euclidean)
    _, pieces = neighbours(bank, queries, 20, prepare=unit, euclidean=euclidean, chunk=5, bank_chunk=7)
    assert torch.equal(whole, pieces)


def test_distances_far_from_the_origin_are_exact_enough():
    bank = torch.linspace(0, 1, 50)[:, None] * torch.ones(4) * 1e-2 + 1000
    _, nearest = neighbours(bank, bank, 1, prepare=into_space(bank, "raw"), euclidean=True)
    assert nearest[:, 0].tolist() == list(range(50))


@pytest.mark.parametrize(
    ("space", "expected"), [("raw", [[3.0, 4.0]]), ("l2", [[0.6, 0.8]]), ("shift", [[2**-0.5, 2**-0.5]])]
)
def test_the_spaces_of_best_nn(space, expected):
    bank = torch.tensor([[0.0, 0.0], [4.0, 6.0]])  # mean (2, 3)
    prepare = into_space(bank, space)
    found = prepare(torch.tensor([[3.0, 4.0]])) + (bank.mean(dim=0) if space == "raw" else 0)
    torch.testing.assert_close(found, torch.tensor(expected))


def test_a_tie_goes_to_the_smallest_class():
    labels = torch.tensor([[2, 1, 1, 2], [3, 0, 2, 1]])
    predictions = dict(votes(labels, torch.ones(2, 4), (1, 2, 4), 4))
    assert {k: classes.tolist() for k, classes in predictions.items()} == {1: [2, 3], 2: [1, 0], 4: [1, 0]}


def test_votes_stay_finite_at_a_low_temperature():
    weights = vote_weights(torch.tensor([[1.0, 0.95, 0.9]]), 0.001)
    assert weights.tolist() == [[1.0, pytest.approx(math.exp(-50), rel=1e-3), pytest.approx(0.0, abs=1e-30)]]


def test_neighbours_are_capped_at_the_training_images_and_the_result_states_it(subjects, manifest):
    outcome = run(Config(dataset=SQUARES, k=200), subjects, manifest, quiet)
    assert outcome.hyperparameters["k"] == 60
    assert outcome.hyperparameters["how"] == "200 capped at the 60 training images"


def test_colours_are_neighbours_of_their_kind(subjects, manifest):
    outcome = run(Config(dataset=SQUARES, k=5, more_k=(1, 20)), subjects, manifest, quiet)
    assert outcome.metrics["pixels"] == {"top1": 100.0, "top1_by_k": {"1": 100.0, "5": 100.0, "20": 100.0}}
    assert (outcome.num_train, outcome.num_test, outcome.split) == (60, 31, "test")


def test_the_two_kinds_of_knn_carry_different_protocol_names(subjects, manifest):
    configs = [Config(dataset=SQUARES, variant=variant) for variant in ("weighted", "best")]
    assert [run(config, subjects, manifest, quiet).protocol for config in configs] == ["knn/v1", "knn-best/v1"]
