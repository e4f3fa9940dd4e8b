"""Weights that were trained elsewhere become a backbone for every evaluation, with unchanged values."""

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
from safetensors.torch import save_file
from torch import Tensor, nn

from ssl_core.config import Backbone
from ssl_core.evaluations.parts.features import gather_subjects
from ssl_core.networks.backbones import build_backbone, load_backbone, save_backbone
from ssl_core.stages import adopt
from tests.evaluations.conftest import MEAN, STD, measure, write_shards

SMALL: dict[str, Any] = {"backbone": {"name": "torchvision/shufflenet_v2_x0_5"}, "image_size": 64}
IMAGENET = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """30 training and 12 test squares of 16x16 pixels, labelled by their colour."""
    folder = tmp_path_factory.mktemp("squares")
    return write_shards(folder, train=[n % 3 for n in range(30)], test=[n % 3 for n in range(12)])


@pytest.fixture(scope="module")
def resnet18() -> nn.Module:
    """ResNet-18 of torchvision with its classifier, after one step of its batch norms."""
    torch.manual_seed(1)
    network = torchvision.models.resnet18()
    network.train()(torch.randn(4, 3, 64, 64))
    return network.eval()


@pytest.fixture(scope="module")
def small() -> dict[str, Tensor]:
    """The weights of the smaller network of torchvision in `SMALL`."""
    torch.manual_seed(1)
    return torchvision.models.shufflenet_v2_x0_5().state_dict()


def adopted(folder: Path, manifest: Path, weights: dict[str, Tensor] | Path, **spec: Any) -> Path:
    """Adopt the weights and return the backbone file."""
    path = weights if isinstance(weights, Path) else folder / "weights.safetensors"
    if not isinstance(weights, Path):
        save_file(weights, path)
    section = {"dataset": {"name": "squares"}, "backbone": {"name": "resnet18"}, "weights": str(path), **spec}
    adopt.run("mine", spec=section, code="c", manifest=manifest, output=folder / "backbone.safetensors")
    return folder / "backbone.safetensors"


KNN = {"protocol": "knn", "dataset": {"name": "squares"}, "k": 3}


def test_features_are_those_of_torchvisions_network(
    tmp_path: Path, manifest: Path, resnet18: nn.Module, capfd: pytest.CaptureFixture[str]
) -> None:
    path = adopted(tmp_path, manifest, resnet18.state_dict(), image_size=64)
    assert "dropped the classifier (fc.bias, fc.weight)" in capfd.readouterr().err
    backbone, header = load_backbone(path)
    assert header["image_size"] == "64"
    assert {name: json.loads(header[name]) for name in ("mean", "std")} == IMAGENET
    images = torch.randn(3, 3, 64, 64)
    pooled: list[Tensor] = []
    resnet18.get_submodule("avgpool").register_forward_hook(lambda *args: pooled.append(args[-1]))
    with torch.no_grad():
        resnet18(images)
        features = backbone.eval()(images)
    assert torch.allclose(features, pooled[0].flatten(1), atol=1e-6)


def test_adopted_weights_are_evaluated_with_an_untrained_baseline(
    tmp_path: Path, manifest: Path, resnet18: nn.Module
) -> None:
    path = adopted(tmp_path, manifest, resnet18.state_dict(), image_size=32)
    result = measure(KNN, path, manifest, tmp_path / "knn.json")
    assert result["metrics"]["top1"] >= 0
    assert result["baselines"].keys() == {"untrained", "pixels"}
    subjects = gather_subjects(*load_backbone(path), image_size=None, threads=1)
    torch.manual_seed(0)
    drawn = build_backbone(Backbone(name="resnet18"), 32).state_dict()
    untrained = subjects.networks["untrained"].state_dict()
    assert all(torch.equal(weight, untrained[name]) for name, weight in drawn.items())


def test_features_are_those_of_timms_network(tmp_path: Path, manifest: Path) -> None:
    torch.manual_seed(2)
    network: Any = timm.create_model("mobilenetv3_small_050", pretrained=False).eval()
    spec = {"backbone": {"name": "timm/mobilenetv3_small_050"}, "image_size": 32, "normalisation": "dataset"}
    path = adopted(tmp_path, manifest, network.state_dict(), **spec)
    backbone, header = load_backbone(path)
    assert {name: json.loads(header[name]) for name in ("mean", "std")} == {"mean": list(MEAN), "std": list(STD)}
    images = torch.randn(3, 3, 32, 32)
    network.reset_classifier(0)
    with torch.no_grad():
        assert torch.allclose(backbone.eval()(images), network(images), atol=1e-6)
    assert measure(KNN, path, manifest, tmp_path / "knn.json")["num_test"] == 12


def test_a_backbone_file_keeps_its_size_normalisation_and_seed(tmp_path: Path, manifest: Path) -> None:
    config = Backbone(name="mobilenet_v3_small", stem="small")
    metadata = {"mean": "[0.1, 0.2, 0.3]", "std": "[1.0, 1.0, 1.0]", "seed": "7", "version": "v"}
    network = build_backbone(config, 24)
    save_backbone(tmp_path / "own.safetensors", network, config, 24, metadata)
    backbone = {"name": "mobilenet_v3_small", "stem": "small"}
    loaded, header = load_backbone(adopted(tmp_path, manifest, tmp_path / "own.safetensors", backbone=backbone))
    assert all(torch.equal(weight, loaded.state_dict()[name]) for name, weight in network.state_dict().items())
    expected = {"image_size": "24", "mean": "[0.1, 0.2, 0.3]", "std": "[1.0, 1.0, 1.0]", "seed": "7"}
    assert {name: header[name] for name in expected} == expected
    assert "version" not in header  # the run of that pre-training belongs to another experiment
    with pytest.raises(ValueError, match=r"normalisation: .*own\.safetensors defines it already; remove the key"):
        adopted(tmp_path, manifest, tmp_path / "own.safetensors", backbone=backbone, normalisation="imagenet")
    with pytest.raises(
        ValueError, match=r"backbone: .*own\.safetensors contains {'name': 'mobilenet_v3_small', 'stem'"
    ):
        adopted(tmp_path, manifest, tmp_path / "own.safetensors", backbone=backbone | {"stem": "tiny"})


def test_a_normalisation_in_the_settings_is_used(tmp_path: Path, manifest: Path, small: dict[str, Tensor]) -> None:
    normalisation = {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]}
    _, header = load_backbone(adopted(tmp_path, manifest, small, **SMALL, normalisation=normalisation))
    assert {name: json.loads(header[name]) for name in normalisation} == normalisation


def test_the_same_file_gives_the_same_bytes(tmp_path: Path, manifest: Path, small: dict[str, Tensor]) -> None:
    once = adopted(tmp_path, manifest, small, **SMALL).read_bytes()
    assert adopted(tmp_path, manifest, tmp_path / "weights.safetensors", **SMALL).read_bytes() == once


def test_files_without_batch_counters_are_accepted(tmp_path: Path, manifest: Path, small: dict[str, Tensor]) -> None:
    old = {name: weight for name, weight in small.items() if "num_batches" not in name}
    loaded, _ = load_backbone(adopted(tmp_path, manifest, old, **SMALL))
    assert torch.equal(loaded.state_dict()["conv1.1.running_mean"], old["conv1.1.running_mean"])


def test_weights_that_do_not_fit_are_refused(tmp_path: Path, manifest: Path, small: dict[str, Tensor]) -> None:
    weights = {name: weight for name, weight in small.items() if name != "conv1.1.running_mean"}
    with pytest.raises(ValueError, match=r"conv1\.1\.running_mean is missing; extra is unknown"):
        adopted(tmp_path, manifest, {**weights, "extra": torch.zeros(1)}, **SMALL)
    assert not (tmp_path / "backbone.safetensors").exists()


def test_missing_and_broken_files_are_named(tmp_path: Path, manifest: Path) -> None:
    (tmp_path / "none.safetensors").write_text("nothing")
    for name, message in (("none", "is truncated or no safetensors file"), ("gone", "does not exist")):
        with pytest.raises(ValueError, match=rf"{name}\.safetensors {message}"):
            adopted(tmp_path, manifest, tmp_path / f"{name}.safetensors")
