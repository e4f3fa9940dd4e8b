"""JigClu: patches, montages, the two losses, and the maps they are read from."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ssl_core.config import Backbone
from ssl_core.data.loader import Batch
from ssl_core.methods.base import Progress
from ssl_core.methods.jigclu import CORNERS, Config, JigClu, clustering_loss, montage
from ssl_core.networks.backbones import build_backbone
from ssl_core.networks.families import feature_map, pooled_features
from ssl_core.networks.heads import quadrants
from tests.methods.harness import START, batch, make

VIEWS = JigClu.views(Config(), 8)


def unit(*shape, seed=0):
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=1)


# Losses


def test_clustering_loss_matches_a_numpy_oracle_in_double_precision():
    rows, images = unit(8, 5).double(), torch.tensor([0, 1, 0, 1, 1, 0, 0, 1])
    similarities = rows.numpy() @ rows.numpy().T / 0.3
    losses = []
    for anchor in range(8):
        others = [other for other in range(8) if other != anchor]
        normaliser = np.log(np.exp(similarities[anchor, others]).sum())
        same = [other for other in others if images[other] == images[anchor]]
        losses.append(-np.mean([similarities[anchor, other] - normaliser for other in same]))
    found = clustering_loss(rows, images, temperature=0.3)
    assert abs(found.item() - 0.3 / 0.07 * np.mean(losses)) < 1e-12


def test_the_total_is_the_weighted_sum_and_reaches_both_heads():
    model = make(JigClu, Config(location_weight=0.5))
    losses = model(batch(VIEWS), START)
    torch.testing.assert_close(losses.total.detach(), losses.parts["cluster"] + 0.5 * losses.parts["location"])
    losses.total.backward()
    assert all(head.weight.grad.abs().sum() > 0 for head in (model.projector[0], model.locator))


# Patches and montages


def test_patches_are_overlapping_corners_of_half_the_size():
    views = JigClu.views(Config(), 224)
    assert {name: view.size for name, view in views.items()} == dict.fromkeys(CORNERS, 112)
    assert {name: view.region for name, view in views.items()} == {
        "top_left": (0.0, 0.0, 0.8, 0.8),
        "top_right": (0.2, 0.0, 1.0, 0.8),
        "bottom_left": (0.0, 0.2, 0.8, 1.0),
        "bottom_right": (0.2, 0.2, 1.0, 1.0),
    }
    assert {view.area for view in views.values()} == {(0.2, 1.0)}


def test_a_montage_lays_the_four_slots_out_in_reading_order():
    patches = [torch.full((2, 3, 1, 1), 0.0) for _ in range(4)]
    for corner, patch in enumerate(patches):
        patch += 10 * corner + torch.arange(2).view(2, 1, 1, 1)
    order = torch.tensor([[7, 0], [2, 4], [5, 1], [3, 6]])  # corner * 2 + image
    pictures = montage(patches, order)
    assert pictures.shape == (2, 3, 2, 2)
    assert pictures[0, 0].tolist() == [[31, 10], [21, 11]]
    assert pictures[1, 0].tolist() == [[0, 20], [1, 30]]


def test_every_patch_is_used_once_and_another_step_shuffles_anew():
    class Remember(nn.Module):
        num_features = 3

        def forward_features(self, images):
            self.seen = images
            return images

        def forward_head(self, maps, pre_logits):
            return maps.mean(dim=(2, 3))

    backbone = Remember()
    torch.manual_seed(0)
    model = JigClu(Config(), backbone, num_images=100, batch_size=4, seed=0)  # pyright: ignore[reportArgumentType]
    numbered = {name: [torch.full((4, 3, 1, 1), 0.0)] for name in CORNERS}
    for corner, name in enumerate(CORNERS):
        numbered[name][0] += 4 * corner + torch.arange(4).view(4, 1, 1, 1)
    one = Batch(numbered, torch.zeros(4), torch.arange(4))
    seen = []
    for number in (0, 0, 1):
        model(one, Progress(number, 100))
        assert sorted(backbone.seen[:, 0].flatten().tolist()) == list(range(16))
        seen.append(backbone.seen)
    assert torch.equal(seen[0], seen[1])
    assert not torch.equal(seen[0], seen[2])


def test_quadrants_of_a_montage_come_back_in_the_order_of_its_slots():
    numbered = {name: [torch.zeros(4, 3, 2, 2)] for name in CORNERS}
    for corner, name in enumerate(CORNERS):
        numbered[name][0] += 4 * corner + torch.arange(4).view(4, 1, 1, 1)
    order = torch.randperm(16, generator=torch.Generator().manual_seed(0)).view(4, 4)
    pictures = montage([numbered[name][0] for name in CORNERS], order)
    found = quadrants(pictures)[:, 0].long()
    assert torch.equal(found % 4, (order % 4).flatten())
    assert torch.equal(found // 4, (order // 4).flatten())


# Maps


@pytest.mark.parametrize(
    ("name", "stem", "pixels"),
    [
        ("resnet18", "small", 32),
        ("mobilenet_v2", "small", 32),
        ("mobilenet_v3_small", "small", 32),
        ("efficientnet_b0", "small", 32),
        ("resnet18", "imagenet", 64),
        ("timm/resnet10t", "imagenet", 64),
    ],
)
def test_the_pooled_map_of_every_family_is_its_feature(name, stem, pixels):
    torch.manual_seed(0)
    backbone = build_backbone(Backbone(name=name, stem=stem), pixels).eval()
    images = torch.randn(2, 3, pixels, pixels)
    with torch.no_grad():
        maps = feature_map(backbone, images)
        assert maps.shape[2:] == (pixels // (8 if stem == "small" else 32),) * 2
        torch.testing.assert_close(pooled_features(backbone, maps.mean(dim=(2, 3))), backbone(images))


def test_quadrants_of_an_even_map_are_its_plain_averages():
    maps = torch.arange(32.0).view(2, 1, 4, 4)
    assert quadrants(maps).flatten().tolist() == [2.5, 18.5, 4.5, 20.5, 10.5, 26.5, 12.5, 28.5]


def test_a_map_of_7_is_interpolated_to_8_as_in_the_official_code():
    maps = torch.randn(2, 5, 7, 7)
    official = F.adaptive_avg_pool2d(F.interpolate(maps, size=(8, 8), mode="bilinear", align_corners=False), 2)
    assert torch.equal(quadrants(maps), torch.cat([official[:, :, i, j] for i in (0, 1) for j in (0, 1)]))


def test_a_map_of_one_cell_is_refused():
    with pytest.raises(ValueError, match="one cell, no quadrants"):
        quadrants(torch.ones(2, 3, 1, 1))


def test_a_transformer_has_no_map():
    backbone = build_backbone(Backbone(name="vit_tiny_16"), 32)
    with pytest.raises(ValueError, match="has no map of features: use a ResNet"):
        feature_map(backbone, torch.randn(1, 3, 32, 32))
