import pytest
import torch
from torch import nn

from ssl_core.config import Backbone
from ssl_core.evaluations.base import Precision
from ssl_core.evaluations.parts.features import (
    GROUP,
    Pixels,
    accuracies,
    build_untrained,
    center_view,
    extract,
    gather_subjects,
    make_loader,
    pixel_side,
    read_split,
)
from ssl_core.networks.backbones import build_backbone, load_backbone

from .conftest import SEED, SQUARES, Tiny

KINDS: tuple[Precision, Precision] = ("fp32", "bf16")


def test_every_image_comes_once_with_its_label(subjects, manifest):
    features = extract(subjects.networks, make_loader(subjects, manifest, SQUARES, center_view(16), batch_size=7))
    assert features.indices.sort().values.tolist() == list(range(60))
    assert torch.equal(features.labels, features.indices % 3)


def test_bfloat16_moves_features_by_its_rounding_alone(backbone_path, manifest):
    subjects = gather_subjects(*load_backbone(backbone_path), image_size=None, threads=1)
    plain, fast = (read_split(subjects, manifest, SQUARES, center_view(16), "", precision=kind) for kind in KINDS)
    assert torch.equal(plain.indices, fast.indices)
    assert torch.equal(plain.by_network["pixels"], fast.by_network["pixels"])
    for name in ("pretrained", "untrained"):
        assert not torch.equal(plain.by_network[name], fast.by_network[name])
        assert torch.cosine_similarity(plain.by_network[name], fast.by_network[name]).min() > 0.999
        assert fast.by_network[name].dtype == torch.float32


def test_extraction_leaves_weights_statistics_and_modes_alone(subjects, manifest):
    network = nn.Sequential(Tiny(), nn.BatchNorm1d(8))
    network.train()
    network[1].eval()  # frozen on purpose
    before = {name: value.clone() for name, value in network.state_dict().items()}
    extract({"network": network}, make_loader(subjects, manifest, SQUARES, center_view(16)))
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert network.training
    assert network[0].training
    assert not network[1].training


def test_features_that_are_not_finite_are_refused(subjects, manifest):
    network = Tiny()
    assert network.norm.running_var is not None
    network.norm.running_var[0] = float("nan")
    with pytest.raises(ValueError, match="the spoilt network gives features that are not finite"):
        read_split(subjects, manifest, SQUARES, center_view(16), "", networks={"spoilt": network})


def test_pixels_are_the_normalised_image(subjects, manifest):
    loader = make_loader(subjects, manifest, SQUARES, center_view(16), batch_size=60)
    batch = next(loader.epoch())
    (images,) = batch.views[GROUP]
    assert torch.equal(Pixels()(images), images.reshape(60, -1))


def test_pixels_of_large_images_are_averaged_down():
    image = torch.arange(64.0).repeat_interleave(64).reshape(1, 1, 64, 64).expand(1, 3, 64, 64)
    pixels = Pixels()(image).reshape(3, 32, 32)
    assert pixels[0, :2, 0].tolist() == [0.5, 2.5]


def test_raw_pixels_of_large_training_sets_are_averaged_further():
    assert [pixel_side(images) for images in (50_000, 349_525, 349_526, 1_281_167, 10**9)] == [32, 32, 16, 16, 8]
    assert Pixels(16)(torch.zeros(2, 3, 64, 64)).shape == (2, 3 * 16 * 16)


def test_the_untrained_baseline_is_what_pre_training_started_from(backbone_path):
    pretrained, header = load_backbone(backbone_path)
    torch.manual_seed(SEED)
    fresh = build_backbone(Backbone.model_validate_json(header["backbone"]), 16).state_dict()
    untrained = gather_subjects(pretrained, header, image_size=None, threads=1).networks["untrained"].state_dict()
    assert all(torch.equal(fresh[name], untrained[name]) for name in fresh)
    assert not torch.equal(fresh["features.0.0.weight"], pretrained.state_dict()["features.0.0.weight"])


def test_building_the_untrained_baseline_leaves_the_random_state_alone(backbone_path):
    _, header = load_backbone(backbone_path)
    state = torch.get_rng_state()
    build_untrained(header)
    assert torch.equal(state, torch.get_rng_state())


def test_top5_counts_hits_among_the_five_highest_from_ten_classes_on():
    logits = torch.arange(10.0).repeat(4, 1)  # class 9 highest, 5 the fifth, 4 the sixth
    assert accuracies(logits, torch.tensor([9, 5, 4, 0])) == {"top1": 25.0, "top5": 50.0}
    assert accuracies(logits[:, :9], torch.tensor([8, 5, 4, 0])) == {"top1": 25.0}
