"""A folder of photographs in several encodings, the same in shards, and a small untrained backbone."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from ssl_core.config import Backbone
from ssl_core.data.image_files import ORIENTATION
from ssl_core.networks.backbones import build_backbone, save_backbone
from ssl_core.stages import shard

NAMES = ["a/1.jpg", "a/2.png", "b/large.jpg", "b/palette.gif", "b/turned.jpg"]


class Photos(NamedTuple):
    """A folder, and the manifest of its shards."""

    folder: Path
    manifest: Path


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Photos:
    project = tmp_path_factory.mktemp("photos")
    folder = project / "photos"
    random = np.random.default_rng(0)
    for number, name in enumerate(NAMES):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        height, width = (30, 2500) if path.stem == "large" else (40 + number, 60)  # 2500: sharding reduces it
        image = Image.fromarray(random.integers(0, 255, (height, width, 3), dtype=np.uint8))
        options = {}
        if path.stem == "turned":
            options["exif"] = Image.Exif()
            options["exif"][ORIENTATION] = 6
        image.save(path, **options)
    card = {"name": "photos", "image_size": 16}
    splits = {"train": {"folder": "", "labels": "none"}}
    card["source"] = {"type": "image_folder", "path": str(folder), "splits": splits}
    (project / "photos.yaml").write_text(yaml.safe_dump(card))
    shard.run(project / "photos.yaml", project / "shards", threads=1)
    return Photos(folder, project / "shards" / "manifest.json")


@pytest.fixture(scope="session")
def network(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of results with a backbone."""
    folder = tmp_path_factory.mktemp("results")
    write_backbone(folder / "backbone.safetensors", seed=0)
    return folder


def write_backbone(path: Path, *, seed: int) -> None:
    """Write a random backbone for images of 16 pixels, as the pre-training writes it."""
    config = Backbone(name="mobilenet_v3_small", stem="small", hidden_layer=False)
    torch.manual_seed(seed)
    metadata = {"mean": "[0.5, 0.4, 0.3]", "std": "[0.25, 0.2, 0.25]", "seed": "0"}
    save_backbone(path, build_backbone(config, 16), config, 16, metadata)
