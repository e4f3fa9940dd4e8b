"""Test labels decide nothing: with other ones every protocol chooses the same, and only its scores fall."""

import pytest

from ssl_core.data.shards import Manifest
from ssl_core.evaluations import finetune, knn, linear, logistic, low_shot

from .conftest import write_shards

LINEAR = {"epochs": 4, "batch_size": 16, "learning_rate": (1e-9, 0.01)}  # the first leaves the random weights alone
FEW = {"variant": "ressl_1", "epochs": 30, "batch_size": 6, "fraction": 0.3, "learning_rate": 0.1}


@pytest.fixture(scope="module")
def other_labels(tmp_path_factory) -> Manifest:
    """The squares of `manifest`, every test image with the label of another class."""
    folder = tmp_path_factory.mktemp("other")
    return Manifest.load(write_shards(folder, train=[n % 3 for n in range(60)], test=[(n + 1) % 3 for n in range(31)]))


@pytest.mark.parametrize(
    ("protocol", "options", "highest"),
    [
        (linear, LINEAR, "top1"),
        (linear, {**LINEAR, "cached": True}, "top1"),
        (logistic, {"l2_steps": 5}, "top1"),
        (low_shot, {"shots": (4,), "draws": 2}, "map_full"),
        (finetune, FEW, "top1"),
        (finetune, {**FEW, "backbone_learning_rate": 0.05}, "top1"),
        (knn, {"k": 5}, "top1"),
    ],
)
def test_nothing_is_chosen_on_test_labels(protocol, options, highest, subjects, manifest, other_labels):
    config = protocol.Config.model_validate({"dataset": {"name": "squares"}, **options})
    honest, other = (
        protocol.run(config, subjects, labels, lambda metrics, epoch: None) for labels in (manifest, other_labels)
    )
    assert honest.hyperparameters == other.hyperparameters
    assert honest.details == other.details
    for name, metrics in honest.metrics.items():  # what chose, where it is reported
        chose = [key for key in metrics if key.startswith("validation_")]
        assert all(metrics[key] == other.metrics[name][key] for key in chose)
    assert honest.metrics["pixels"][highest] == 100.0
    assert other.metrics["pixels"][highest] < 50  # so a choice on test would have been another


def test_a_probe_takes_the_learning_rate_that_learns(subjects, manifest):
    config = linear.Config.model_validate({"dataset": {"name": "squares"}, **LINEAR})
    outcome = linear.run(config, subjects, manifest, lambda metrics, epoch: None)
    assert outcome.hyperparameters["learning_rate"]["pixels"] == 0.01
