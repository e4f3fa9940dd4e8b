"""The frozen teacher: kinds of files, normalisation, mode, and a state without its weights."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torchvision.transforms.functional import normalize

from ssl_core.blocks.frozen_teacher import FrozenTeacher, Teacher, load_projector
from ssl_core.config import Backbone
from ssl_core.networks.backbones import build_backbone, load_backbone, save_backbone, write_tensors
from ssl_core.networks.heads import mlp
from tests.methods.harness import CPU, Noise

NETWORK = Backbone(name="mobilenet_v3_small", stem="small")
HEADER = {"mean": "[0.1, 0.2, 0.3]", "std": "[0.5, 0.5, 0.5]"}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A backbone file of this project, its projector, the same backbone as plain files, and both in one file."""
    folder = tmp_path_factory.mktemp("teacher")
    torch.manual_seed(1)
    backbone, projector = build_backbone(NETWORK, 16), mlp([1024, 12, 5])
    with torch.no_grad():
        backbone.train()(torch.randn(64, 3, 16, 16))  # BatchNorm statistics that are not the initial ones
        projector.train()(torch.randn(64, 1024))
    save_backbone(folder / "backbone.safetensors", backbone, NETWORK, 16, HEADER)
    weights = {f"projector.{name}": weight for name, weight in projector.state_dict().items()}
    write_tensors(folder / "model.safetensors", {**weights, "queue.rows": torch.ones(3, 5)}, {"experiment": "teacher"})
    plain = {**backbone.state_dict(), "classifier.3.weight": torch.ones(2)}
    write_tensors(folder / "plain.safetensors", plain, {})
    torch.save(plain, folder / "plain.pth")
    save_backbone(folder / "both.safetensors", backbone, NETWORK, 16, HEADER, projector.state_dict())
    return folder


def teacher(files, weights="backbone.safetensors", projector=None, **settings):
    head = None if projector is None else str(files / projector)
    return FrozenTeacher(Teacher(weights=str(files / weights), projector=head, **settings))


def images(size=16):
    return torch.randn(4, 3, size, size, generator=torch.Generator().manual_seed(0))


def test_all_kinds_of_files_give_the_same_features(files):
    reference, _ = load_backbone(files / "backbone.safetensors")
    with torch.no_grad():
        expected = reference.eval()(images())
    plain = {"backbone": NETWORK, "size": 16}
    for weights, settings in [
        ("backbone.safetensors", {}),
        ("both.safetensors", {}),
        ("plain.safetensors", plain),
        ("plain.pth", plain),
    ]:
        assert torch.equal(teacher(files, weights, **settings)(images()), expected), weights


def test_the_projector_comes_from_its_own_or_from_the_same_file(files):
    one = teacher(files, projector="model.safetensors")
    other = teacher(files, "both.safetensors", projector="both.safetensors")
    assert (one.dim, one.num_features) == (5, 1024)
    assert torch.equal(one(images()), other(images()))
    assert torch.equal(one(images()), one.network[1](teacher(files)(images())))


def test_it_never_changes_and_has_no_gradient(files):
    model: Any = nn.ModuleDict({"teacher": teacher(files)}).train()
    network = model["teacher"].network
    before = [tensor.clone() for tensor in (*network.parameters(), *network.buffers())]
    view = images().requires_grad_()
    assert not model["teacher"](view).requires_grad
    assert not any(module.training for module in model["teacher"].modules())
    after = (*network.parameters(), *network.buffers())
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_its_state_is_its_normalisation_alone_and_loads_strictly(files):
    model: Any = nn.ModuleDict({"teacher": teacher(files)})
    model["teacher"].prepare(Noise({}, 16), CPU)
    state = model.state_dict()
    assert list(state) == ["teacher.scale", "teacher.shift"]
    other = nn.ModuleDict({"teacher": teacher(files)})
    other.load_state_dict(state)
    assert torch.equal(other["teacher"](images()), model["teacher"](images()))
    with pytest.raises(RuntimeError, match=r"Missing key\(s\) in state_dict: \"teacher.shift\""):
        other.load_state_dict({"teacher.scale": state["teacher.scale"]})
    with pytest.raises(RuntimeError, match="Unexpected key"):
        other.load_state_dict({**state, "teacher.other": torch.ones(1)})


def test_it_sees_pictures_in_its_own_normalisation(files):
    pixels, mean, std = torch.rand(4, 3, 16, 16), (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)  # the loader's
    plain = {"weights": "plain.safetensors", "backbone": NETWORK, "size": 16}
    other = {**plain, "mean": (0.2, 0.2, 0.2), "std": (0.3, 0.3, 0.3)}
    for settings, own_mean, own_std in [
        ({}, (0.1, 0.2, 0.3), (0.5, 0.5, 0.5)),
        (plain, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        (other, (0.2, 0.2, 0.2), (0.3, 0.3, 0.3)),
    ]:
        model = teacher(files, **settings)
        model.prepare(Noise({}, 16), CPU)
        expected = model.network(normalize(pixels, [*own_mean], [*own_std]))
        torch.testing.assert_close(model(normalize(pixels, [*mean], [*std])), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small", "timm/test_vit", "timm/test_convnext"])
def test_the_average_of_the_map_has_the_pooled_features(name, tmp_path):
    torch.manual_seed(0)
    config = Backbone(name=name)
    save_backbone(tmp_path / "backbone.safetensors", build_backbone(config, 64), config, 64, {})
    model = FrozenTeacher(Teacher(weights=str(tmp_path / "backbone.safetensors")))
    features, maps = model.features_and_map(images(64))
    assert torch.allclose(features, model(images(64)), atol=1e-5)
    side = {"timm/test_vit": 4}.get(name, 2)
    assert maps.shape[2:] == (side, side)


def test_position_embeddings_of_another_size_are_interpolated(tmp_path):
    network = Backbone(name="timm/test_vit")
    weights = build_backbone(network, 96).state_dict()
    torch.save(weights, tmp_path / "large.pth")
    settings = {"weights": str(tmp_path / "large.pth"), "backbone": network, "size": 32}
    with pytest.raises(ValueError, match=r"pos_embed is \(1, 37, 64\), not \(1, 5, 64\)"):
        FrozenTeacher(Teacher(**settings))
    model = FrozenTeacher(Teacher(**settings, trained_size=96))
    assert model.features_and_map(images())[1].shape == (4, 64, 2, 2)


def test_a_rebuilt_projector_computes_what_the_original_did(tmp_path):
    torch.manual_seed(0)
    for number, original in enumerate(
        [
            mlp([6, 12, 5]),
            mlp([6, 12, 5], batch_norm=False),
            mlp([6, 8, 8, 5], bias=False, final_batch_norm=True, final_affine=False),
            nn.Sequential(nn.Linear(6, 5)),
        ]
    ):
        path = tmp_path / f"{number}.safetensors"
        original(torch.randn(32, 6))
        write_tensors(path, {f"projector.{name}": value for name, value in original.state_dict().items()}, {})
        rebuilt, dim = load_projector(path, 6)
        rows = torch.randn(4, 6)
        assert dim == 5
        torch.testing.assert_close(rebuilt.eval()(rows), original.eval()(rows))


def test_a_projector_that_is_not_there_or_does_not_fit_is_refused(files, tmp_path):
    write_tensors(tmp_path / "dino.safetensors", {"projector.last_layer.weight_g": torch.ones(2, 1)}, {})
    for path, reason in [
        (files / "backbone.safetensors", "has no projector: leave out teacher.projector"),
        (tmp_path / "dino.safetensors", "its projector does not consist of plain layers: leave out teacher.projector"),
        (files / "model.safetensors", "its projector takes 1024 features, its backbone gives 7: leave out"),
    ]:
        with pytest.raises(ValueError, match=reason):
            load_projector(path, 7)


def test_a_file_that_is_not_there_or_contains_more_than_tensors_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"nowhere\.safetensors does not exist"):
        FrozenTeacher(Teacher(weights="nowhere.safetensors"))
    for content, reason in [
        ({"state_dict": {}, "epoch": 3}, "contains state_dict, epoch, expected a state dict of tensors: `ssl-core con"),
        ([1], "contains list, expected a state dict"),
        ({"a": np.float64(3)}, "it contains numpy.*, which could run code; expected tensors and plain containers"),
    ]:
        torch.save(content, tmp_path / "checkpoint.pth")
        with pytest.raises(ValueError, match=reason):
            FrozenTeacher(Teacher(weights=str(tmp_path / "checkpoint.pth"), backbone=NETWORK))
