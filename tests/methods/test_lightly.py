"""Losses agree with lightly's. In one file, whose first test imports it: that takes seconds."""

import importlib
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ssl_core.blocks.losses import info_nce
from ssl_core.blocks.multicrop import balance
from ssl_core.methods import barlow_twins, dino, lejepa, nnclr, swav, vicreg
from ssl_core.methods.byol import regression_loss
from ssl_core.methods.simclr import nt_xent
from ssl_core.methods.simsiam import negative_cosine
from tests.methods.harness import START, batch, make

CLOSE: dict[str, Any] = {"atol": 1e-5, "rtol": 1e-5}
TWO_LOCALS: dict[str, Any] = {"num_locals": 2, "local_size": 6}


@pytest.fixture(scope="module")
def lightly() -> Any:
    return importlib.import_module("lightly.loss")


def rows(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def unit(*shape: int, seed: int = 0) -> Tensor:
    return F.normalize(rows(*shape, seed=seed), dim=-1)


def cosines(*shape: int, seed: int = 0) -> Tensor:
    return unit(*shape[:-1], 16, seed=seed) @ unit(shape[-1], 16, seed=seed + 100).T


@pytest.mark.parametrize("temperature", [0.1, 0.5])
def test_simclrs_loss_and_its_gradient_are_nt_xent(temperature, lightly):
    views = [rows(8, 6, seed=seed).requires_grad_() for seed in (0, 1)]
    theirs = lightly.NTXentLoss(temperature=temperature)(*views)
    ours = nt_xent(*(F.normalize(view, dim=1) for view in views), temperature=temperature)
    torch.testing.assert_close(ours, theirs, **CLOSE)
    torch.testing.assert_close(torch.autograd.grad(ours, views), torch.autograd.grad(theirs, views), **CLOSE)


def test_mocos_loss_is_nt_xent_with_a_memory_bank(lightly):
    query, key = unit(8, 6), unit(8, 6, seed=1)
    theirs = lightly.NTXentLoss(temperature=0.3, memory_bank_size=(16, 6))
    expected = theirs(query, key)  # without a gradient it leaves the bank alone
    torch.testing.assert_close(info_nce(query, key, theirs.memory_bank.bank, temperature=0.3), expected, **CLOSE)


def test_simsiams_and_byols_losses_are_the_negative_cosine(lightly):
    prediction, target = rows(8, 6), rows(8, 6, seed=1)
    expected = lightly.NegativeCosineSimilarity()(prediction, target)
    torch.testing.assert_close(negative_cosine(prediction, target), expected, **CLOSE)
    torch.testing.assert_close(regression_loss(prediction, target), 2 + 2 * expected, **CLOSE)


@pytest.mark.parametrize("num_locals", [0, 1, 6])
def test_dinos_loss_and_its_centre(num_locals, lightly):
    reference = lightly.DINOLoss(output_dim=6, teacher_temp=0.04, student_temp=0.1)
    centre = torch.zeros(6)
    for seed in range(3):
        student, teacher = rows(2 + num_locals, 4, 6, seed=seed), rows(2, 4, 6, seed=10 + seed)
        expected = reference(list(teacher), list(student))
        pairs = dino.distillation_loss(student, teacher, centre, student_temperature=0.1, teacher_temperature=0.04)
        torch.testing.assert_close(balance(pairs, None)[0], expected, **CLOSE)
        centre.lerp_(teacher.mean(dim=(0, 1)), 0.1)
        torch.testing.assert_close(centre, reference.center.flatten())


def test_dino_computes_the_loss_of_its_parts(lightly):
    config = dino.Config(num_outputs=10, head_hidden=12, bottleneck_dim=5, **TWO_LOCALS)
    model, one = make(dino.DINO, config).eval(), batch(dino.DINO.views(config, 8))
    every = [view for group in one.views.values() for view in group]
    student = [model.head(model.backbone(view)) for view in every]
    teacher = [model.teacher(view) for view in every[:2]]
    expected = lightly.DINOLoss(output_dim=10, teacher_temp=0.04, student_temp=0.1)(teacher, student)
    torch.testing.assert_close(model(one, START).total, expected, **CLOSE)


@pytest.mark.parametrize("iterations", [1, 3])
def test_swavs_sinkhorn(iterations, lightly):
    scores = cosines(32, 12)
    expected = lightly.swav_loss.sinkhorn(scores, iterations=iterations, epsilon=0.05)
    torch.testing.assert_close(swav.sinkhorn(scores, epsilon=0.05, iterations=iterations), expected, **CLOSE)


@pytest.mark.parametrize("num_locals", [0, 3])
@pytest.mark.parametrize("queued", [False, True])
def test_swavs_loss(num_locals, queued, lightly):
    scores = [cosines(8, 6, seed=seed) for seed in range(2 + num_locals)]
    queue = [cosines(16, 6, seed=seed) for seed in (20, 21)] if queued else None
    expected = lightly.SwaVLoss(temperature=0.1)(scores[:2], scores[2:], queue)
    together = [torch.cat([scores[i], queue[i]]) if queue else scores[i] for i in (0, 1)]
    codes = torch.stack([swav.sinkhorn(each, epsilon=0.05, iterations=3)[:8] for each in together])
    total, _ = balance(swav.swapped_prediction(torch.stack(scores), codes, temperature=0.1), None)
    torch.testing.assert_close(total, expected.squeeze(), **CLOSE)


def test_swav_computes_the_loss_of_its_parts(lightly):
    config = swav.Config(num_prototypes=10, projector_hidden=12, embedding_dim=5, queue_size=0, **TWO_LOCALS)
    model, one = make(swav.SwAV, config).eval(), batch(swav.SwAV.views(config, 8))
    every = [view for group in one.views.values() for view in group]
    scores = [F.normalize(model.projector(model.backbone(view)), dim=1) @ model.prototypes.T for view in every]
    expected = lightly.SwaVLoss(temperature=0.1)(scores[:2], scores[2:])
    torch.testing.assert_close(model(one, START).total, expected.squeeze(), **CLOSE)


def two_embeddings(model: Any, one: Any) -> list[Tensor]:
    return [model.projector(model.backbone(one.views[group][0])) for group in ("first", "second")]


def test_vicreg_computes_the_loss_of_its_parts(lightly):
    config = vicreg.Config(embedding_dim=12, invariance_weight=20, variance_weight=15, covariance_weight=2)
    model, one = make(vicreg.VICReg, config), batch(vicreg.VICReg.views(config, 8))
    reference = lightly.VICRegLoss(lambda_param=20, mu_param=15, nu_param=2)
    torch.testing.assert_close(model(one, START).total, reference(*two_embeddings(model, one)), **CLOSE)


def test_barlow_twins_computes_the_loss_of_its_parts(lightly):
    config = barlow_twins.Config(embedding_dim=12, redundancy_weight=0.02, loss_scale=0.5)
    model, one = make(barlow_twins.BarlowTwins, config), batch(barlow_twins.BarlowTwins.views(config, 8))
    expected = 0.5 * lightly.BarlowTwinsLoss(lambda_param=0.02)(*two_embeddings(model, one))
    torch.testing.assert_close(model(one, START).total, expected, **CLOSE)


def test_nnclrs_neighbours(lightly):
    module = importlib.import_module("lightly.models.modules").NNMemoryBankModule(size=(16, 6))
    module.bank = unit(16, 6)
    found = nnclr.nearest(unit(8, 6, seed=1), unit(16, 6))
    torch.testing.assert_close(found, module(unit(8, 6, seed=1), update=False), **CLOSE)


@pytest.mark.parametrize("num_locals", [1, 3])
def test_lejepas_loss(num_locals, lightly, monkeypatch):
    config = lejepa.Config(
        gaussian_weight=0.1, num_directions=7, num_points=9, max_frequency=2, projector_hidden=12, embedding_dim=5,
        num_locals=num_locals, local_size=6,
    )  # fmt: skip
    model, one = make(lejepa.LeJEPA, config).eval(), batch(lejepa.LeJEPA.views(config, 8))
    reference = lightly.LeJEPALoss(lambda_param=0.1, sigreg_knots=9, sigreg_t_max=2.0, sigreg_num_vectors=7)
    generator = torch.Generator().manual_seed(START.step)
    directions = torch.randn(5, 7, generator=generator)
    monkeypatch.setattr(reference.sigreg, "_generate_unit_vectors", lambda *_: F.normalize(directions, dim=0))
    many = {
        group: torch.stack([model.projector(model.backbone(view)) for view in one.views[group]]) for group in one.views
    }
    expected = reference(global_proj=many["global"], local_proj=many["local"])
    torch.testing.assert_close(model(one, START).total, expected, **CLOSE)
