import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from ssl_core.data.shards import Manifest
from ssl_core.evaluations.metrics import (
    Config,
    Set,
    alignment,
    choose,
    effective_rank,
    instance_top1,
    intra_class_alignment,
    make_views,
    measure,
    rankme,
    run,
    uniformity,
)

from .conftest import SQUARES, quiet, write_shards

AXES = torch.eye(3)


@pytest.fixture
def rows():
    return F.normalize(torch.randn(40, 6, generator=torch.Generator().manual_seed(0)), dim=1)


def test_alignment_is_the_mean_squared_distance():
    assert alignment(AXES, AXES) == 0
    assert alignment(AXES, -AXES) == 4
    assert alignment(AXES, AXES.roll(1, 0)) == 2
    assert alignment(AXES[:2], torch.stack([AXES[0], AXES[0]])) == 1  # 0 and 2


def test_alignment_is_two_minus_twice_the_mean_cosine(rows):
    other = rows.flip(0)
    assert alignment(rows, other) == pytest.approx(2 - 2 * F.cosine_similarity(rows, other).mean().item(), abs=1e-6)


def test_uniformity_of_a_collapsed_set_is_zero_and_of_orthogonal_points_minus_four():
    assert uniformity(AXES[:1].expand(5, 3)) == pytest.approx(0)
    assert uniformity(AXES) == pytest.approx(-4)  # all distances are sqrt 2, t is 2
    assert uniformity(AXES, t=1.0) == pytest.approx(-2)


def test_uniformity_of_uniform_points_is_what_theory_says():
    rows = F.normalize(torch.randn(2000, 128, generator=torch.Generator().manual_seed(1)), dim=1)
    assert uniformity(rows) == pytest.approx(-4 + 8 / 128, abs=0.01)


def test_uniformity_agrees_with_numpy(rows):
    points = rows.double().numpy()
    pairs = [np.exp(-2 * ((points[i] - points[j]) ** 2).sum()) for i in range(40) for j in range(i)]
    assert uniformity(rows, draws=2) == pytest.approx(np.log(np.mean(pairs)))  # 40 images: each draw has them all


def test_intra_class_alignment_averages_pairs_and_then_classes(rows):
    labels = torch.arange(40) % 3
    points = rows.double().numpy()
    means = []
    for label in range(3):
        own = points[labels.numpy() == label]
        means.append(np.mean([((own[i] - own[j]) ** 2).sum() for i in range(len(own)) for j in range(i)]))
    assert intra_class_alignment(rows, labels) == pytest.approx(np.mean(means))


def test_intra_class_alignment_leaves_out_single_images_and_needs_labels(rows):
    assert intra_class_alignment(torch.cat([AXES[:2], AXES[:1]]), torch.tensor([0, 0, 1])) == pytest.approx(2)
    assert intra_class_alignment(rows, torch.full((40,), -1)) is None


def test_an_instance_is_found_if_its_copy_is_nearer_than_all_other_originals():
    angles = torch.tensor([0.0, 1.0, 3.0])
    copies = torch.tensor([0.9, 2.2, 3.1])  # nearer than 1.0; farther than 0.0; nearer than 1.0
    original, first = (torch.stack([a.cos(), a.sin()], dim=1) for a in (angles, copies))
    assert instance_top1(original, first, original) == pytest.approx(100 * 2 / 3)


def test_a_copy_is_compared_with_the_copies_of_others():
    angles = torch.tensor([0.0, 0.5, 3.0])
    seconds = torch.tensor([0.4, 1.2, 3.3])  # 0.4 from 0.0, whose nearest other is 0.5; 0.7 from 0.5; 0.3 from 3.0
    first, second = (torch.stack([a.cos(), a.sin()], dim=1) for a in (angles, seconds))
    assert instance_top1(first, second, first) == pytest.approx(100 * 2 / 3)


def test_a_collapsed_encoder_finds_no_instance():
    rows = F.normalize(torch.ones(50, 7), dim=1)
    assert instance_top1(rows, rows, rows) == 0
    different = F.normalize(torch.randn(50, 7), dim=1)
    assert instance_top1(different, different, different) == 100


def test_the_shis_top_two_of_logits_with_the_self_similarity_is_the_same_accuracy(rows):
    copies = F.normalize(rows + 0.4 * torch.randn(40, 6, generator=torch.Generator().manual_seed(2)), dim=1)
    logits = torch.cat([(rows * copies).sum(dim=1, keepdim=True), rows @ rows.T], dim=1)
    top2 = (logits.topk(2, dim=1).indices == 0).any(dim=1).float().mean().item() * 100
    assert 0 < top2 < 100
    assert instance_top1(rows, copies, rows) == pytest.approx(top2)


def test_rankme_is_the_exponential_of_the_entropy_of_singular_values():
    assert rankme(torch.eye(4)) == pytest.approx(4, abs=1e-4)
    shares = torch.tensor([0.75, 0.25])  # singular values 3 and 1
    entropy = -(shares * shares.log()).sum().item()
    assert rankme(torch.diag(torch.tensor([3.0, 1.0]))) == pytest.approx(math.exp(entropy), abs=1e-4)
    assert rankme(torch.ones(9, 4)) == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("shape", [(40, 6), (6, 40)])
def test_rankme_agrees_with_a_singular_value_decomposition(shape):
    features = torch.randn(shape, generator=torch.Generator().manual_seed(3)) + 1
    values = np.linalg.svd(features.double().numpy(), compute_uv=False)
    share = values / values.sum() + 1e-7
    assert rankme(features) == pytest.approx(np.exp(-(share * np.log(share)).sum()), rel=1e-5)


def test_the_effective_rank_does_not_count_the_mean():
    features = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
    assert effective_rank(features) == pytest.approx(2)
    assert effective_rank(features + 100) == pytest.approx(2, abs=1e-4)
    assert effective_rank(torch.ones(9, 4)) == 1
    assert rankme(features + 100) < 1.2


def test_tolerance_is_one_minus_half_the_intra_class_alignment(rows):
    metrics = measure(Set(rows, rows, rows), torch.arange(40) % 3, Config(dataset=SQUARES))
    assert metrics["tolerance"] == pytest.approx(1 - metrics["intra_class_alignment"] / 2, abs=1e-5)
    assert (metrics["alignment"], metrics["alignment_copies"], metrics["instance_top1"]) == (0, 0, 100)


def test_lengths_of_features_do_not_matter_to_what_lies_on_the_sphere(rows):
    config, labels = Config(dataset=SQUARES), torch.arange(40) % 3
    short, long = (measure(Set(*(rows.roll(n, 0) * s for n in range(3))), labels, config) for s in (1, 7))
    assert long == pytest.approx(short, abs=1e-4)


def test_the_set_follows_from_the_seed_and_the_result_says_which(subjects, manifest):
    first, again, other = (
        run(Config(dataset=SQUARES, images_per_class=6, seed=seed), subjects, manifest, quiet) for seed in (1, 1, 2)
    )
    assert first == again
    assert first.hyperparameters["set"] != other.hyperparameters["set"]
    assert first.num_test == 18
    assert len(first.details["images"].split()) == 18
    assert first.headline == "instance_top1"
    assert 0 < first.metrics["pixels"]["alignment"] < 2
    assert first.metrics["pixels"]["intra_class_alignment"] < 1.0  # colours


def test_images_are_drawn_by_class_and_no_class_gives_more_than_it_has(manifest):
    images = choose(manifest, "test", Config(dataset=SQUARES, images_per_class=5))
    assert np.bincount(np.array(images) % 3).tolist() == [5, 5, 5]
    assert choose(manifest, "test", Config(dataset=SQUARES)) == list(range(31))


def test_a_data_set_without_labels_is_measured_without_classes(subjects, tmp_path):
    bare = Manifest.load(write_shards(tmp_path, train=[0] * 4, test=[0] * 24, labelled=False))
    outcome = run(Config(dataset=SQUARES, images=20), subjects, bare, quiet)
    assert outcome.num_test == 20
    assert "tolerance" not in outcome.metrics["pretrained"]


def test_copies_are_not_changed_in_ways_that_the_card_avoids():
    views = make_views(Config(dataset=SQUARES), 16, ("flip",))
    assert views["copies"].augmentation.flip == 0
    assert views["copies"].augmentation.jitter == 0.8
    assert views["original"].augmentation.jitter == 0


def test_an_unknown_augmentation_is_a_clear_error():
    with pytest.raises(ValueError, match="did you mean 'contrastive'"):
        make_views(Config(dataset=SQUARES, augmentation="contrastve"), 16, ())
