import pytest
import torch
import torch.nn.functional as F

from ssl_core.config import Dataset, Subset
from ssl_core.data.shards import Manifest, read_labels
from ssl_core.evaluations import finetune
from ssl_core.evaluations.finetune import VARIANTS, Config, Model, draw_labelled, run, shares
from ssl_core.evaluations.parts.features import draw_by_class

from .conftest import SQUARES, Tiny, quiet, write_shards


def short(**options):
    return Config(
        dataset=SQUARES,
        variant="ressl_1",
        **{"epochs": 8, "batch_size": 6, "fraction": 0.3, "learning_rate": 0.1, **options},
    )


def test_each_class_gives_its_share_and_at_least_one():
    labels = [0] * 100 + [1] * 40 + [2] * 3
    drawn = draw_by_class(labels, range(143), lambda count: max(1, round(0.1 * count)), seed=0)
    assert torch.tensor(labels)[drawn].bincount().tolist() == [10, 4, 1]
    assert drawn == sorted(drawn)


def test_the_draw_follows_from_the_seed_alone():
    labels = [n % 5 for n in range(100)]
    draws = [
        draw_by_class(labels, candidates, lambda _: 4, seed)
        for candidates, seed in ((range(100), 0), (list(reversed(range(100))), 0), (range(100), 1))
    ]
    assert draws[0] == draws[1] != draws[2]


def test_labels_are_read_without_the_images(manifest):
    assert read_labels(manifest, "train") == [n % 3 for n in range(60)]


@pytest.mark.parametrize(("options", "count"), [({"fraction": 0.1}, 6), ({"labels_per_class": 4}, 12)])
def test_the_labelled_images_are_balanced_and_listed(subjects, manifest, options, count):
    outcome = run(short(epochs=1, **options), subjects, manifest, quiet)
    images = [int(image) for image in outcome.details["labelled_images"].split()]
    assert torch.tensor(images).remainder(3).bincount().tolist() == [count // 3] * 3
    assert images == draw_labelled(manifest, short(**options))
    assert outcome.num_train == outcome.hyperparameters["labelled_images"] == count


def test_labels_are_drawn_from_the_subset(manifest):
    part = Dataset(name="squares", subset=Subset(images=30, seed=1))
    images = draw_labelled(manifest, Config(dataset=part, fraction=1.0))
    assert len(images) == 30


def test_only_the_labelled_images_are_seen(subjects, manifest, tmp_path, monkeypatch):
    # All others have wrong labels here; were they seen, colours could not be told apart.
    images = draw_labelled(manifest, short(labels_per_class=3))
    wrong = [n % 3 if n in images else (n + 1) % 3 for n in range(60)]
    other = Manifest.load(write_shards(tmp_path, train=wrong, test=[n % 3 for n in range(31)]))
    monkeypatch.setattr(finetune, "draw_labelled", lambda manifest, config: images)
    outcome = run(short(epochs=30), subjects, other, quiet)
    assert outcome.metrics["pixels"]["top1"] == 100.0


@pytest.mark.parametrize("rate", [0.0, 0.05])
def test_colours_are_told_apart(subjects, manifest, rate):
    outcome = run(short(backbone_learning_rate=rate, epochs=30), subjects, manifest, quiet)
    assert outcome.metrics["pixels"]["top1"] == 100.0


def test_a_frozen_backbone_does_not_move_and_a_tuned_one_does_with_its_own_rate():
    images, labels = torch.randn(6, 3, 8, 8), torch.arange(6) % 3
    network = Tiny()
    still, fresh = (Model(network, 8, 3, short(), device="cpu") for _ in range(2))
    tuned = Model(network, 8, 3, short(backbone_learning_rate=0.01), device="cpu")
    for model in (still, tuned):
        model.step(images, labels, 0.5)
    before, frozen, moved = (module.state_dict() for module in (network, still.backbone, tuned.backbone))
    assert all(torch.equal(value, frozen[name]) for name, value in before.items())
    assert not torch.equal(moved["norm.running_mean"], before["norm.running_mean"])

    weights = [network.convolution.weight, fresh.classifier.weight]  # the same first classifier
    loss = F.cross_entropy(fresh.classifier(network(images)), labels)
    gradients = torch.autograd.grad(loss, weights)
    torch.testing.assert_close(moved["convolution.weight"], weights[0] - 0.5 * 0.01 * gradients[0])
    torch.testing.assert_close(tuned.classifier.weight, weights[1] - 0.5 * 0.1 * gradients[1])


def test_schedules_have_their_shape():
    cosine = list(shares(short(), 4))
    assert cosine == pytest.approx([1, 0.853553, 0.5, 0.146447], abs=1e-5)
    assert list(shares(Config(dataset=SQUARES, variant="swav_10"), 10)) == pytest.approx(
        [1] * 6 + [0.2] * 2 + [0.04] * 2
    )


@pytest.mark.parametrize(
    ("variant", "fraction", "backbone", "classifier", "epochs"),
    [
        ("full", 1.0, 0.02, 0.02, 20),
        ("ressl_1", 0.01, 0, 0.1, 60),
        ("ressl_10", 0.1, 0.02, 0.2, 20),
        ("swav_1", 0.01, 0.02, 5.0, 20),
        ("swav_10", 0.1, 0.01, 0.2, 20),
    ],
)
def test_published_protocols_have_their_numbers(variant, fraction, backbone, classifier, epochs):
    config = Config(dataset=SQUARES, variant=variant)
    assert (config.fraction, config.epochs, config.weight_decay) == (fraction, epochs, 0)
    assert (config.backbone_learning_rate, config.learning_rate) == (backbone, classifier)


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({}, "finetune-full/v1"),
        ({"fraction": 0.25}, "finetune-full-25_percent/v1"),
        ({"variant": "ressl_1"}, "finetune-ressl_1/v1"),
        ({"variant": "ressl_10"}, "finetune-ressl_10/v1"),
        ({"variant": "ressl_1", "fraction": 0.05}, "finetune-ressl_1-5_percent/v1"),
        ({"variant": "ressl_10", "labels_per_class": 4}, "finetune-ressl_10-4_a_class/v1"),
    ],
)
def test_the_protocol_name_tells_numbers_of_labels_apart(options, name):
    assert Config(dataset=SQUARES, **options).protocol_name() == name


def test_more_labels_than_a_class_has_are_a_clear_error(subjects, manifest):
    with pytest.raises(ValueError, match="labels_per_class 21: a class of 'train' has 20 images: lower it"):
        run(short(labels_per_class=21), subjects, manifest, quiet)


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_is_accepted(variant):
    assert Config(dataset=SQUARES, variant=variant).overridden() == []
