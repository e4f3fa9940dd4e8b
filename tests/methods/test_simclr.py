import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from ssl_core.data.loader import Batch
from ssl_core.methods.base import resolve
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


def test_matches_a_numpy_oracle_in_double_precision():
    first, second = (row.double() for row in rows(3, 3))
    found = nt_xent(first, second, temperature=0.2)
    assert abs(found.item() - oracle(first.numpy(), second.numpy(), 0.2)) < 1e-12


def test_two_images_by_hand():
    # e_1 and e_2, both views alike: each view has its partner at cosine 1 and two others at 0.
    eye = torch.eye(2)
    expected = math.log(1 + 2 * math.exp(-2))
    assert abs(nt_xent(eye, eye, temperature=0.5).item() - expected) < 1e-6


def test_a_view_is_never_its_own_candidate():
    # With itself among the candidates the loss of perfect pairs would be ln 2.
    eye = torch.eye(8)
    assert nt_xent(eye, eye, temperature=0.05) < 1e-2


def test_permuting_the_batch_leaves_the_loss_and_swapping_partners_does_not():
    first, second = rows(6, 6)
    order = torch.randperm(6)
    loss = nt_xent(first, second, temperature=0.2)
    assert torch.allclose(nt_xent(first[order], second[order], temperature=0.2), loss)
    assert not torch.isclose(nt_xent(first, second.roll(1, 0), temperature=0.2), loss)


def test_the_parts_of_a_batch_against_everyone_average_to_the_whole():
    first, second = rows(6, 6)
    parts = [
        nt_xent(first[at : at + 2], second[at : at + 2], temperature=0.2, everyone=(first, second), start=at)
        for at in (0, 2, 4)
    ]
    assert torch.allclose(torch.stack(parts).mean(), nt_xent(first, second, temperature=0.2))


def test_the_total_is_the_oracles_of_the_models_own_embeddings():
    model = build(directions="mean").eval()
    one = noise()
    first, second = (F.normalize(model.projector(model.backbone(view)), dim=1) for view in one.views["student"])
    expected = oracle(first.detach().double().numpy(), second.detach().double().numpy(), 0.5)
    assert abs(model(one, START).total.item() - expected) < 1e-6


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


def test_presets_have_the_values_of_their_sources():
    facts = {}
    for name in ("cifar", "imagenet", "cao_wu"):
        spec = {"dataset": {"name": "demo"}, "backbone": {"name": "resnet18"}}
        found = resolve({**spec, "method": {"name": "simclr", "preset": name}})
        method, training = found.method, found.training
        facts[name] = (
            method.temperature,
            method.augmentation.blur,
            method.embedding_dim,
            training.optimizer,
            training.learning_rate,
            training.batch_size,
            training.epochs,
        )
    assert facts == {
        "cifar": (0.5, 0.0, 128, "lars", 1.0, 512, 1000),
        "imagenet": (0.1, 0.5, 128, "lars", 0.3, 4096, 1000),
        "cao_wu": (0.5, 0.0, 256, "sgd", 0.5, 512, 400),
    }


def oracle(first, second, temperature):
    """NT-Xent by its definition, one anchor at a time."""
    views = np.concatenate([first, second])
    losses = []
    for anchor in range(len(views)):
        partner = (anchor + len(first)) % len(views)
        similarity = np.exp(views @ views[anchor] / temperature)
        losses.append(-np.log(similarity[partner] / (similarity.sum() - similarity[anchor])))
    return np.mean(losses)
