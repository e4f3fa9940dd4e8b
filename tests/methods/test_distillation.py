"""SimReg, CompRess, DisCo, BINGO and the distillation of features: losses against formulas written independently."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.special import log_softmax, softmax
from torch import nn

from ssl_core.blocks.cutmix import cutmix_pairs
from ssl_core.config import Backbone
from ssl_core.methods import bingo, compress, disco, feature_distillation, simreg
from ssl_core.methods.base import Progress
from ssl_core.networks.backbones import build_backbone, save_backbone
from tests.methods.harness import START, Tiny, batch, make, remember, resolved, smallest_views

NETWORK = Backbone(name="mobilenet_v3_small", stem="small")


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("teacher") / "backbone.safetensors"
    torch.manual_seed(1)
    save_backbone(path, build_backbone(NETWORK, 16), NETWORK, 16, {})
    return str(path)


def build(module: Any, weights: str, **settings: Any) -> tuple[Any, Any]:
    """Return a method around `Tiny` and a batch of its views."""
    config = module.Config(teacher={"weights": weights}, **settings)
    names = {"simreg": "SimReg", "compress": "CompRess", "disco": "DisCo", "bingo": "BINGO"}
    kind = names.get(config.name, "FeatureDistillation")
    method = getattr(module, kind)
    return make(method, config), batch(smallest_views(method, config))


def rows(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# SimReg


def test_simregs_loss_is_the_squared_distance_of_unit_vectors() -> None:
    prediction, target = rows(5, 7).numpy(), rows(5, 7, seed=1).numpy()
    units = [each / np.linalg.norm(each, axis=1, keepdims=True) for each in (prediction, target)]
    expected = ((units[0] - units[1]) ** 2).sum(axis=1).mean()
    assert abs(simreg.simreg_loss(rows(5, 7), rows(5, 7, seed=1)).item() - expected) < 1e-12


def test_simregs_head_has_the_codes_layers() -> None:
    head = simreg.regression_head(6, 10)
    shapes = [(layer.in_features, layer.out_features) for layer in head if isinstance(layer, nn.Linear)]
    assert shapes == [(6, 12), (12, 6), (6, 12), (12, 10)]
    kinds = [type(layer).__name__ for layer in head]
    assert kinds == ["Linear", "BatchNorm1d", "ReLU", "Linear", "Linear", "BatchNorm1d", "ReLU", "Linear"]


def test_simreg_predicts_the_teachers_pooled_features(weights: str) -> None:
    model, one = build(simreg, weights)
    losses = model(one, START)
    target = model.teacher(one.views["both"][0])
    prediction = losses.embedding
    expected = (F.normalize(prediction, dim=1) - F.normalize(target, dim=1)).square().sum(dim=1).mean()
    assert math.isclose(losses.total.item(), expected.item(), rel_tol=1e-5)


# CompRess


def test_the_divergence_matches_scipy() -> None:
    student, teacher = rows(4, 9), 3 * rows(4, 9, seed=1)
    p, q = softmax(teacher.numpy(), axis=1), log_softmax(student.numpy(), axis=1)
    expected = (p * (np.log(p) - q)).sum(axis=1).mean()
    assert abs(compress.compress_loss(student, teacher).item() - expected) < 1e-12
    assert compress.compress_loss(teacher, teacher).item() == 0


def test_both_queues_hold_features_of_the_same_images(weights: str) -> None:
    model, one = build(compress, weights, queue_size=24)
    images = one.views["both"][0]
    losses = model(one, START)
    student, teacher = F.normalize(model.backbone(images), dim=1), F.normalize(model.teacher(images), dim=1)
    logits = [student @ model.queue.rows.T / 0.04, teacher @ model.teacher_queue.rows.T / 0.04]
    expected = F.kl_div(F.log_softmax(logits[0], dim=1), F.softmax(logits[1], dim=1), reduction="batchmean")
    assert math.isclose(losses.total.item(), expected.item(), rel_tol=1e-4)
    remember(model, losses)
    torch.testing.assert_close(model.queue.rows[: len(images)], student.detach())  # the average is still the student
    torch.testing.assert_close(model.teacher_queue.rows[: len(images)], teacher)


@pytest.mark.parametrize(("module", "settings"), [(compress, {}), (disco, {"batchnorm_splits": 1})])
def test_the_keys_network_follows_the_student_after_each_step(module: Any, settings: Any, weights: str) -> None:
    model, one = build(module, weights, queue_size=24, key_momentum=0.75, **settings)
    start = model.keys[0].layer.weight.clone()
    losses = model(one, START)
    with torch.no_grad():
        model.backbone.layer.weight.add_(1)
    remember(model, losses)
    torch.testing.assert_close(model.keys[0].layer.weight, start + 0.25)


# DisCo


def test_disco_is_moco_and_the_codes_sum_of_squares(weights: str) -> None:
    model, one = build(disco, weights, queue_size=24, batchnorm_splits=1)
    query_view, key_view = one.views["query"][0], one.views["key"][0]
    q, qk = (F.normalize(model.projector(model.backbone(view)), dim=1) for view in (query_view, key_view))
    k = F.normalize(model.keys(key_view), dim=1)
    teacher_q, teacher_qk = (F.normalize(model.teacher(view), dim=1) for view in (query_view, key_view))
    # As in the authors' code, with the images of a process in place of the batch: sums over images and dimensions.
    logits = torch.cat([torch.einsum("nc,nc->n", q, k)[:, None], torch.einsum("nc,kc->nk", q, model.queue.rows)], 1)
    contrast = F.cross_entropy(logits / 0.2, torch.zeros(len(q), dtype=torch.long))
    squares = nn.MSELoss(reduction="sum")(teacher_q, q) + nn.MSELoss(reduction="sum")(teacher_qk, qk)
    losses = model(one, START)
    expected = contrast + squares * 32 / len(q)
    assert math.isclose(losses.total.item(), expected.item(), rel_tol=1e-4)


# BINGO


@pytest.mark.parametrize(("fraction", "across"), [(0, 0.0), (10.99 / 200, 0.0), (11 / 200, 0.5), (0.9, 0.5)])
def test_bingo_is_the_codes_sum_of_cross_entropies(fraction: float, across: float, weights: str) -> None:
    model, one = build(bingo, weights, queue_size=24, batchnorm_splits=1, teacher_mode="eval")
    progress = Progress(round(20_000 * fraction), 20_000)
    image, neighbour = one.views["query"][0], one.views["neighbour_query"][0]
    mixed, share = cutmix_pairs(image, neighbour, alpha=2.0, generator=np.random.default_rng([0, progress.step, 0]))
    queries = [F.normalize(model.projector(model.backbone(view)), dim=1) for view in (image, neighbour, mixed)]
    keys = [F.normalize(model.teacher(one.views[group][0]), dim=1) for group in ("key", "neighbour_key")]
    queries, keys = ([rows.detach().double().numpy() for rows in many] for many in (queries, keys))
    queue = model.queue.rows.double().numpy()
    weights_of = [(1 - across, across), (across, 1 - across), (share, 1 - share)]
    expected = 0.0
    for query, pair in zip(queries, weights_of, strict=True):
        for key, weight in zip(keys, pair, strict=True):
            logits = np.concatenate([(query * key).sum(axis=1)[:, None], query @ queue.T], axis=1) / 0.2
            expected -= weight * log_softmax(logits, axis=1)[:, 0].mean() / 3
    losses = model(one, progress)
    assert math.isclose(losses.total.item(), expected, rel_tol=1e-5)
    remember(model, losses)
    np.testing.assert_allclose(model.queue.rows[: len(image)].numpy(), keys[0], atol=1e-6)  # none of the neighbours


def test_cutmix_of_pairs_keeps_the_share_of_pixels_that_it_returns() -> None:
    images, others = torch.zeros(1, 3, 90, 100), torch.ones(1, 3, 90, 100)
    shares = []
    for seed in range(400):
        mixed, share = cutmix_pairs(images, others, alpha=2.0, generator=np.random.default_rng(seed))
        assert math.isclose(1 - mixed.mean().item(), share, rel_tol=1e-5, abs_tol=1e-6)
        shares.append(share)
    # Of a side s, with s^2 ~ Beta(2, 2), the part s / 4 is outside on average: 1 - E[s^2 (1 - s / 4)^2].
    assert math.isclose(float(np.mean(shares)), 1 - (0.5 - 0.381 / 2 + 0.3 / 16), abs_tol=0.03)


def test_the_teachers_batch_normalisation_follows_its_mode(weights: str) -> None:
    """In train mode a key depends on the other images; the loss is then that of shuffled parts of the batch."""
    for mode, same in (("eval", True), ("train", False)):
        model, one = build(bingo, weights, queue_size=24, batchnorm_splits=2, teacher_mode=mode)
        model.train()
        view = one.views["key"][0]
        first, second = model._key(view, 0), model._key(torch.cat([view[:8], 5 * view[8:]]), 0)
        assert torch.allclose(first[:8], second[:8], atol=1e-5) == same
        model.eval()
        torch.testing.assert_close(model._key(view, 0)[:8], model._key(view[:8], 0), atol=1e-5, rtol=1e-5)


# Features and maps


@pytest.mark.parametrize("loss", ["cosine", "mse"])
def test_the_distance_of_maps_is_the_mean_over_their_cells(loss: str) -> None:
    prediction, target = rows(2, 5, 3, 4), rows(2, 5, 3, 4, seed=1)
    cells = []
    for image in range(2):
        for row in range(3):
            for column in range(4):
                p, t = prediction[image, :, row, column].numpy(), target[image, :, row, column].numpy()
                cosine = p @ t / np.linalg.norm(p) / np.linalg.norm(t)
                cells.append(1 - cosine if loss == "cosine" else ((p - t) ** 2).mean())
    assert abs(feature_distillation.distance(prediction, target, loss=loss).item() - np.mean(cells)) < 1e-12


def test_a_larger_map_of_the_teacher_is_averaged_to_the_students() -> None:
    maps = rows(1, 2, 4, 4)
    constant = torch.ones(1, 2, 4, 4)
    assert torch.equal(feature_distillation.resized(maps, (4, 4)), maps)
    smaller = feature_distillation.resized(maps, (2, 2))
    assert smaller.shape == (1, 2, 2, 2)
    torch.testing.assert_close(feature_distillation.resized(constant, (2, 2)), constant[..., :2, :2])
    torch.testing.assert_close(smaller.mean(), maps.mean(), atol=0.2, rtol=0)


def test_each_part_has_its_weight_and_a_part_without_weight_has_no_head(weights: str) -> None:
    totals = {}
    for pooled, spatial in [(1, 1), (2, 1), (1, 0), (0, 1)]:
        model, one = build(feature_distillation, weights, pooled_weight=pooled, spatial_weight=spatial, head_hidden=8)
        losses = model(one, START)
        parts = losses.parts
        expected = pooled * parts.get("pooled", 0) + spatial * parts.get("spatial", 0)
        assert math.isclose(losses.total.item(), float(expected), rel_tol=1e-6)
        totals[pooled, spatial] = {name.split(".")[0] for name, _ in model.named_parameters()}
    assert "map_predictor" not in totals[1, 0]
    assert "predictor" not in totals[0, 1]


def test_a_transformers_patches_are_distilled_into_a_convolutional_students_map(tmp_path: Path) -> None:
    network, path = Backbone(name="timm/test_vit"), tmp_path / "vit.pth"
    torch.manual_seed(0)
    torch.save(build_backbone(network, 96).state_dict(), path)
    teacher = {"weights": str(path), "backbone": network, "size": 32, "trained_size": 96}
    config = feature_distillation.Config.model_validate({"teacher": teacher, "head_hidden": 8})
    model = make(feature_distillation.FeatureDistillation, config)
    one = batch(smallest_views(feature_distillation.FeatureDistillation, config))
    losses = model(one, START)
    features, patches = model.teacher.features_and_map(one.views["both"][0])
    assert (features.shape, patches.shape) == ((16, 64), (16, 64, 2, 2))
    losses.total.backward()
    assert model.map_predictor[3].weight.shape == (64, 8, 1, 1)
    assert isinstance(model.backbone, Tiny)


def test_settings_that_distil_nothing_are_refused(weights: str) -> None:
    with pytest.raises(ValueError, match="pooled_weight and spatial_weight are both 0"):
        build(feature_distillation, weights, pooled_weight=0, spatial_weight=0)
    with pytest.raises(ValueError, match=r"teacher\.projector has no effect"):
        feature_distillation.Config.model_validate({"teacher": {"weights": weights, "projector": weights}})


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("simreg", {"learning_rate": 0.05, "epochs": 130, "schedule": "cosine", "weight_decay": 1e-4}),
        ("compress", {"learning_rate": 0.01, "milestones": (90, 120), "decay_factor": 0.2, "schedule": "step"}),
        ("bingo", {"learning_rate": 0.03, "epochs": 200, "learning_rate_scaling": "none", "batch_size": 256}),
        ("disco", {"learning_rate": 0.03, "epochs": 200, "learning_rate_scaling": "none", "batch_size": 256}),
    ],
)
def test_the_presets_have_the_published_values(name: str, expected: dict[str, Any]) -> None:
    training = resolved(name, teacher={"weights": "some.safetensors"}).training.model_dump()
    assert {key: training[key] for key in expected} == expected
