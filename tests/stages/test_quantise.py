"""Quantised files: features near those of float32, equal bytes each time, one line for networks that do not survive."""

import json
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from onnx import TensorProto
from torch import Tensor, nn

from ssl_core.config import Dataset, Quantise
from ssl_core.data.shards import Manifest
from ssl_core.networks.exported import ExportedNetwork
from ssl_core.stages import export, quantise
from tests.evaluations.conftest import MEAN, STD, Tiny, write_shards

FACTS = {"image_size": "16", "mean": json.dumps(MEAN), "std": json.dumps(STD)}
SQUARES = {"name": "squares"}


class Offset(Tiny):
    """Between its layers, all values differ from a large constant by less than a step of 8-bit integers."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Conv2d(8, 8, 1)

    def forward(self, images: Tensor) -> Tensor:
        return self.last(self.norm(self.convolution(images)) + 1e4).mean(dim=(2, 3))


def write_network(folder: Path, network: nn.Module) -> Path:
    path = folder / "backbone.onnx"
    path.write_bytes(export.to_onnx(network.eval(), 16, FACTS))
    return path


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shards(tmp_path_factory.mktemp("squares"), train=[n % 3 for n in range(60)], test=[0] * 31)


@pytest.fixture(scope="module")
def network() -> Tiny:
    torch.manual_seed(0)
    return Tiny().eval()


@pytest.fixture(scope="module")
def float32(network: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_network(tmp_path_factory.mktemp("export"), network)


def run(float32: Path, manifest: Path, output: Path, dataset: Any = SQUARES, **spec: Any) -> Path:
    quantise.run("mine", spec=spec, dataset=dataset, onnx=float32, manifest=manifest, output=output)
    return output


@pytest.fixture(scope="module")
def int8(float32: Path, manifest: Path) -> Path:
    return run(float32, manifest, float32.with_name("backbone.int8.onnx"))


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_both_files_give_the_features_of_torch_in_any_memory_format(
    memory_format: torch.memory_format, network: Tiny, float32: Path, int8: Path, manifest: Path
) -> None:
    squares = Dataset(name="squares")
    images = quantise.read_images(Quantise(), squares, Manifest.load(manifest), ExportedNetwork(float32))
    images = images.to(memory_format=memory_format)
    with torch.no_grad():
        expected = network(images)
    torch.testing.assert_close(ExportedNetwork(float32)(images), expected, atol=1e-5, rtol=0)
    features = ExportedNetwork(int8)(images)
    assert 0 < quantise.relative_error(features, expected) < 0.01
    torch.testing.assert_close(ExportedNetwork(int8)(images[:1]), features[:1])


def test_weights_are_8_bit_integers_and_metadata_have_the_measured_error(int8: Path) -> None:
    model = onnx.load(int8)
    assert TensorProto.INT8 in {weight.data_type for weight in model.graph.initializer}
    facts = {entry.key: entry.value for entry in model.metadata_props}
    assert facts.items() >= FACTS.items()
    assert facts["quantisation"] in ("int8, weights per channel", "int8, weights per tensor")
    assert facts["calibration_images"] == "60"
    assert 0 < float(facts["calibration_error"]) < 0.01
    assert b"/tmp" not in int8.read_bytes()


def test_a_second_run_writes_the_same_bytes(float32: Path, int8: Path, manifest: Path, tmp_path: Path) -> None:
    assert run(float32, manifest, tmp_path / "again.onnx").read_bytes() == int8.read_bytes()


def test_images_come_from_the_subset_of_the_pretraining(float32: Path, manifest: Path, tmp_path: Path) -> None:
    subset = {"images": 40, "seed": 1}
    path = run(float32, manifest, tmp_path / "few.onnx", SQUARES | {"subset": subset})
    assert ExportedNetwork(path).facts["calibration_images"] == "40"


def test_too_few_images_are_refused(float32: Path, manifest: Path, tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match="12 images of squares/train to calibrate 8-bit integers, expected at least 32"
    ):
        run(float32, manifest, tmp_path / "few.onnx", images=12)


def test_a_network_that_8_bit_integers_ruin_is_refused_with_its_error(manifest: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    path = write_network(tmp_path, Offset())
    with pytest.raises(ValueError, match=r"^8-bit integers change the features of .* by [\d.e+]+ of their variance"):
        run(path, manifest, tmp_path / "ruined.onnx")
    assert not (tmp_path / "ruined.onnx").exists()
    run(path, manifest, tmp_path / "ruined.onnx", largest_error=1e9)


def test_equal_features_for_all_images_have_an_infinite_error() -> None:
    constant = torch.ones(4, 2)
    assert quantise.relative_error(constant + 1, constant) == float("inf")
    assert quantise.relative_error(constant, constant) == float("inf")
