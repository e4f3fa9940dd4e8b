from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from ssl_core.data.loader import Batch
from ssl_core.methods.base import Progress, resolve
from ssl_core.methods.byol import BYOL, Config, regression_loss
from tests.methods.harness import START, batch, float64, make, remember

SMALL: dict[str, Any] = {"projector_hidden": 12, "predictor_hidden": 12, "embedding_dim": 5}


def build(**changes):
    return make(BYOL, Config(**{**SMALL, **changes}))


def noise(seed=0):
    return batch(BYOL.views(Config(), 8), seed=seed)


def test_matches_a_numpy_oracle():
    rng = np.random.default_rng(0)
    prediction, target = rng.normal(size=(3, 5)), rng.normal(size=(3, 5))
    distance = np.square(unit(prediction) - unit(target)).sum(1).mean()
    assert abs(regression_loss(torch.from_numpy(prediction), torch.from_numpy(target)).item() - distance) < 1e-6


@pytest.mark.parametrize(("sign", "expected"), [(1, 0), (-1, 4)])
def test_parallel_and_opposite_rows_by_hand(sign, expected):
    rows = torch.tensor([[3.0, 4.0], [0.0, 2.0]])
    assert regression_loss(rows, sign * 5 * rows).item() == pytest.approx(expected, abs=1e-6)


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
    predict = lambda view: unit(model.predictor(model.projector(model.backbone(view))).detach().numpy())  # noqa: E731
    teach = lambda view: unit(model.teacher(view).numpy())  # noqa: E731
    distance = lambda a, b: np.square(a - b).sum(1).mean()  # noqa: E731
    expected = distance(predict(first), teach(second)) + distance(predict(second), teach(first))
    assert model(one, START).total.item() == pytest.approx(expected, abs=1e-5)


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


def test_swapping_the_views_leaves_the_loss():
    model = build()
    one = noise()
    swapped = Batch({"first": one.views["second"], "second": one.views["first"]}, one.labels, one.indices)
    assert torch.allclose(model(one, START).total, model(swapped, START).total)


def test_the_gradient_reaches_the_predictor_and_not_the_teacher_which_has_none():
    model = build()
    model(noise(), START).total.backward()
    assert all(parameter.grad is None for parameter in model.teacher.parameters())
    assert all(parameter.grad.abs().sum() > 0 for parameter in model.predictor.parameters() if parameter.dim() == 2)
    students = [*model.backbone.parameters(), *model.projector.parameters()]
    assert [p.shape for p in model.teacher.parameters()] == [p.shape for p in students]


def test_every_view_passes_each_network_once():
    model = build()
    model(noise(), START)
    assert len(model.backbone.seen) == len(model.teacher[0].seen) == 2


def test_the_teacher_follows_after_the_optimizer_in_closed_form():
    model = build(teacher_momentum=0.5)
    start = model.teacher[0].layer.weight.clone()
    with torch.no_grad():
        model.backbone.layer.weight.add_(1)  # as an optimizer might
    for step in range(5):
        parts = [model(noise(step), Progress(step, 5, part)) for part in (0, 1)]
        remember(model, *parts, progress=Progress(step, 5))  # one update per step
    assert torch.allclose(model.teacher[0].layer.weight, start + 1 - 0.5**5)


def test_the_momentum_rises_to_one_on_a_cosine():
    model = build(teacher_momentum=0.0, final_teacher_momentum=1.0)
    start = model.teacher[0].layer.weight.clone()
    with torch.no_grad():
        model.backbone.layer.weight.add_(1)
    remember(model, progress=Progress(10, 10))
    assert torch.equal(model.teacher[0].layer.weight, start)
    remember(model, progress=Progress(5, 10))
    assert torch.allclose(model.teacher[0].layer.weight, start + 0.5)
    remember(model, progress=Progress(0, 10))
    assert torch.equal(model.teacher[0].layer.weight, model.backbone.layer.weight)


def test_equal_prediction_and_target_have_the_smallest_loss():
    same = F.normalize(torch.ones(4, 3), dim=1)
    assert regression_loss(same, same).item() == pytest.approx(0, abs=1e-6)


def test_the_papers_views_differ_in_blur_and_solarization():
    views = BYOL.views(resolved("imagenet").method, 224)
    kinds = {group: (view.augmentation.blur, view.augmentation.solarize) for group, view in views.items()}
    assert kinds == {"first": (1.0, 0.0), "second": (0.1, 0.2)}
    assert all(view.area == (0.08, 1.0) and view.interpolation == "cubic" for view in views.values())


def test_presets_have_the_values_of_their_sources():
    facts = {}
    for name in ("small", "imagenet", "imagenet_300"):
        method, training = resolved(name).method, resolved(name).training
        momentum = (method.teacher_momentum, method.final_teacher_momentum)
        facts[name] = (*momentum, training.learning_rate, training.weight_decay, training.batch_size, training.epochs)
    assert facts == {
        "small": (0.99, None, 0.05, 1e-4, 512, 400),
        "imagenet": (0.996, 1.0, 0.2, 1.5e-6, 4096, 1000),
        "imagenet_300": (0.99, 1.0, 0.3, 1e-6, 4096, 300),
    }


def test_the_small_preset_has_ssqls_heads_and_the_papers_has_its_own():
    widths = lambda head: [p.shape[0] for p in head.parameters() if p.dim() == 2]  # noqa: E731
    small, paper = (make(BYOL, resolved(name).method) for name in ("small", "imagenet"))
    assert (widths(small.projector), widths(small.predictor)) == ([2048, 2048, 512], [2048, 512])
    assert small.projector[0].bias is None
    assert (widths(paper.projector), widths(paper.predictor)) == ([4096, 256], [4096, 256])


def resolved(preset):
    spec = {"dataset": {"name": "demo"}, "backbone": {"name": "resnet18"}}
    return resolve({**spec, "method": {"name": "byol", "preset": preset}})


def unit(rows):
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)
