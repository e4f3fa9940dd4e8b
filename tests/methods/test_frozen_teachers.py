"""ReSSL, SwAV and DINO with a frozen network in place of one branch: targets, files of heads, refusals."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from scipy.special import log_softmax, softmax
from torch import Tensor

from ssl_core.blocks.frozen_teacher import FrozenTeacher, Teacher
from ssl_core.config import Backbone
from ssl_core.methods.base import Progress
from ssl_core.methods.dino import DINO, load_head
from ssl_core.methods.dino import Config as DINOConfig
from ssl_core.methods.ressl import Config as ReSSLConfig
from ssl_core.methods.ressl import ReSSL
from ssl_core.methods.swav import Config as SwAVConfig
from ssl_core.methods.swav import SwAV, sinkhorn
from ssl_core.networks.backbones import build_backbone, save_backbone, write_tensors
from ssl_core.networks.heads import mlp
from tests.methods.harness import CPU, START, Noise, batch, make, remember, resolved, smallest_views, step

NETWORK = Backbone(name="mobilenet_v3_small", stem="small")
WIDTH = 1024  # of its features
RESSL: Any = {"queue_size": 16, "projector_hidden": 12, "warmup": 0.0}
SWAV: Any = {"num_prototypes": 10, "projector_hidden": 12, "queue_size": 0, "freeze": 0.0}
DINO_SIZES: Any = {"num_outputs": 10, "head_hidden": 12, "bottleneck_dim": 5}
PROTOTYPES = torch.randn(10, 5, generator=torch.Generator().manual_seed(2))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A backbone, a projector alone and with SwAV's prototypes, and the heads of a DINO run and of another network."""
    folder = tmp_path_factory.mktemp("teacher")
    torch.manual_seed(1)
    save_backbone(folder / "backbone.safetensors", build_backbone(NETWORK, 16), NETWORK, 16, {})
    projector = {f"projector.{name}": tensor for name, tensor in mlp([WIDTH, 5]).state_dict().items()}
    write_tensors(folder / "plain.safetensors", projector, {})
    write_tensors(folder / "swav.safetensors", {**projector, "prototypes": PROTOTYPES}, {})
    write_tensors(folder / "converted.safetensors", {**projector, "projector.prototypes": PROTOTYPES}, {})
    model = make(DINO, DINOConfig(**DINO_SIZES))
    write_tensors(folder / "narrow.safetensors", model.state_dict(), {})
    model.head = type(model.head)(WIDTH, DINOConfig(**DINO_SIZES))
    write_tensors(folder / "dino.safetensors", model.state_dict(), {})
    return folder


def teacher(folder: Path, head: str | None) -> Mapping[str, str]:
    section = {"weights": str(folder / "backbone.safetensors")}
    return section if head is None else {**section, "projector": str(folder / head)}


def build(method: Any, config: Any, folder: Path, head: str | None, **settings: Any) -> tuple[Any, Any]:
    complete = config(teacher=teacher(folder, head), **settings)
    return make(method, complete), batch(smallest_views(method, complete))


def unit(rows: Tensor) -> Tensor:
    return F.normalize(rows, dim=1)


# ReSSL


def test_ressls_student_learns_the_frozen_networks_similarities_of_the_weak_view(folder: Path) -> None:
    model, one = build(ReSSL, ReSSLConfig, folder, None, **RESSL)
    losses = model(one, START)
    weak = unit(model.teacher(one.views["teacher"][0]))  # as wide as its pooled features
    target = softmax(weak.numpy() @ model.queue.rows.numpy().T / 0.04, axis=1)
    prediction = log_softmax(losses.embedding.numpy() @ model.queue.rows.numpy().T / 0.1, axis=1)
    assert losses.embedding.shape == (16, WIDTH)
    assert math.isclose(losses.total.item(), -(target * prediction).sum(axis=1).mean(), rel_tol=1e-4)
    remember(model, losses)
    torch.testing.assert_close(model.queue.rows, weak)


def test_a_frozen_teacher_needs_no_split_batchnorm(folder: Path) -> None:
    model, _ = build(ReSSL, ReSSLConfig, folder, "plain.safetensors", predictor=False, **RESSL)
    assert model.splits == 1
    assert type(model.backbone.norm) is torch.nn.BatchNorm2d


# SwAV


@pytest.mark.parametrize("head", ["plain.safetensors", "swav.safetensors"])
def test_swavs_codes_are_those_of_the_frozen_networks_embeddings(folder: Path, head: str) -> None:
    model, one = build(SwAV, SwAVConfig, folder, head, **SWAV)
    losses = model(one, START)
    views = one.views["global"]
    codes = [sinkhorn(unit(model.teacher(view)) @ model.prototypes.T, epsilon=0.05, iterations=3) for view in views]
    embeddings = [unit(model.projector(model.backbone(torch.cat(views)))).detach()[part] for part in halves()]
    pairs = []
    for code, other in ((codes[0], embeddings[1]), (codes[1], embeddings[0])):
        prediction = log_softmax((other @ model.prototypes.T / 0.1).detach().numpy(), axis=1)
        pairs.append(-(code.detach().numpy() * prediction).sum(axis=1).mean())
    assert math.isclose(losses.total.item(), sum(pairs) / 2, rel_tol=1e-4)


def halves() -> list[slice]:
    return [slice(0, 16), slice(16, 32)]


@pytest.mark.parametrize(
    ("head", "kept"), [("swav.safetensors", True), ("converted.safetensors", True), ("plain.safetensors", False)]
)
def test_prototypes_of_the_teachers_file_are_kept_and_others_are_learned(folder: Path, head: str, kept: bool) -> None:
    model, one = build(SwAV, SwAVConfig, folder, head, **SWAV)
    start = model.prototypes.detach().clone()
    if kept:
        torch.testing.assert_close(start, unit(PROTOTYPES))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    for number in range(2):
        step(model, optimizer, one, Progress(number, 10))
    assert torch.equal(model.prototypes, start) == kept


def test_swavs_queues_hold_the_teachers_embeddings(folder: Path) -> None:
    settings = {**SWAV, "queue_size": 16, "queue_start": 0.0}
    model, one = build(SwAV, SwAVConfig, folder, "plain.safetensors", **settings)
    remember(model, model(one, START))
    for queue, view in zip(model.queues, one.views["global"], strict=True):
        torch.testing.assert_close(queue.rows, unit(model.teacher(view)))


# DINO


def test_dino_learns_the_outputs_of_the_frozen_networks_head(folder: Path) -> None:
    model, one = build(DINO, DINOConfig, folder, "dino.safetensors", **DINO_SIZES)
    model.centre.copy_(torch.linspace(-0.1, 0.1, 10))
    losses = model(one, START)
    views = [one.views["global_first"][0], one.views["global_second"][0]]
    head, _ = load_head(folder / "dino.safetensors", WIDTH)
    plain = FrozenTeacher(Teacher.model_validate(teacher(folder, None)))  # pooled features
    with torch.no_grad():
        targets = [softmax(((head.eval()(plain(view)) - model.centre) / 0.04).numpy(), axis=1) for view in views]
        logits = model.head(model.backbone(torch.cat(views)))
    pairs = []
    for target, part in zip(targets, reversed(halves()), strict=True):
        pairs.append(-(target * log_softmax((logits[part] / 0.1).numpy(), axis=1)).sum(axis=1).mean())
    assert math.isclose(losses.total.item(), sum(pairs) / 2, rel_tol=1e-4)
    before = model.centre.clone()
    remember(model, losses)
    assert not torch.equal(model.centre, before)


@pytest.mark.parametrize("batchnorm", [True, False])
def test_a_head_that_was_read_computes_what_the_run_did(batchnorm: bool, tmp_path: Path) -> None:
    config = DINOConfig(head_batchnorm=batchnorm, norm_last_layer=False, **DINO_SIZES)
    model = make(DINO, config).eval()
    model.head.length.data += torch.rand(10, 1)
    write_tensors(tmp_path / "model.safetensors", model.state_dict(), {})
    head, num_outputs = load_head(tmp_path / "model.safetensors", 6)
    rows = torch.randn(4, 6)
    assert num_outputs == 10
    torch.testing.assert_close(head.eval()(rows), model.head(rows))


# Common


@pytest.mark.parametrize(
    ("method", "config", "head", "settings"),
    [
        (ReSSL, ReSSLConfig, "plain.safetensors", RESSL),
        (SwAV, SwAVConfig, "swav.safetensors", SWAV),
        (DINO, DINOConfig, "dino.safetensors", DINO_SIZES),
    ],
)
def test_the_teacher_is_fitted_to_the_data_and_is_not_stored(
    folder: Path, method: Any, config: Any, head: str, settings: Any
) -> None:
    model, _ = build(method, config, folder, head, **settings)
    model.prepare(Noise({}, 16), CPU)
    assert not torch.equal(model.teacher.scale, torch.ones(3, 1, 1))
    assert [name for name in model.state_dict() if name.startswith("teacher")] == ["teacher.scale", "teacher.shift"]
    groups = [view for view in smallest_views(method, model.config).values() if "teacher" in view.seen_by]
    assert groups


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        ("ressl", "embedding_dim", 64),
        ("ressl", "teacher_momentum", 0.99),
        ("ressl", "final_teacher_momentum", 1.0),
        ("swav", "embedding_dim", 64),
        ("dino", "teacher_momentum", 0.99),
    ],
)
def test_keys_of_the_momentum_teacher_are_refused(name: str, key: str, value: Any) -> None:
    section = {"weights": "some.safetensors", "projector": "some.safetensors"}
    with pytest.raises(ValueError, match=rf"method\.{key} has no effect here: .*frozen teacher"):
        resolved(name, teacher=section, **{key: value})
    resolved(name, **{key: value})


def test_dino_needs_a_head_that_fits(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"method: teacher\.projector is missing: DINO learns the outputs of"):
        resolved("dino", teacher={"weights": "some.safetensors"})
    for head, message in [
        ("plain.safetensors", r"plain\.safetensors has no head of DINO, expected the model\.safetensors of a DINO run"),
        ("narrow.safetensors", r"its head takes 6 features, the teacher's backbone gives 1024"),
    ]:
        with pytest.raises(ValueError, match=message):
            build(DINO, DINOConfig, folder, head, **DINO_SIZES)
    with pytest.raises(ValueError, match=r"method\.num_outputs: .* has 10 outputs, found 12: set num_outputs: 10"):
        build(DINO, DINOConfig, folder, "dino.safetensors", **{**DINO_SIZES, "num_outputs": 12})


def test_another_number_of_prototypes_than_the_files_is_refused(folder: Path) -> None:
    message = r"has 10 prototypes of width 5, expected 12 of width 5: set method\.num_prototypes: 10"
    with pytest.raises(ValueError, match=message):
        build(SwAV, SwAVConfig, folder, "swav.safetensors", **{**SWAV, "num_prototypes": 12})
