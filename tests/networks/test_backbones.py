"""Backbones: sizes, stems, parameter names, and strict loading of files."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torchvision
from safetensors.torch import save_file
from torch import Tensor, nn

from ssl_core.config import Backbone
from ssl_core.networks.backbones import (
    build_backbone,
    check_image_size,
    load_backbone,
    load_weights,
    read_tensors,
    save_backbone,
    write_tensors,
)

METADATA = {"mean": "[0.5]", "std": "[0.2]", "seed": "0", "digest_spec": "a", "digest_code": "b", "digest_data": "é"}


# docs/sources.md#backbones; exact counts are torchvision's without the classifier.
@pytest.mark.parametrize(
    ("name", "hidden_layer", "parameters", "num_features"),
    [
        ("resnet18", True, 11_176_512, 512),
        ("resnet34", True, 21_284_672, 512),
        ("resnet50", True, 23_508_032, 2048),
        ("resnet152", True, 58_143_808, 2048),
        ("resnet50x2", True, 93_907_072, 4096),  # 94M in SwAV's paper
        ("mobilenet_v2", True, 2_223_872, 1280),
        ("mobilenet_v3_small", False, 927_008, 576),
        ("mobilenet_v3_small", True, 927_008 + 577 * 1024, 1024),
        ("mobilenet_v3_large", False, 2_971_952, 960),
        ("mobilenet_v3_large", True, 2_971_952 + 961 * 1280, 1280),
        ("efficientnet_b0", True, 4_007_548, 1280),
        ("efficientnet_b1", True, 6_513_184, 1280),
        ("vit_tiny_16", True, 5_524_416, 192),
        ("vit_tiny_32", True, 5_938_560, 192),  # SSLight prints 5.5M
        ("vit_small_16", True, 21_665_664, 384),
        ("deit_tiny", True, 7_286_976, 192),  # 6 heads of 64 as in the code; the paper prints "5" million
    ],
)
def test_numbers_of_parameters_and_features_are_those_in_sources(
    name: str, hidden_layer: bool, parameters: int, num_features: int
):
    with torch.device("meta"):  # shapes only
        backbone = build_backbone(Backbone(name=name, hidden_layer=hidden_layer), 224)
    assert sum(parameter.numel() for parameter in backbone.parameters()) == parameters
    assert backbone.num_features == num_features


@pytest.mark.parametrize(
    "name", ["resnet18", "mobilenet_v2", "mobilenet_v3_small", "mobilenet_v3_large", "vit_tiny_16"]
)
def test_features_have_the_width_num_features(name: str):
    backbone = build_backbone(Backbone(name=name), 64).eval()
    assert backbone(torch.rand(2, 3, 64, 64)).shape == (2, backbone.num_features)


@pytest.mark.parametrize(
    "name", ["resnet18", "resnet50", "mobilenet_v2", "mobilenet_v3_small", "mobilenet_v3_large", "efficientnet_b0"]
)
@pytest.mark.parametrize(("stem", "side"), [("imagenet", 2), ("tiny", 4), ("small", 8)])
def test_the_stem_determines_the_size_of_the_last_map(name: str, stem: str, side: int):
    backbone = build_backbone(Backbone.model_validate({"name": name, "stem": stem}), 64).to("meta")
    maps: list[torch.Size] = []
    last = backbone.get_submodule("layer4" if name.startswith("resnet") else "features")
    last.register_forward_hook(lambda module, inputs, output: maps.append(output.shape[2:]))
    backbone(torch.empty(2, 3, 64, 64, device="meta"))
    assert maps == [(side, side)]


def test_small_resnet_keeps_the_resolution_of_its_first_layer():
    backbone = build_backbone(Backbone(name="resnet18", stem="small"), 32)
    assert backbone.get_submodule("conv1")(torch.rand(1, 3, 32, 32)).shape == (1, 64, 32, 32)
    assert (
        sum(parameter.numel() for parameter in backbone.parameters()) == 11_168_832
    )  # 11.17M, docs/sources.md#backbones


def test_same_seed_draws_the_same_weights():
    def draw() -> dict[str, Tensor]:
        torch.manual_seed(3)
        return build_backbone(Backbone(name="resnet18", stem="small"), 32).state_dict()

    first, second = draw(), draw()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_checking_a_size_changes_neither_the_network_nor_the_generator():
    config = Backbone(name="efficientnet_b0")
    backbone = build_backbone(config, 64)
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    generator = torch.get_rng_state()
    check_image_size(backbone, config, 96)
    assert torch.equal(generator, torch.get_rng_state())
    assert all(torch.equal(before[name], value) for name, value in backbone.state_dict().items())


def test_the_patch_projection_of_deit_is_frozen():
    backbone = build_backbone(Backbone(name="deit_tiny"), 32)
    frozen = [name for name, parameter in backbone.named_parameters() if not parameter.requires_grad]
    assert frozen == ["patch_embed.proj.weight", "patch_embed.proj.bias"]
    assert backbone.get_parameter("pos_embed").std().item() == pytest.approx(1.0, abs=0.2)


def test_vision_transformer_takes_crops_of_several_sizes():
    config = Backbone(name="vit_tiny_16")
    backbone = build_backbone(config, 64).eval()
    for size in (32, 48, 64):
        assert backbone(torch.rand(2, 3, size, size)).shape == (2, 192)
        assert check_image_size(backbone, config, size) == 192
    with pytest.raises(ValueError, match=r"vit_tiny_16 cannot take images of 40x40 pixels: .*patch size \(16\)"):
        check_image_size(backbone, config, 40)


@pytest.mark.parametrize(
    ("config", "image_size", "message"),
    [
        ({"name": "resnt18"}, 64, "unknown backbone 'resnt18': did you mean resnet18 or"),
        ({"name": "wide_resnet50_2"}, 64, "did you mean torchvision/wide_resnet50_2 or timm/wide_resnet50_2"),
        ({"name": "timm/resnet18dd"}, 64, "did you mean timm/resnet18d or"),
        ({"name": "torchvision/squeezenet1_0"}, 64, "does not end in a linear classifier"),
        ({"name": "torchvision/alexnet"}, 32, "alexnet cannot take images of 32x32"),
        ({"name": "resnet18"}, 16, "less than 1x1: use backbone.stem: tiny or small"),
        ({"name": "mobilenet_v2", "stem": "small"}, 4, "less than 1x1: use larger images"),
        ({"name": "vit_tiny_16"}, 40, "resize the images to a multiple of 16"),
        ({"name": "vit_tiny_16", "stem": "small"}, 32, "vit_tiny_16 has no small stem, use imagenet"),
    ],
)
def test_errors_of_impossible_backbones_name_an_alternative(config: dict[str, str], image_size: int, message: str):
    with pytest.raises(ValueError, match=message):
        build_backbone(Backbone.model_validate(config), image_size)


@pytest.mark.parametrize(
    ("name", "num_features"),
    [
        ("torchvision/regnet_x_400mf", 400),
        ("timm/mobilenetv4_conv_small_050", 1280),
        ("timm/vit_tiny_patch16_224", 192),
    ],
)
def test_other_networks_of_torchvision_and_timm(name: str, num_features: int):
    backbone = build_backbone(Backbone(name=name), 64).eval()
    assert backbone.num_features == num_features
    assert backbone(torch.rand(1, 3, 64, 64)).shape == (1, num_features)


@pytest.mark.parametrize(
    ("name", "stem", "image_size"),
    [("resnet18", "small", 32), ("mobilenet_v3_small", "imagenet", 64), ("deit_tiny", "imagenet", 32)],
)
def test_a_file_rebuilds_the_network_and_is_written_with_equal_bytes(
    tmp_path: Path, name: str, stem: str, image_size: int
):
    config = Backbone.model_validate({"name": name, "stem": stem})
    backbone = build_backbone(config, image_size).to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    save_backbone(tmp_path / "first.safetensors", backbone, config, image_size, METADATA)
    loaded, header = load_backbone(tmp_path / "first.safetensors")
    save_backbone(tmp_path / "second.safetensors", loaded, config, image_size, METADATA)

    images = torch.rand(2, 3, image_size, image_size)
    torch.testing.assert_close(loaded.eval()(images), backbone.eval()(images))
    assert (tmp_path / "first.safetensors").read_bytes() == (tmp_path / "second.safetensors").read_bytes()
    assert header.items() >= METADATA.items()
    assert header["num_features"] == str(backbone.num_features)


def test_plain_torchvision_loads_a_backbone_file_except_for_the_classifier(tmp_path: Path):
    config = Backbone(name="resnet18")
    save_backbone(tmp_path / "backbone.safetensors", build_backbone(config, 64), config, 64, METADATA)
    weights, _ = read_tensors(tmp_path / "backbone.safetensors")
    result = torchvision.models.resnet18().load_state_dict(weights, strict=False)
    assert (result.missing_keys, result.unexpected_keys) == (["fc.weight", "fc.bias"], [])


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small"])
def test_a_backbone_loads_plain_torchvision_weights(tmp_path: Path, name: str):
    plain = torchvision.models.get_model(name, weights=None)
    save_file(plain.state_dict(), tmp_path / "plain.safetensors")
    backbone = build_backbone(Backbone(name=name), 64)
    load_weights(backbone, tmp_path / "plain.safetensors")
    assert all(torch.equal(value, plain.state_dict()[key]) for key, value in backbone.state_dict().items())


def test_weights_of_another_network_are_refused(tmp_path: Path):
    save_file(torchvision.models.resnet34().state_dict(), tmp_path / "plain.safetensors")
    with pytest.raises(ValueError, match=r"plain.safetensors does not fit ResNet: layer1.2.\S+ is unknown; .* more"):
        load_weights(build_backbone(Backbone(name="resnet18"), 64), tmp_path / "plain.safetensors")


def _drop(weights: dict[str, Tensor]) -> None:
    del weights["layer1.0.conv1.weight"]


def _rename(weights: dict[str, Tensor]) -> None:
    weights["module.bn1.weight"] = weights.pop("bn1.weight")


def _reshape(weights: dict[str, Tensor]) -> None:
    weights["conv1.weight"] = weights["conv1.weight"][:, :1].clone()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_drop, "layer1.0.conv1.weight is missing"),
        (_rename, "bn1.weight is missing; module.bn1.weight is unknown"),
        (_reshape, r"conv1.weight is \(64, 1, 3, 3\), not \(64, 3, 3, 3\)"),
    ],
)
def test_weights_load_strictly(tmp_path: Path, damage: Callable[[dict[str, Tensor]], None], message: str):
    path, config = tmp_path / "backbone.safetensors", Backbone(name="resnet18", stem="small")
    save_backbone(path, build_backbone(config, 32), config, 32, METADATA)
    weights, header = read_tensors(path)
    damage(weights)
    write_tensors(path, weights, header)
    with pytest.raises(ValueError, match=f"backbone.safetensors does not fit ResNet: {message}"):
        load_backbone(path)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", ["bn1.running_var", "layer1.0.conv1.weight"])
def test_values_that_are_not_finite_are_neither_written_nor_read(tmp_path: Path, name: str, value: float):
    path, config = tmp_path / "backbone.safetensors", Backbone(name="resnet18", stem="small")
    network = build_backbone(config, 32)
    save_backbone(path, network, config, 32, METADATA)
    weights, header = read_tensors(path)
    weights[name].view(-1)[1] = value
    with pytest.raises(ValueError, match=rf"is not written: 1 of \d+ values of its tensor '{name}' are not finite"):
        write_tensors(tmp_path / "new.safetensors", weights, header)
    assert not (tmp_path / "new.safetensors").exists()
    save_file(weights, path, header)
    for read in (lambda: load_backbone(path), lambda: load_weights(network, path)):
        with pytest.raises(ValueError, match=rf"cannot be used: 1 of \d+ values of its tensor '{name}'"):
            read()


def test_missing_broken_and_foreign_files_are_named(tmp_path: Path):
    path, config = tmp_path / "backbone.safetensors", Backbone(name="mobilenet_v3_small")
    with pytest.raises(ValueError, match=r"backbone.safetensors does not exist"):
        load_backbone(path)
    save_backbone(path, build_backbone(config, 64), config, 64, METADATA)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"backbone.safetensors is truncated"):
        load_backbone(path)
    write_tensors(path, nn.Linear(2, 2).state_dict(), {})
    with pytest.raises(ValueError, match=r"backbone.safetensors is no backbone of this project"):
        load_backbone(path)


def test_a_stride_over_a_single_pixel_is_refused():
    # Its bfloat16 weight gradient is uninitialised memory on CPUs (oneDNN).
    config = Backbone(name="timm/test_resnet")
    backbone = build_backbone(Backbone(name="timm/test_resnet"), 32)
    with pytest.raises(ValueError, match="only one pixel is left before the last stride"):
        check_image_size(backbone, config, 16)
