from typing import Any

import pytest
import torch
import torch.nn.functional as F

from ssl_core.config import Backbone
from ssl_core.methods.moco_v3 import Config, MoCoV3
from ssl_core.networks.backbones import build_backbone
from tests.methods.harness import START, batch, make, resolved

SMALL: dict[str, Any] = {"projector_hidden": 12, "predictor_hidden": 7, "embedding_dim": 5}


def test_the_loss_by_brute_force():
    config = Config(temperature=0.3, **SMALL)
    model, one = make(MoCoV3, config).eval(), batch(MoCoV3.views(config, 8))
    views = [one.views[group][0] for group in ("first", "second")]
    q = [F.normalize(model.predictor(model.projector(model.backbone(view))), dim=1) for view in views]
    k = [F.normalize(model.teacher(view), dim=1) for view in views]
    total = torch.zeros(())
    for queries, keys in ((q[0], k[1]), (q[1], k[0])):
        for index, query in enumerate(queries):
            logits = torch.stack([query @ key for key in keys]) / 0.3
            total = total + 2 * 0.3 * (logits.logsumexp(0) - logits[index]) / len(queries)
    assert torch.allclose(model(one, START).total, total, atol=1e-6)


@pytest.mark.parametrize("freeze", [True, False])
def test_the_patch_projection_of_a_transformer_can_be_frozen(freeze):
    backbone = build_backbone(Backbone(name="vit_tiny_16"), 16)
    config = Config(freeze_patches=freeze, **SMALL)
    MoCoV3(config, backbone, num_images=80, batch_size=16, seed=0)
    frozen = {name.split(".")[0] for name, parameter in backbone.named_parameters() if not parameter.requires_grad}
    assert frozen == ({"patch_embed"} if freeze else set())


def test_the_heads_are_the_codes():
    resnet, vit = (make(MoCoV3, resolved("moco_v3", preset=name).method) for name in ("imagenet", "vit"))
    kinds = lambda head: [type(layer).__name__ for layer in head]  # noqa: E731
    assert kinds(resnet.projector) == ["Linear", "BatchNorm1d", "ReLU", "Linear", "BatchNorm1d"]
    assert kinds(resnet.predictor) == ["Linear", "BatchNorm1d", "ReLU", "Linear"]
    assert kinds(vit.projector) == ["Linear", "BatchNorm1d", "ReLU"] * 2 + ["Linear", "BatchNorm1d"]
    assert kinds(vit.predictor) == kinds(resnet.projector)
    assert all(layer.bias is None for layer in (resnet.projector[0], resnet.projector[-2], resnet.predictor[-1]))
