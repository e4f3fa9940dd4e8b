"""Every kind of image, sharded and decoded on the GPU ("mixed"), against PIL and against the CPU's decoder."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image, ImageOps
from torch import Tensor

from ssl_core.config import Dataset
from ssl_core.data.loader import Loader
from ssl_core.data.shards import Manifest
from ssl_core.data.views import View
from ssl_core.stages import shard
from tests.data.conftest import smooth_picture

SIDE = 48
TURNED = Image.Exif()
TURNED[0x0112] = 6
KINDS: dict[str, tuple[str, dict[str, Any]]] = {  # file name -> mode of the picture, options of PIL
    "444.jpg": ("RGB", {"quality": 95, "subsampling": 0}),
    "420.jpg": ("RGB", {"quality": 90, "subsampling": 2}),
    "progressive.jpg": ("RGB", {"quality": 95, "progressive": True}),
    "grey.jpg": ("L", {"quality": 95}),
    "cmyk.jpg": ("CMYK", {"quality": 95}),
    "turned.jpg": ("RGB", {"quality": 95, "exif": TURNED}),
    "rgb.png": ("RGB", {}),
    "grey.png": ("L", {}),
    "palette.png": ("P", {}),
    "alpha.png": ("RGBA", {}),
    "two_colours.png": ("1", {}),
    "turned.png": ("RGB", {"exif": TURNED}),
    "animated.gif": ("P", {}),
    "bitmap.bmp": ("RGB", {}),
    "pixels.ppm": ("RGB", {}),
    "lzw.tiff": ("RGB", {"compression": "tiff_lzw"}),
    "lossless.webp": ("RGB", {"lossless": True}),
    "lossy.webp": ("RGB", {"quality": 90}),
    "wavelets.jp2": ("RGB", {}),
}
LOSSY = 2.0  # mean difference in 0..255 between two decoders of JPEG, whose chroma is enlarged in different ways
EXACT = 0.01


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("kinds")
    (folder / "train" / "any").mkdir(parents=True)
    for number, (name, (mode, options)) in enumerate(sorted(KINDS.items())):
        picture = smooth_picture(number, SIDE).convert(mode)
        picture.save(folder / "train" / "any" / name, **options)
    return folder


@pytest.fixture(scope="module")
def manifest(folder: Path) -> Manifest:
    source = {"type": "image_folder", "path": str(folder), "splits": {"train": {}}}
    card = folder / "kinds.yaml"
    card.write_text(yaml.safe_dump({"name": "kinds", "image_size": SIDE, "source": source}))
    shard.run(card, folder / "shards", threads=1)
    return Manifest.load(folder / "shards" / "manifest.json")


def decode(manifest: Manifest, device: str) -> Tensor:
    """Return the pixels of all images, in the images' order, as 0..255."""
    view = {"view": View(size=SIDE, crop="center")}
    options: dict[str, Any] = {"mean": (0.0,) * 3, "std": (1 / 255,) * 3, "shuffle": False, "seed": 0}
    with Loader(manifest, Dataset(name="kinds"), view, batch_size=len(KINDS), device=device, **options) as loader:
        batch = loader.next()
    (pixels,) = batch.views["view"]
    return pixels[batch.indices.argsort()].cpu()


def read(path: Path) -> Tensor:
    with Image.open(path) as file:
        picture = ImageOps.exif_transpose(file).convert("RGB")
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).float()


def test_every_kind_shows_its_picture(manifest: Manifest, folder: Path, device: str) -> None:
    pixels = decode(manifest, device)
    assert manifest.split("train").images == len(KINDS)
    for name, image in zip(sorted(KINDS), pixels, strict=True):
        error = (image - read(folder / "train" / "any" / name)).abs().mean().item()
        tolerance = LOSSY if name.endswith(".jpg") else EXACT
        assert error < tolerance, f"{name}: {error:.2f}"


@pytest.mark.cuda
def test_both_decoders_agree(manifest: Manifest, device: str) -> None:
    difference = (decode(manifest, device) - decode(manifest, "cpu")).abs()
    assert difference.mean().item() < 0.5
    assert difference.mean(dim=(1, 2, 3)).max().item() < LOSSY
