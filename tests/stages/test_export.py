"""Exported files: equal features in torch and ONNX Runtime, equal bytes each time, and a correct model card."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import timm
import torch
import torchvision
import yaml
from huggingface_hub import ModelCard
from PIL import Image
from torch import nn

from ssl_core.config import Backbone
from ssl_core.files import write_json
from ssl_core.networks.backbones import Network, build_backbone, load_backbone, read_tensors, save_backbone
from ssl_core.networks.exported import ExportedNetwork
from ssl_core.report.hub import hub_config
from ssl_core.stages import export
from tests.evaluations.conftest import Tiny

SPEC = {
    "dataset": {"name": "demo", "subset": {"images": 96, "seed": 1}},
    "backbone": {"name": "resnet18", "stem": "tiny"},
    "method": {"name": "ressl", "queue_size": 77},
}
LINEAR = {
    "experiment": "mine",
    "evaluation": "probe",
    "protocol": "linear/v1",
    "dataset": "demo",
    "split": "test",
    "headline": "top1",
    "metrics": {"top1": 81.25, "top5": 99.0},
    "baselines": {"untrained": {"top1": 43.75}, "pixels": {"top1": 62.5}},
    "num_train": 96,
    "num_test": 360,
}
HEADER = {"mean": "[0.3, 0.4, 0.5]", "std": "[0.2, 0.25, 0.3]", "seed": "0", "version": "c0ffee"}


def trained(name: str, stem: str, size: int) -> Network:
    """Build a network whose batch norms have seen images, so that its features are not all zero."""
    torch.manual_seed(0)
    network = build_backbone(Backbone(name=name, stem=stem), size)  # pyright: ignore[reportArgumentType]
    for layer in network.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.momentum = 0.9
    for _ in range(3):
        network.train()(torch.randn(32, 3, size, size))
    return network.eval()


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a backbone and an evaluation as the earlier stages write them."""
    folder = tmp_path_factory.mktemp("results")
    config = Backbone(name="resnet18", stem="tiny")
    save_backbone(folder / "backbone.safetensors", trained("resnet18", "tiny", 16), config, 16, HEADER)
    write_json(folder / "probe.json", LINEAR)
    return folder


def run(sources: Path, root: Path, output: Path) -> Path:
    export.run(
        "mine",
        spec=SPEC,
        backbone=sources / "backbone.safetensors",
        card=root / "datasets" / "demo.yaml",
        results=[sources / "probe.json"],
        output=output,
        threads=1,
    )
    return output


@pytest.fixture(scope="module")
def exported(sources: Path, root: Path) -> Path:
    return run(sources, root, sources / "export")


@pytest.fixture(scope="module")
def text(exported: Path) -> str:
    return (exported / "README.md").read_text()


def differ(network: nn.Module, model: bytes, size: int) -> float:
    """Return the largest difference between the features of ONNX Runtime and torch, for one image and for five."""
    session = onnxruntime.InferenceSession(model)
    largest = 0.0
    for batch in (1, 5):
        images = torch.rand(batch, 3, size, size) * 4 - 2
        with torch.no_grad():
            expected = network(images)
        assert expected.std() > 1e-3  # otherwise any file would pass
        features = np.asarray(session.run(["features"], {"images": images.numpy()})[0])
        assert features.shape == expected.shape
        largest = max(largest, (torch.from_numpy(features) - expected).abs().max().item())
    return largest


def test_onnx_gives_the_features_of_the_network_for_any_batch(exported: Path, sources: Path) -> None:
    network, _ = load_backbone(sources / "backbone.safetensors")
    assert differ(network.eval(), (exported / "backbone.onnx").read_bytes(), 16) < 1e-4


@pytest.mark.long
@pytest.mark.parametrize(
    ("name", "stem", "size"),
    [
        ("resnet18", "imagenet", 64),
        ("mobilenet_v2", "small", 16),
        ("mobilenet_v3_small", "small", 16),
        ("efficientnet_b0", "tiny", 32),
        ("vit_tiny_16", "imagenet", 32),
        ("deit_tiny", "imagenet", 32),
    ],
)
def test_onnx_gives_the_features_of_every_family(name: str, stem: str, size: int) -> None:
    network = trained(name, stem, size)
    assert differ(network, export.to_onnx(network, size, {}), size) < 1e-4


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_options_put_the_normalisation_into_the_file_and_free_the_size(memory_format: torch.memory_format) -> None:
    network = Tiny().eval()
    normalised = export.Normalised(network, HEADER).eval()
    model = export.to_onnx(normalised, 16, HEADER | {"normalise": "true"}, dynamic_size=True)
    exported = ExportedNetwork(model)
    assert exported.normalisation == ((0, 0, 0), (1, 1, 1))
    mean, std = (torch.tensor(json.loads(HEADER[key]))[:, None, None] for key in ("mean", "std"))
    for height, width in ((16, 16), (24, 40)):
        pixels = torch.rand(3, 3, height, width).to(memory_format=memory_format)
        with torch.no_grad():
            expected = network((pixels - mean) / std)
        torch.testing.assert_close(exported(pixels), expected, atol=1e-5, rtol=0)


@pytest.mark.long
@pytest.mark.parametrize(
    ("name", "stem"),
    [
        ("resnet18", "tiny"),
        ("mobilenet_v2", "tiny"),
        ("mobilenet_v3_small", "tiny"),
        ("efficientnet_b0", "tiny"),
        ("vit_tiny_16", "imagenet"),
        ("deit_tiny", "imagenet"),
    ],
)
def test_networks_take_images_of_other_sizes(name: str, stem: str) -> None:
    network = trained(name, stem, 32)
    model = export.to_onnx(network, 32, {}, dynamic_size=True)
    assert max(differ(network, model, size) for size in (32, 48, 64)) < 1e-4


def test_a_network_of_one_size_is_refused_as_dynamic() -> None:
    network = nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 4)).eval()
    with pytest.raises(ValueError, match="cannot be written as ONNX for images of any size: leave out export"):
        export.to_onnx(network, 16, {}, dynamic_size=True)


def test_a_file_with_wrong_features_is_refused() -> None:
    network = Tiny().eval()
    model = export.to_onnx(network, 8, {})
    assert export.largest_difference(network, ExportedNetwork(model), 8) < 1e-5
    with torch.no_grad():
        network.convolution.weight[0, 0, 0, 0] += 0.1
    with pytest.raises(RuntimeError, match="features of the ONNX file differ"):
        export.largest_difference(network, ExportedNetwork(model), 8)


@pytest.mark.long
def test_another_process_writes_the_same_bytes(exported: Path, sources: Path, root: Path, tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; sys.path.insert(0, sys.argv[4]); import test_export\n"
        "test_export.run(Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]))"
    )
    arguments = [str(path) for path in (sources, root, tmp_path / "again", Path(__file__).parent)]
    environment = {**os.environ, "PYTHONHASHSEED": "7"}
    subprocess.run([sys.executable, "-c", code, *arguments], check=True, env=environment, cwd=tmp_path)
    for path in exported.iterdir():
        if path.name in ("backbone.safetensors", "backbone.onnx", "README.md"):
            assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes(), path.name


def test_onnx_describes_the_network_without_paths_of_this_machine(exported: Path, root: Path) -> None:
    content = (exported / "backbone.onnx").read_bytes()
    for word in (
        str(root),
        sys.prefix,
        str(Path.home()),
        "site-packages",
        "stack_trace",
        'File "',
        "torchvision.models",
    ):
        assert word.encode() not in content, word
    model = onnx.load_from_string(content)
    facts = {entry.key: entry.value for entry in model.metadata_props}
    assert facts == {
        "architecture": "resnet18",
        "library": "torchvision",
        "stem": "tiny",
        "num_features": "512",
        "image_size": "16",
        "mean": HEADER["mean"],
        "std": HEADER["std"],
        "version": HEADER["version"],
    }
    batch = [value.type.tensor_type.shape.dim[0].dim_param for value in (*model.graph.input, *model.graph.output)]
    assert batch == ["batch", "batch"]


def test_safetensors_have_the_same_weights_and_a_longer_header(exported: Path, sources: Path) -> None:
    weights, header = read_tensors(exported / "backbone.safetensors")
    original, original_header = read_tensors(sources / "backbone.safetensors")
    assert weights.keys() == original.keys()
    assert all(torch.equal(weight, original[name]) for name, weight in weights.items())
    assert header.items() >= original_header.items()
    assert (header["architecture"], header["library"], header["stem"]) == ("resnet18", "torchvision", "tiny")


def test_the_code_of_the_card_runs(exported: Path, sources: Path, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(exported / "picture.png")
    monkeypatch.chdir(exported)
    blocks = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    assert len(blocks) == 3
    outputs: list[torch.Tensor] = []
    names: dict = {}
    for block in blocks:
        exec(block, names)
        if "features" in names:
            outputs.append(torch.as_tensor(names.pop("features")))
    images = (torch.from_numpy(pixels / 255) - torch.tensor([0.3, 0.4, 0.5])) / torch.tensor([0.2, 0.25, 0.3])
    network, _ = load_backbone(sources / "backbone.safetensors")
    with torch.no_grad():
        expected = network.eval()(images.permute(2, 0, 1)[None].float())
    assert [features.shape for features in outputs] == [(1, 512)] * 2
    for features in outputs:
        torch.testing.assert_close(features, expected, atol=1e-4, rtol=0)


def test_the_card_describes_the_origin_of_the_network(text: str) -> None:
    front = yaml.safe_load(text.split("---\n")[1])
    assert front["library_name"] == "torchvision"
    assert {"ressl", "resnet18"} <= set(front["tags"])
    (settings,) = [yaml.safe_load(block) for block in re.findall(r"```yaml\n(.*?)```", text, flags=re.DOTALL)]
    assert settings["method"]["queue_size"] == 77
    assert settings["method"]["teacher_temperature"] == 0.04  # the paper's value, which SPEC does not set
    assert "by ReSSL: relational self-supervised learning (Zheng et al., 2021)" in text
    assert "96 images, drawn with seed 1, of the split `train` of `demo`" in text
    assert "Licence: CC BY 4.0" in text
    assert "Alpaydin" in text
    assert "mean [0.3, 0.4, 0.5] and standard deviation [0.2, 0.25, 0.3]" in text
    assert "`conv1` is a 3x3 convolution of stride 2" in text


def test_the_card_lists_each_result_with_protocol_and_baselines(text: str) -> None:
    assert "| probe | linear/v1 | demo/test | top1 | 81.2 | 43.8 | 62.5 | 96 | 360 |" in text


def test_the_card_of_adopted_weights_describes_no_training(root: Path, sources: Path) -> None:
    from ssl_core.data.card import load_card
    from ssl_core.report.model_card import write_model_card

    network, header = load_backbone(sources / "backbone.safetensors")
    spec = {"dataset": {"name": "demo"}, "backbone": SPEC["backbone"], "weights": "/somewhere/else/theirs.safetensors"}
    text = write_model_card(
        "theirs", spec, network, header, card=load_card(root / "datasets" / "demo.yaml"), results=[]
    )
    assert "The weights come from the file `theirs.safetensors`, which has no record of their training" in text
    assert "/somewhere" not in text
    assert "Not evaluated." in text


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("resnet18", 64),
        ("vit_tiny_16", 32),
        ("vit_tiny_32", 64),
        ("vit_small_16", 32),
        ("timm/mobilenetv3_small_100", 32),
    ],
)
def test_timm_loads_the_folder_of_its_networks(name: str, size: int, tmp_path: Path) -> None:
    network = trained(name, "imagenet", size)
    config = Backbone(name=name)
    save_backbone(tmp_path / "backbone.safetensors", network, config, size, HEADER)
    header = load_backbone(tmp_path / "backbone.safetensors")[1]
    write_json(tmp_path / "config.json", hub_config(network, header))
    model = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    images = torch.randn(2, 3, size, size)
    with torch.no_grad():
        torch.testing.assert_close(model(images), network(images))
    settings: Any = model.pretrained_cfg
    assert list(settings["mean"]) == json.loads(HEADER["mean"])


@pytest.mark.long
def test_timm_has_all_resnets_of_torchvision_with_the_same_weights() -> None:
    for name in torchvision.models.list_models(module=torchvision.models):
        if name.startswith(("resnet", "resnext", "wide_resnet")):
            with torch.device("meta"):
                theirs = timm.create_model(name, num_classes=0).state_dict()
                ours = torchvision.models.get_model(name).state_dict()
            shapes = {key: weight.shape for key, weight in ours.items() if not key.startswith("fc.")}
            assert shapes == {key: weight.shape for key, weight in theirs.items()}, name


@pytest.mark.parametrize("name", ["resnet50x2", "deit_tiny", "mobilenet_v2", "mobilenet_v3_small", "efficientnet_b0"])
def test_networks_that_timm_lacks_name_no_architecture(name: str) -> None:
    config = Backbone(name=name)  # pyright: ignore[reportArgumentType]
    header = HEADER | {"backbone": config.model_dump_json(), "image_size": "32"}
    assert "architecture" not in hub_config(build_backbone(config, 32), header)


def test_timm_refuses_the_folder_of_a_changed_stem(exported: Path) -> None:
    assert json.loads((exported / "config.json").read_text())["network"] == "resnet18"
    with pytest.raises(KeyError, match="architecture"):
        timm.create_model(f"local-dir:{exported}", pretrained=True)


def test_hubs_read_the_results_of_the_card(text: str) -> None:
    data: Any = ModelCard(text).data
    (entry,) = data.eval_results
    assert (entry.dataset_name, entry.dataset_split, entry.metric_type, entry.metric_value) == (
        "demo",
        "test",
        "top1",
        81.25,
    )
