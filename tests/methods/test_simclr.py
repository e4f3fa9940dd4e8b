import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from ssl_core.data.loader import Batch
from ssl_core.methods.simclr import Config, SimCLR, nt_xent
from tests.methods.harness import START, batch, collapse_alarms, make

SMALL: dict[str, Any] = {"projector_hidden": 12, "embedding_dim": 5}


def build(**changes):
    return make(SimCLR, Config(**{**SMALL, **changes}))


def noise(images=16, seed=0):
    return batch(SimCLR.views(Config(), 8), images=images, seed=seed)


def rows(*sizes, dim=6):
    torch.manual_seed(0)
    return [F.normalize(torch.randn(size, dim), dim=1) for size in sizes]


def test_the_parts_of_a_batch_against_everyone_average_to_the_whole():
    first, second = rows(6, 6)
    parts = [
        nt_xent(first[at : at + 2], second[at : at + 2], temperature=0.2, everyone=(first, second), start=at)
        for at in (0, 2, 4)
    ]
    assert torch.allclose(torch.stack(parts).mean(), nt_xent(first, second, temperature=0.2))


def test_the_total_is_the_loss_of_the_models_own_embeddings():
    model = build(directions="mean").eval()
    one = noise()
    first, second = (F.normalize(model.projector(model.backbone(view)), dim=1) for view in one.views["student"])
    assert torch.allclose(model(one, START).total, nt_xent(first, second, temperature=0.5))


def test_the_official_code_adds_both_directions():
    losses = [build(directions=name)(noise(), START) for name in ("sum", "mean")]
    assert torch.allclose(losses[0].total, 2 * losses[1].total)
    assert torch.equal(losses[0].parts["contrast"], losses[1].parts["contrast"])


def test_groups_see_no_negatives_of_each_other():
    model = build(negative_groups=2, directions="mean").eval()
    one = noise()
    halves = [
        Batch({"student": [view[at : at + 8] for view in one.views["student"]]}, one.labels, one.indices)
        for at in (0, 8)
    ]
    whole = build(directions="mean").eval()
    expected = torch.stack([whole(half, START).total for half in halves]).mean()
    assert torch.allclose(model(one, START).total, expected)
    assert not torch.isclose(whole(one, START).total, expected)


def test_groups_of_one_image_are_refused():
    with pytest.raises(ValueError, match=r"batch_size 16 leaves the 16 method\.negative_groups without negatives"):
        build(negative_groups=16)


def test_both_views_get_gradient():
    model = build()
    first, second = rows(4, 4, dim=5)
    loss = model._contrast(first.requires_grad_(), second.requires_grad_())
    assert all(gradient.abs().sum() > 0 for gradient in torch.autograd.grad(loss, [first, second]))


def test_a_constant_encoder_has_the_loss_log_of_the_number_of_candidates():
    total = collapse_alarms(SimCLR, Config(**SMALL, directions="mean"))
    assert abs(total - math.log(2 * 16 - 1)) < 1e-5
