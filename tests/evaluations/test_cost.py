"""Costs: counts as published for known networks, timings that are there, nothing claimed where nothing was trained."""

import json
from pathlib import Path

import onnx
import pytest
from onnx import TensorProto, helper

from ssl_core.config import Backbone
from ssl_core.evaluations.cost import count_macs
from ssl_core.files import write_json
from ssl_core.networks.backbones import build_backbone
from ssl_core.stages import cost

SPEC = {"protocol": "cost", "warmup": 2, "repeats": 20, "dataset": {"name": "squares"}}
PRETRAIN = {
    "num_images": 60,
    "hardware": "a card",
    "cost": {
        "seconds": 12.5,
        "images_per_second": 480.0,
        "peak_memory_mb": 321,
        "data_wait_share": 0.1,
        "backward_passes": 6000,
    },
}


# Published, in units of 1e9 with the classifier, whose share of at most .0013 is not counted here: ResNet-18 1.82
# (torchvision's page 1.81), MobileNetV2 0.30 (its paper).
@pytest.mark.parametrize(("name", "published"), [("resnet18", 1.82), ("mobilenet_v2", 0.300)])
def test_multiply_accumulates_are_the_published_ones(name: str, published: float) -> None:
    macs = count_macs(build_backbone(Backbone(name=name), 224), 224)
    assert macs / 1e9 == pytest.approx(published, rel=0.015)


def test_attention_is_counted() -> None:
    width, blocks, tokens = 192, 12, 4 + 1
    patches = 4 * 3 * 16 * 16 * width
    block = tokens * (4 + 8) * width**2 + 2 * tokens**2 * width  # qkv, out and the MLP; then q k and the weighted v
    assert count_macs(build_backbone(Backbone(name="vit_tiny_16"), 32), 32) == patches + blocks * block


def test_counting_leaves_the_network_as_it_is() -> None:
    network = build_backbone(Backbone(name="mobilenet_v3_small"), 32)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    count_macs(network, 32)
    assert network.training
    assert all(value.equal(before[name]) for name, value in network.state_dict().items())


@pytest.fixture(scope="module")
def onnx_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file that pools, under the names that an export has."""
    images = helper.make_tensor_value_info("images", TensorProto.FLOAT, ["batch", 3, 16, 16])
    features = helper.make_tensor_value_info("features", TensorProto.FLOAT, ["batch", 3, 1, 1])
    graph = helper.make_graph(
        [helper.make_node("GlobalAveragePool", ["images"], ["features"])], "g", [images], [features]
    )
    path = tmp_path_factory.mktemp("onnx") / "backbone.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
    return path


@pytest.fixture(scope="module")
def measured(backbone_path: Path, onnx_path: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict]:
    """The results with and without a pre-training."""
    folder = tmp_path_factory.mktemp("cost")
    write_json(folder / "pretrain.json", PRETRAIN)
    found = {}
    for name, pretrain in (("trained", folder / "pretrain.json"), ("adopted", None)):
        cost.run(
            name,
            "cost",
            spec=SPEC,
            code="c0de",
            backbone=backbone_path,
            onnx=onnx_path,
            pretrain=pretrain,
            output=folder / f"{name}.json",
        )
        found[name] = json.loads((folder / f"{name}.json").read_text())
    return found


def test_the_results_look_like_all_others(measured: dict[str, dict]) -> None:
    result = measured["trained"]
    assert (result["protocol"], result["dataset"], result["headline"]) == ("cost/v1", "squares", "images_per_second")
    assert result["baselines"] == {}
    assert {"experiment", "evaluation", "split", "hyperparameters", "num_train", "digests", "hardware"} <= set(result)


def test_the_pre_trainings_own_numbers_are_passed_on(measured: dict[str, dict]) -> None:
    metrics = measured["trained"]["metrics"]
    for name in ("seconds", "images_per_second", "peak_memory_mb", "backward_passes"):
        assert metrics[name] == PRETRAIN["cost"][name]
    assert measured["trained"]["hyperparameters"]["pretraining_hardware"] == "a card"


def test_weights_from_elsewhere_have_no_cost_of_training(measured: dict[str, dict]) -> None:
    result = measured["adopted"]
    assert result["headline"] == "latency_ms"
    assert not {"seconds", "images_per_second", "peak_memory_mb", "backward_passes"} & set(result["metrics"])


def test_sizes_are_those_of_the_files(measured: dict[str, dict], onnx_path: Path) -> None:
    metrics = measured["adopted"]["metrics"]
    assert metrics["onnx_bytes"] == len(onnx_path.read_bytes())
    assert metrics["parameters"] == 927_008  # MobileNetV3-small without its classifier
    assert metrics["flops"] == 2 * metrics["macs"] > 0


def test_latency_is_a_median_between_its_spread(measured: dict[str, dict]) -> None:
    metrics = measured["adopted"]["metrics"]
    assert 0 < metrics["latency_ms_p10"] <= metrics["latency_ms"] <= metrics["latency_ms_p90"]
    assert measured["adopted"]["hyperparameters"]["threads"] == 1
