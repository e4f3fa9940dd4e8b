from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from ssl_core.config import Backbone, Training
from ssl_core.methods.base import resolve
from ssl_core.methods.simsiam import Config, SimSiam, negative_cosine
from ssl_core.networks.backbones import build_backbone
from tests.methods.harness import START, batch, collapse_alarms, make, trainer

SMALL: dict[str, Any] = {"embedding_dim": 12, "predictor_hidden": 5}


def build(**changes):
    return make(SimSiam, Config(**{**SMALL, **changes}))


def noise(seed=0):
    return batch(SimSiam.views(Config(), 8), seed=seed)


def test_matches_a_numpy_oracle():
    rng = np.random.default_rng(0)
    prediction, target = rng.normal(size=(3, 5)), rng.normal(size=(3, 5))
    expected = -(unit(prediction) * unit(target)).sum(1).mean()
    assert abs(negative_cosine(torch.from_numpy(prediction), torch.from_numpy(target)).item() - expected) < 1e-6


def test_the_cosine_by_hand():
    prediction, target = torch.tensor([[3.0, 4.0], [1.0, 0.0]]), torch.tensor([[1.0, 0.0], [0.0, 7.0]])
    assert negative_cosine(prediction, target).item() == pytest.approx(-0.3)


def test_the_target_gets_no_gradient_and_the_prediction_does():
    prediction, target = torch.randn(4, 3, requires_grad=True), torch.randn(4, 3, requires_grad=True)
    negative_cosine(prediction, target).backward()
    assert target.grad is None
    assert prediction.grad is not None
    assert prediction.grad.abs().sum() > 0


def test_the_total_compares_each_prediction_with_the_other_views_embedding():
    model = build().eval()
    one = noise()
    with torch.no_grad():
        z = [model.projector(model.backbone(view)) for view in one.views["student"]]
        p = [model.predictor(row) for row in z]
    cosines = [(unit(p[i].numpy()) * unit(z[1 - i].numpy())).sum(1).mean() for i in (0, 1)]
    assert model(one, START).total.item() == pytest.approx(-sum(cosines) / 2, abs=1e-6)


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


def test_presets_have_the_values_of_their_sources():
    facts = {}
    for name in ("cifar", "imagenet", "cao_wu"):
        spec = {"dataset": {"name": "demo"}, "backbone": {"name": "resnet18"}}
        found = resolve({**spec, "method": {"name": "simsiam", "preset": name}})
        method, training = found.method, found.training
        assert isinstance(training, Training)
        assert (training.batch_size, training.warmup_epochs, training.decay_exclusion) == (512, 0, "none")
        facts[name] = (
            method.projector_layers,
            method.predictor_hidden,
            method.constant_predictor_rate,
            training.learning_rate,
            training.learning_rate_scaling,
            training.weight_decay,
            training.epochs,
        )
    assert facts == {
        "cifar": (2, 512, True, 0.03, "linear", 5e-4, 800),
        "imagenet": (3, 512, True, 0.05, "linear", 1e-4, 100),
        "cao_wu": (3, 2048, False, 0.05, "none", 5e-4, 400),
    }


def unit(rows):
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)
