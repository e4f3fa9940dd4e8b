"""Shards of coloured squares and a small untrained backbone, made once."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from ssl_core.config import Backbone, Dataset
from ssl_core.data.shards import Manifest, Shard, Split, new_shard
from ssl_core.evaluations.base import Subjects
from ssl_core.evaluations.parts.features import Pixels
from ssl_core.files import write_text
from ssl_core.networks.backbones import build_backbone, save_backbone
from ssl_core.stages import evaluate

COLOURS = ((200, 60, 60), (60, 200, 60), (60, 60, 200))
MEAN, STD = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)
SEED = 3
SQUARES = Dataset(name="squares")


def quiet(metrics: dict[str, float], epoch: int) -> None:
    """Take a run's metrics and log none."""


def measure(spec: dict[str, Any], backbone: Path, manifest: Path, output: Path, **options: Any) -> dict[str, Any]:
    """Run the stage `evaluate` and return the results that it wrote."""
    files = {"backbone": backbone, "manifest": manifest, "output": output}
    evaluate.run("mine", "few", spec=spec, code="c0de", threads=1, **files, **options)
    return json.loads(output.read_text(), parse_constant=pytest.fail)  # NaN is no JSON


class Tiny(nn.Module):
    """A convolution, batch norm that training mode would move, and pooling: (batch, 3, h, w) -> (batch, 8)."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(3, 8, 3)
        self.norm = nn.BatchNorm2d(8)

    def forward(self, images: Tensor) -> Tensor:
        return self.norm(self.convolution(images)).relu().mean(dim=(2, 3))


def write_shards(folder: Path, *, train: list[int], test: list[int], labelled: bool = True) -> Path:
    """Write 16x16 squares whose colour is their index modulo 3, with the labels `train` and `test`."""
    splits = {}
    for name, labels in (("train", train), ("test", test)):
        generator = np.random.default_rng(len(labels))
        path = folder / f"{name}-000000.tar"
        with new_shard(path) as writer:
            for number, label in enumerate(labels):
                noise = generator.normal(0, 25, (16, 16, 3))
                pixels = np.clip(np.array(COLOURS[number % 3]) + noise, 0, 255).astype(np.uint8)
                content = io.BytesIO()
                Image.fromarray(pixels).save(content, "png")
                writer.add(number, "png", content.getvalue(), label if labelled else -1)
            shard: Shard = writer.close().model_copy(update={"file": path.name})
        counts = tuple(int(count) for count in np.bincount(labels, minlength=3)) if labelled else None
        splits[name] = Split(
            images=len(labels), labelled=labelled, bytes=shard.bytes, class_counts=counts, shards=(shard,), rejected=()
        )
    manifest = Manifest(
        dataset="squares",
        image_size=16,
        mean=MEAN,
        std=STD,
        classes=("red", "green", "blue") if labelled else None,
        avoid=("flip",),
        splits=splits,
    )
    write_text(folder / "manifest.json", manifest.model_dump_json(indent=2))
    return folder / "manifest.json"


@pytest.fixture(scope="session")
def manifest_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 training and 31 test squares, labelled by their colour."""
    return write_shards(
        tmp_path_factory.mktemp("squares"), train=[n % 3 for n in range(60)], test=[n % 3 for n in range(31)]
    )


@pytest.fixture(scope="session")
def manifest(manifest_path: Path) -> Manifest:
    return Manifest.load(manifest_path)


@pytest.fixture(scope="session")
def backbone_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A backbone file as the pre-training writes it; its weights differ from those of its seed."""
    path = tmp_path_factory.mktemp("backbone") / "backbone.safetensors"
    config = Backbone(name="mobilenet_v3_small", stem="small", hidden_layer=False)
    torch.manual_seed(SEED + 1)
    metadata = {"mean": str(list(MEAN)), "std": str(list(STD)), "seed": str(SEED)}
    save_backbone(path, build_backbone(config, 16), config, 16, metadata)
    return path


@pytest.fixture
def subjects() -> Subjects:
    """A random convolutional network and the pixels, on 16x16 images."""
    torch.manual_seed(0)
    return Subjects({"pretrained": Tiny(), "pixels": Pixels()}, 16, MEAN, STD)
