from typing import Any

import pytest
import torch
from torch import nn

from ssl_core.config import Backbone
from ssl_core.methods.simsiam import Config, SimSiam, negative_cosine
from ssl_core.networks.backbones import build_backbone
from tests.methods.harness import START, batch, collapse_alarms, make, trainer

SMALL: dict[str, Any] = {"embedding_dim": 12, "predictor_hidden": 5}


def build(**changes):
    return make(SimSiam, Config(**{**SMALL, **changes}))


def noise(seed=0):
    return batch(SimSiam.views(Config(), 8), seed=seed)


def test_the_total_compares_each_prediction_with_the_other_views_embedding():
    model = build().eval()
    one = noise()
    with torch.no_grad():
        z = [model.projector(model.backbone(view)) for view in one.views["student"]]
        p = [model.predictor(row) for row in z]
    expected = (negative_cosine(p[0], z[1]) + negative_cosine(p[1], z[0])) / 2
    assert torch.allclose(model(one, START).total, expected)


def test_without_the_predictor_the_backbone_learns_through_the_prediction_alone():
    # With an identity as predictor, a gradient through the targets would double it.
    model = build().eval()
    model.predictor = nn.Identity()
    one = noise()
    model(one, START).total.backward()
    first, second = (model.projector(model.backbone(view)) for view in one.views["student"])
    through_both = -torch.cosine_similarity(first, second).mean()
    (gradient,) = torch.autograd.grad(through_both, [model.backbone.layer.weight])
    assert torch.allclose(model.backbone.layer.weight.grad, gradient / 2, atol=1e-6)


@pytest.mark.parametrize(("constant", "rates"), [(True, {"predictor": 0.06, "rest": 0.0}), (False, {"rest": 0.0})])
def test_only_the_predictors_rate_stays(constant, rates):
    training = {"learning_rate": 0.06, "learning_rate_scaling": "none", "warmup_epochs": 0}
    trained = trainer(SimSiam, Config(**SMALL, constant_predictor_rate=constant), **training)
    trained.run(save=lambda: None, log=lambda row: None)
    predictor = {id(parameter) for parameter in trained.method.get_submodule("predictor").parameters()}
    found = {
        "predictor" if constant and id(parameter) in predictor else "rest": group["lr"]
        for group in trained.optimizer.param_groups
        for parameter in group["params"]
    }
    assert found == pytest.approx(rates, abs=0.01)  # the last step's cosine is almost through
    assert trained.history[-1]["schedule/learning_rate"] < 0.01


def test_the_projector_ends_in_a_batch_norm_without_scale_and_the_predictor_in_a_linear_layer():
    model = build(projector_layers=3)
    assert [type(layer) for layer in model.projector].count(nn.Linear) == 3
    assert isinstance(model.projector[-1], nn.BatchNorm1d)
    assert model.projector[-1].weight is None
    assert isinstance(model.predictor[-1], nn.Linear)
    assert model.predictor[-1].bias is not None


@pytest.mark.parametrize("zero", [True, False])
def test_zero_initial_residual_starts_residual_blocks_as_identities(zero):
    backbone: Any = build_backbone(Backbone(name="resnet18", stem="small"), 32)
    SimSiam(Config(**SMALL, zero_initial_residual=zero), backbone, num_images=80, batch_size=16, seed=0)
    assert (backbone.layer1[0].bn2.weight.abs().sum() == 0) == zero
    assert backbone.layer1[0].bn1.weight.abs().sum() > 0


def test_a_constant_encoder_has_a_loss_of_0_after_batchnorm_and_of_minus_1_without():
    # The last BatchNorm centres equal embeddings to 0, and their cosine is 0.
    assert collapse_alarms(SimSiam, Config(**SMALL)) == pytest.approx(0, abs=1e-6)
    same = torch.ones(4, 3)
    assert negative_cosine(same, same).item() == pytest.approx(-1)
