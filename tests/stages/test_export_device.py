"""Files for phones: features near those of torch in both memory formats, and one line where packages are missing.

The packages of the extras `litert` and `executorch` are not in requirements.lock; most of these tests need them.
"""

import re
import sys
from pathlib import Path

import pytest
import torch

from ssl_core.config import Backbone
from ssl_core.evaluations.parts.exported import open_exported
from ssl_core.networks.backbones import load_backbone, save_backbone
from ssl_core.stages import export_device, quantise_device
from ssl_core.stages.quantise import relative_error
from tests.evaluations.conftest import MEAN, STD, write_shards
from tests.markdown import ROOT
from tests.stages.test_export import trained

HEADER = {"mean": str(list(MEAN)), "std": str(list(STD)), "seed": "0", "version": "c0ffee"}
NEEDED = {"tflite": ("litert_torch", "ai_edge_quantizer"), "pte": ("executorch.exir", "torchao")}
# Networks without trained weights: name, stem and side of the images.
FAMILIES = [
    ("resnet18", "tiny", 16),
    ("mobilenet_v2", "small", 32),
    ("mobilenet_v3_small", "small", 32),
    ("efficientnet_b0", "small", 32),
    ("vit_tiny_16", "imagenet", 32),
]
formats = pytest.mark.parametrize("format", ["tflite", "pte"])
converts = pytest.mark.filterwarnings("ignore")  # the converters warn of their own code


def write_network(folder: Path, name: str, stem: str, size: int) -> Path:
    path = folder / "backbone.safetensors"
    save_backbone(path, trained(name, stem, size), Backbone(name=name, stem=stem), size, HEADER)  # pyright: ignore[reportArgumentType]
    return path


def need(format: str) -> None:
    for package in NEEDED[format]:
        pytest.importorskip(package, reason=f"for .{format} files; see docs/evaluations.md#phones")


@formats
def test_without_the_packages_one_line_has_the_command_that_installs_them(
    format: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, NEEDED[format][0].split(".")[0], None)
    backbone = write_network(tmp_path, *FAMILIES[0])
    lock = f"requirements-{export_device.EXTRAS[f'.{format}']}.lock"
    with pytest.raises(ValueError, match=rf"not installed \(.*\): run `pip install --no-deps -r {lock}` in the folder"):
        export_device.run("mine", backbone=backbone, output=tmp_path / f"backbone.{format}", threads=1)
    assert (ROOT / lock).is_file()


@pytest.mark.parametrize("extra", export_device.EXTRAS.values())
def test_a_lock_of_an_extra_changes_no_package_of_the_core(extra: str) -> None:
    def names(path: str) -> set[str]:
        return set(re.findall(r"^([\w.-]+)==", (ROOT / path).read_text(encoding="utf-8"), re.MULTILINE))

    assert names(f"requirements-{extra}.lock") & names("requirements.lock") == set()
    assert len(names(f"requirements-{extra}.lock")) > 10


@converts
@formats
@pytest.mark.long
@pytest.mark.parametrize(("name", "stem", "size"), FAMILIES, ids=[family[0] for family in FAMILIES])
def test_features_are_those_of_torch(format: str, name: str, stem: str, size: int, tmp_path: Path) -> None:
    need(format)
    backbone, output = write_network(tmp_path, name, stem, size), tmp_path / f"backbone.{format}"
    export_device.run("mine", backbone=backbone, output=output, threads=1)
    network, _ = load_backbone(backbone)
    exported = open_exported(output)
    images = torch.randn(4, 3, size, size, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = network.eval()(images)
    for memory_format in (torch.contiguous_format, torch.channels_last):
        features = exported(images.to(memory_format=memory_format))
        torch.testing.assert_close(features, expected, atol=1e-4 * max(1, expected.abs().max().item()), rtol=0)
    assert exported.image_size == size
    assert exported.normalisation == (MEAN, STD)


@converts
@formats
@pytest.mark.long
def test_8_bit_files_have_their_measured_error_and_ruined_networks_are_refused(format: str, tmp_path: Path) -> None:
    need(format)
    backbone, output = write_network(tmp_path, *FAMILIES[0]), tmp_path / f"backbone.int8.{format}"
    manifest = write_shards(tmp_path / "squares", train=[n % 3 for n in range(60)], test=[0] * 31)
    inputs = {"dataset": {"name": "squares"}, "backbone": backbone, "manifest": manifest, "threads": 1}
    with pytest.raises(ValueError, match=r"^8-bit integers change the features of .* by .* of their variance"):
        quantise_device.run("mine", spec={"largest_error": 1e-9}, output=output, **inputs)
    assert not output.exists()
    quantise_device.run("mine", spec={}, options={"normalise": True}, output=output, **inputs)
    exported = open_exported(output)
    assert 0 < float(exported.facts["calibration_error"]) < 0.2
    assert exported.facts["calibration_images"] == "60"
    assert exported.normalises
    assert output.stat().st_size < backbone.stat().st_size / 3
    images = torch.rand(64, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    network, _ = load_backbone(backbone)
    mean, std = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))
    with torch.no_grad():
        expected = network.eval()((images - mean) / std)
    assert relative_error(exported(images), expected) < 0.5
