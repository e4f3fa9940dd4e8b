"""SSLight's classifier on the second layer of the projector, from a model.safetensors as pre-training writes it."""

from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import gelu, relu

from ssl_core.config import Backbone, Dataset
from ssl_core.evaluations import finetune
from ssl_core.evaluations.base import Subjects
from ssl_core.evaluations.parts.features import frozen, gather_subjects
from ssl_core.evaluations.parts.projection import first_two_layers, load_projector, with_projector
from ssl_core.files import write_json
from ssl_core.methods.base import method_class, resolve
from ssl_core.networks.backbones import build_backbone, load_backbone, save_backbone, write_tensors

from .conftest import MEAN, STD, measure

BACKBONE = {"name": "mobilenet_v3_small", "stem": "small", "hidden_layer": False}
DIGESTS = {"spec": "5", "code": "c", "data": "d"}
METHODS = {
    "dino": {"head_hidden": 24, "bottleneck_dim": 8, "num_outputs": 16},
    "moco": {"queue_size": 32, "projector_hidden": 24, "embedding_dim": 8},
    "swav": {"projector_hidden": 24, "embedding_dim": 8, "num_prototypes": 16},
    "npid": {"head": "linear"},
    "pid": {"head": "none"},
}


def pretrained(folder: Path, name: str, **options) -> Path:
    """Write the files of a method's pre-training, with batch statistics that differ from the initial ones."""
    spec = {"dataset": {"name": "squares"}, "backbone": BACKBONE, "method": {"name": name, **METHODS[name], **options}}
    resolved = resolve({**spec, "training": {"batch_size": 16}})
    torch.manual_seed(1)
    backbone = build_backbone(Backbone.model_validate(BACKBONE), 16)
    method = method_class(name)(resolved.method, backbone, num_images=60, batch_size=16, seed=0)
    for module in method.modules():
        if isinstance(module, torch.nn.BatchNorm1d):
            torch.nn.init.normal_(module.running_mean)  # pyright: ignore
    write_tensors(folder / "model.safetensors", method.state_dict(), {"experiment": "mine", **DIGESTS})
    report = {"resolved": resolved.model_dump(mode="json", serialize_as_any=True), "num_images": 60}
    write_json(folder / "pretrain.json", report)
    metadata = {"mean": str(list(MEAN)), "std": str(list(STD)), "seed": "0"}
    metadata |= {f"digest_{key}": value for key, value in DIGESTS.items()}
    save_backbone(folder / "backbone.safetensors", backbone, resolved.backbone, 16, metadata)
    return folder


@pytest.fixture(scope="module")
def dino(tmp_path_factory) -> Path:
    return pretrained(tmp_path_factory.mktemp("dino"), "dino")


@cache
def subjects_of(folder: Path) -> Subjects:
    network, header = load_backbone(folder / "backbone.safetensors")
    return gather_subjects(network, header, image_size=None, threads=1, model=folder / "model.safetensors")


def outputs(subjects: Subjects, images: torch.Tensor) -> dict[str, torch.Tensor]:
    with frozen(subjects.networks):
        return {name: network(images) for name, network in subjects.networks.items()}


def linear(rows: Tensor, weights: dict[str, Tensor], layer: str) -> Tensor:
    return rows @ weights[f"{layer}.weight"].T + weights[f"{layer}.bias"]


def norm(rows: Tensor, weights: dict[str, Tensor], layer: str) -> Tensor:
    mean, variance = weights[f"{layer}.running_mean"], weights[f"{layer}.running_var"]
    return (rows - mean) / (variance + 1e-5).sqrt() * weights[f"{layer}.weight"] + weights[f"{layer}.bias"]


def test_of_three_layers_the_classifier_follows_the_second_with_its_activation(dino):
    images, weights = torch.randn(5, 3, 16, 16), load_file(dino / "model.safetensors")
    before, after = subjects_of(dino), with_projector(subjects_of(dino))
    rows = outputs(before, images)["pretrained"]
    for number in (0, 3):
        rows = gelu(norm(linear(rows, weights, f"head.layers.{number}"), weights, f"head.layers.{number + 1}"))
    torch.testing.assert_close(outputs(after, images)["pretrained"], rows)


@pytest.mark.parametrize("name", ["moco", "swav"])
def test_of_two_layers_the_classifier_follows_the_output(name, tmp_path):
    folder = pretrained(tmp_path, name)
    images, weights = torch.randn(5, 3, 16, 16), load_file(folder / "model.safetensors")
    rows = linear(outputs(subjects_of(folder), images)["pretrained"], weights, "projector.0")
    rows = norm(rows, weights, "projector.1") if name == "swav" else rows
    rows = linear(relu(rows), weights, "projector.3" if name == "swav" else "projector.2")
    torch.testing.assert_close(outputs(with_projector(subjects_of(folder)), images)["pretrained"], rows)


def test_the_untrained_network_gets_new_layers_and_pixels_none(dino):
    images, before, state = torch.randn(5, 3, 16, 16), subjects_of(dino), torch.get_rng_state()
    after, again = with_projector(before), with_projector(before)
    assert torch.equal(state, torch.get_rng_state())
    first, second = outputs(after, images), outputs(again, images)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert torch.equal(first["pixels"], outputs(before, images)["pixels"])
    trained, fresh = (list(after.networks[name].children())[1].state_dict() for name in ("pretrained", "untrained"))
    assert all(not torch.equal(trained[name], fresh[name]) for name in ("0.weight", "1.running_mean", "3.weight"))


@pytest.mark.parametrize("name", ["npid", "pid"])
def test_a_method_without_a_second_layer_is_a_clear_error(name, tmp_path):
    with pytest.raises(ValueError, match=f"method '{name}' has no projector of two layers"):
        with_projector(subjects_of(pretrained(tmp_path, name)))


@pytest.mark.parametrize(
    ("change", "message"),
    [("missing", r"head\.layers\.3\.weight is missing"), ("shape", r"head\.layers\.3\.weight is \(1, 24\)")],
)
def test_weights_that_do_not_fit_are_an_error(dino, tmp_path, change, message):
    _, header = load_backbone(dino / "backbone.safetensors")
    weights = load_file(dino / "model.safetensors")
    weight = weights.pop("head.layers.3.weight")
    if change == "shape":
        weights["head.layers.3.weight"] = weight[:1].clone()
    save_file(weights, tmp_path / "model.safetensors", DIGESTS)
    (tmp_path / "pretrain.json").write_text((dino / "pretrain.json").read_text())
    with pytest.raises(ValueError, match=message):
        load_projector(tmp_path / "model.safetensors", header)


def test_a_model_of_another_pre_training_is_an_error(dino, tmp_path):
    _, header = load_backbone(dino / "backbone.safetensors")
    save_file(load_file(dino / "model.safetensors"), tmp_path / "model.safetensors", {**DIGESTS, "spec": "6"})
    with pytest.raises(ValueError, match="are of different pre-trainings"):
        load_projector(tmp_path / "model.safetensors", header)


def test_statistics_of_parts_of_the_batch_end_with_the_pre_training():
    config = resolve(
        {
            "dataset": {"name": "squares"},
            "backbone": BACKBONE,
            "method": {"name": "ressl", "queue_size": 32, "projector_hidden": 24, "batchnorm_splits": 4},
        }
    )
    backbone = build_backbone(Backbone.model_validate(BACKBONE), 16)
    method = method_class("ressl")(config.method, backbone, num_images=60, batch_size=16, seed=0)
    layers, rows = first_two_layers(method, "ressl").train(), torch.randn(16, backbone.num_features)
    hidden = layers[0](rows)
    expected = (hidden - hidden.mean(dim=0)) / (hidden.var(dim=0, unbiased=False) + 1e-5).sqrt()
    torch.testing.assert_close(layers[1](hidden), expected, atol=1e-4, rtol=1e-4)


FEW = {"protocol": "finetune", "variant": "sslight_10", "epochs": 1, "dataset": {"name": "squares"}}


def test_the_stage_reads_the_model_and_the_results_state_it(dino, manifest_path, tmp_path):
    model = dino / "model.safetensors"
    result = measure(FEW, dino / "backbone.safetensors", manifest_path, tmp_path / "few.json", model=model)
    settings = result["hyperparameters"]
    assert result["protocol"] == "finetune-sslight_10/v1"
    assert settings["classifier_on"] == "the projector's second layer"
    assert settings["learning_rate"] == settings["backbone_learning_rate"] == pytest.approx(0.03 * 6 / 256)
    assert set(result["digests"]) >= {"backbone", "model"}


def test_without_a_model_the_variant_is_a_clear_error(dino, manifest_path, tmp_path):
    with pytest.raises(ValueError, match="this variant needs a projector"):
        measure(FEW, dino / "backbone.safetensors", manifest_path, tmp_path / "few.json", model=None)


def test_the_variants_are_sslights():
    small, large = (
        finetune.Config(dataset=Dataset(name="squares"), variant=variant) for variant in ("sslight_1", "sslight_10")
    )
    for config, fraction, epochs in ((small, 0.01, 60), (large, 0.1, 30)):
        assert (config.fraction, config.epochs, config.batch_size, config.nesterov) == (fraction, epochs, 1024, True)
        assert (config.learning_rate, config.backbone_learning_rate, config.weight_decay) == (0.03, 0.03, 0)
    # the rate moves once an epoch, from .03 x 1024 / 256 to 1e-6
    assert list(finetune.shares(small.model_copy(update={"epochs": 2}), 4)) == pytest.approx([1, 1, 0.5, 0.5])
