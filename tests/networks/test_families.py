"""The code of a model card rebuilds each network with its library alone: equal names, equal features."""

import pytest
import torch
from torch import nn

from ssl_core.config import Backbone
from ssl_core.networks.backbones import build_backbone
from ssl_core.networks.families import architecture, family_of


@pytest.mark.parametrize(
    ("config", "size"),
    [
        (Backbone(name="resnet18"), 32),
        (Backbone(name="resnet18", stem="small"), 32),
        (Backbone(name="resnet18", stem="tiny"), 32),
        (Backbone(name="resnet50x2", stem="tiny"), 16),
        (Backbone(name="mobilenet_v2", stem="small"), 32),
        (Backbone(name="mobilenet_v3_small", stem="tiny"), 32),
        (Backbone(name="mobilenet_v3_small", stem="small", hidden_layer=False), 32),
        (Backbone(name="efficientnet_b0", stem="small"), 16),
        (Backbone(name="torchvision/shufflenet_v2_x0_5"), 32),
        (Backbone(name="vit_tiny_16"), 32),
        (Backbone(name="vit_tiny_32"), 64),
        (Backbone(name="deit_tiny"), 32),
        (Backbone(name="timm/test_vit"), 32),
    ],
    ids=lambda value: f"{value.name} {value.stem}" if isinstance(value, Backbone) else str(value),
)
def test_the_code_rebuilds_the_network(config: Backbone, size: int) -> None:
    torch.manual_seed(0)
    network = build_backbone(config, size)
    for layer in network.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.momentum = 0.9
    network.train()(torch.randn(8, 3, size, size))  # otherwise the features of untrained batch norms vanish
    network.eval()
    names: dict = {}
    exec(family_of(network).rebuilding_code(network, config, size), names)
    model = names["model"]
    assert "ssl_core" not in type(model).__module__
    model.load_state_dict(network.state_dict())  # strictly
    images = torch.randn(2, 3, size, size)
    with torch.no_grad():
        expected = network(images)
        assert expected.std() > 1e-3
        assert torch.equal(model.eval()(images), expected)


def test_a_mobilenet_without_its_stem_loads_the_weights_but_gives_other_features() -> None:
    torch.manual_seed(0)
    config = Backbone(name="mobilenet_v2", stem="small")
    network = build_backbone(config, 32)
    network.train()(torch.randn(16, 3, 32, 32))
    names: dict = {}
    exec(family_of(network).rebuilding_code(network, Backbone(name="mobilenet_v2"), 32), names)
    names["model"].load_state_dict(network.state_dict())
    images = torch.randn(2, 3, 32, 32)
    assert not torch.allclose(names["model"].eval()(images), network.eval()(images), rtol=0.01, atol=0)
    description = family_of(network).stem_description(config.stem)
    assert "load without this change as well, but then give other features" in description


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("resnet18", ("torchvision", "resnet18")),
        ("torchvision/vgg11", ("torchvision", "vgg11")),
        ("timm/test_vit", ("timm", "test_vit")),
        ("vit_small_16", ("timm", "vit_small_patch16_224")),
    ],
)
def test_architecture_names_the_library_and_its_network(name: str, expected: tuple[str, str]) -> None:
    assert architecture(Backbone(name=name)) == expected
