from typing import Any

import torch

from ssl_core.methods.byol import BYOL, Config, regression_loss
from tests.methods.harness import START, batch, float64, make, resolved

SMALL: dict[str, Any] = {"projector_hidden": 12, "predictor_hidden": 12, "embedding_dim": 5}


def build(**changes):
    return make(BYOL, Config(**{**SMALL, **changes}))


def noise(seed=0):
    return batch(BYOL.views(Config(), 8), seed=seed)


def test_the_target_gets_no_gradient_and_the_prediction_does():
    prediction, target = torch.randn(4, 3, requires_grad=True), torch.randn(4, 3, requires_grad=True)
    regression_loss(prediction, target).backward()
    assert target.grad is None
    assert prediction.grad is not None
    assert prediction.grad.abs().sum() > 0


def test_the_total_compares_each_prediction_with_the_teachers_other_view():
    model = build(loss="regression").eval()
    one = noise()
    first, second = one.views["first"][0], one.views["second"][0]
    predict = lambda view: model.predictor(model.projector(model.backbone(view)))  # noqa: E731
    there, back = ((predict(first), model.teacher(second)), (predict(second), model.teacher(first)))
    assert torch.allclose(model(one, START).total, regression_loss(*there) + regression_loss(*back))


def test_ssqls_loss_has_a_quarter_of_the_papers_gradient():
    gradients = {}
    for loss in ("regression", "negative_cosine"):
        with float64():
            model = build(loss=loss)
            total = model(noise(), START).total
            total.backward()
        assert (loss == "regression") == (total > 1)  # the cosine's lies in [-1, 1]
        gradients[loss] = model.backbone.layer.weight.grad
    assert torch.allclose(gradients["regression"], 4 * gradients["negative_cosine"])


def test_every_view_passes_each_network_once():
    model = build()
    model(noise(), START)
    assert len(model.backbone.seen) == len(model.teacher[0].seen) == 2


def test_the_papers_views_differ_in_blur_and_solarization():
    views = BYOL.views(resolved("byol", preset="imagenet").method, 224)
    kinds = {group: (view.augmentation.blur, view.augmentation.solarize) for group, view in views.items()}
    assert kinds == {"first": (1.0, 0.0), "second": (0.1, 0.2)}
    assert all(view.area == (0.08, 1.0) and view.interpolation == "cubic" for view in views.values())


def test_the_small_preset_has_ssqls_heads_and_the_papers_has_its_own():
    widths = lambda head: [p.shape[0] for p in head.parameters() if p.dim() == 2]  # noqa: E731
    small, paper = (make(BYOL, resolved("byol", preset=name).method) for name in ("small", "imagenet"))
    assert (widths(small.projector), widths(small.predictor)) == ([2048, 2048, 512], [2048, 512])
    assert small.projector[0].bias is None
    assert (widths(paper.projector), widths(paper.predictor)) == ([4096, 256], [4096, 256])
