import pytest
import torch
import torch.nn.functional as F

from ssl_core.blocks.schedules import learning_rate
from ssl_core.config import Training, parse
from ssl_core.evaluations.linear import VARIANTS, Config, plan, run
from ssl_core.evaluations.parts.features import Pixels, training_view
from ssl_core.evaluations.parts.probe import LastBlocks, Probe, read_out

from .conftest import SQUARES, Tiny, quiet

GOOD_AND_BAD = (1e-9, 0.01)  # the first leaves the random weights as they are


def short(**options):
    return Config(dataset=SQUARES, **{"epochs": 4, "batch_size": 16, "learning_rate": 0.1, **options})


def make_probe(rates=(0.1,), dim=4):
    plans = [
        Training(learning_rate=rate, learning_rate_scaling="none", weight_decay=0, warmup_epochs=0) for rate in rates
    ]
    return Probe(dim, 3, plans, seed=0, steps_per_epoch=5)


@pytest.mark.parametrize("cached", [True, False])
def test_a_probe_solves_what_is_separable(subjects, manifest, cached):
    outcome = run(short(cached=cached), subjects, manifest, quiet)
    assert outcome.metrics["pixels"]["top1"] == 100.0
    assert (outcome.num_train, outcome.num_test, outcome.split) == (60, 31, "test")


def test_twins_learn_nothing_from_held_out_images():
    features, labels = torch.randn(12, 4), torch.arange(12) % 3
    keep = torch.arange(12) < 8
    several, alone = make_probe(rates=(0.1, 1.0)), make_probe(rates=(0.1,))
    for _ in range(3):
        several.step(features, labels, keep)
        alone.step(features[keep], labels[keep], torch.ones(8, dtype=torch.bool))
    torch.testing.assert_close(several.twins[0].weight, alone.heads[0].weight)
    assert not torch.allclose(several.twins[0].weight, several.heads[0].weight)


def test_learning_rates_side_by_side_do_not_disturb_each_other():
    features, labels, keep = torch.randn(12, 4), torch.arange(12) % 3, torch.ones(12, dtype=torch.bool)
    several, alone = make_probe(rates=(0.1, 30.0)), make_probe(rates=(0.1,))
    for probe in (several, alone):
        for _ in range(3):
            probe.step(features, labels, keep)
    assert torch.equal(several.heads[0].weight, alone.heads[0].weight)


def test_one_step_is_plain_gradient_descent_on_the_cross_entropy():
    features, labels = torch.randn(12, 4), torch.arange(12) % 3
    probe = make_probe()
    weight, bias = (value.detach().clone().requires_grad_() for value in probe.heads[0].parameters())
    (gradient,) = torch.autograd.grad(F.cross_entropy(features @ weight.T + bias, labels), [weight])
    probe.step(features, labels, torch.ones(12, dtype=torch.bool))
    torch.testing.assert_close(probe.heads[0].weight, weight - 0.1 * gradient)
    assert weight.std().item() == pytest.approx(0.01, rel=0.5)
    assert not bias.any()


def test_the_last_epoch_counts_and_the_best_is_reported_separately(subjects, manifest):
    curve = []
    outcome = run(short(epochs=6), subjects, manifest, lambda metrics, epoch: curve.append(metrics))
    scores = [metrics["linear/v1/pretrained_top1"] for metrics in curve]
    assert outcome.metrics["pretrained"] == {"top1": scores[-1], "best_epoch_top1": max(scores)}


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({}, "linear/v1"),
        ({"variant": "moco"}, "linear-moco/v1"),
        ({"variant": "features"}, "linear-features/v1"),
        ({"cached": True}, "linear-ressl_small-features/v1"),
        ({"variant": "moco", "cached": True}, "linear-moco-features/v1"),
    ],
)
def test_the_protocol_name_tells_probes_apart(options, name):
    assert Config(dataset=SQUARES, **options).protocol_name() == name


def test_settings_that_differ_from_the_variant_are_listed():
    assert Config(dataset=SQUARES, variant="moco").overridden() == []
    assert Config(dataset=SQUARES, variant="moco", epochs=10, learning_rate=30.0).overridden() == ["epochs"]


@pytest.mark.parametrize(
    ("variant", "peak", "last", "epochs"),
    [
        ("ressl_small", 10, 0.1, 100),
        ("ressl_imagenet", 0.1, 0, 90),
        ("ressl_imagenet_code", 0.3, 0, 100),
        ("moco", 30, 0.3, 100),
        ("simclr", 1.6, 0, 90),
        ("simsiam", 1.6, 0, 90),
        ("sslight", 0.8, 1e-6, 100),
        ("sslight_vit", 0.16, 1e-5, 100),
        ("dino", 0.004, 0, 100),
        ("cao_wu", 30, 0.3, 100),
        ("ssql", 0.8, 0, 60),
        ("shi_transfer", 1.5, 0.15, 60),
    ],
)
def test_published_probes_have_their_learning_rates(variant, peak, last, epochs):
    config = Config(dataset=SQUARES, variant=variant)
    training = plan(config, config.rates()[0], config.batch_size)
    rates = [learning_rate(step, training=training, steps_per_epoch=100) for step in (0, 100 * epochs - 1)]
    assert (rates[0], training.epochs) == (pytest.approx(peak), epochs)
    assert rates[1] == pytest.approx(last, abs=peak * 1e-3)


def test_a_shorter_run_keeps_its_milestones_in_place():
    config = Config(dataset=SQUARES, epochs=20)
    training = plan(config, 10.0, 256)
    rates = [learning_rate(step, training=training, steps_per_epoch=1) for step in (11, 12, 15, 16)]
    assert rates == pytest.approx([10, 1, 1, 0.1])


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_is_accepted(variant):
    assert parse(Config, {"variant": variant, "dataset": {"name": "demo"}}, "evaluations.linear").variant == variant


def test_flips_are_off_where_they_change_the_label_unless_configured():
    flips = [
        training_view(16, (0.08, 1.0), avoid, flip=flip).augmentation.flip
        for flip, avoid in ((None, ()), (None, ("flip",)), (0.3, ("flip",)))
    ]
    assert flips == [0.5, 0.0, 0.3]


def test_the_results_state_the_flip_that_was_used(subjects, manifest):
    assert run(short(), subjects, manifest, quiet).hyperparameters["flip"] == 0.0  # the squares' card avoids it
    assert "flip" not in run(short(cached=True), subjects, manifest, quiet).hyperparameters


def test_last_blocks_end_with_the_features_of_the_whole_transformer():
    from timm.models.vision_transformer import VisionTransformer

    network = VisionTransformer(img_size=16, patch_size=8, embed_dim=8, depth=3, num_heads=2, num_classes=0).eval()
    images = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        features = LastBlocks(network, 2)(images)
        assert features.shape == (2, 16)
        torch.testing.assert_close(features[:, 8:], network(images))


def test_last_blocks_of_a_convolutional_network_are_a_clear_error():
    assert isinstance(read_out(Pixels(), 4), Pixels)
    with pytest.raises(ValueError, match="needs a vision transformer"):
        read_out(Tiny(), 4)
