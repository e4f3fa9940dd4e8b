"""The plain PyTorch loop of the documentation sees the images and labels that the loader gives."""

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from ssl_core.config import Dataset
from ssl_core.data.loader import Loader
from ssl_core.data.shards import Manifest
from ssl_core.data.views import View
from tests.data.conftest import MakeShards, encode
from tests.markdown import ROOT, files

LOOP = ROOT / "docs" / "tutorials" / "your_own_loop.md"
Seen = dict[int, tuple[int, Tensor]]  # label and image by index


@pytest.fixture
def mixed(tmp_path: Path, make_shards: MakeShards, pictures: list[Image.Image]) -> Manifest:
    """Pictures of 32 px as PNG, JPEG, and JPEG that EXIF turns, in three shards."""
    turned = Image.Exif()
    turned[0x0112] = 6
    kinds: list[tuple[str, dict[str, Any]]] = [("PNG", {}), ("JPEG", {}), ("JPEG", {"exif": turned})]
    images = [encode(picture, kinds[number % 3][0], **kinds[number % 3][1]) for number, picture in enumerate(pictures)]
    return make_shards(tmp_path / "shards" / "demo", images, [number % 7 for number in range(len(images))])


def seen_by(batches: Any) -> Seen:
    seen: Seen = {}
    for images, labels, indices in batches:
        for image, label, index in zip(images, labels.tolist(), indices.tolist(), strict=True):
            assert index not in seen
            seen[index] = (label, image)
    return seen


def of_the_loader(manifest: Manifest) -> Seen:
    views = {"view": View(size=32, crop="center")}
    statistics: dict[str, Any] = {"mean": (0, 0, 0), "std": (1, 1, 1)}
    loader = Loader(manifest, Dataset(name="demo"), views, batch_size=16, seed=0, shuffle=False, **statistics)
    with loader:
        return seen_by((batch.views["view"][0], batch.labels, batch.indices) for batch in loader.epoch())


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # the library leaves tars open
def test_the_loop_of_the_page_sees_what_the_loader_gives(
    tmp_path: Path, mixed: Manifest, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(files(LOOP)["loop.py"], names)
    assert capsys.readouterr().out.startswith("loss ")
    plain, ours = seen_by(names["batches"]), of_the_loader(mixed)
    assert plain.keys() == ours.keys() == set(range(mixed.split("train").images))
    for index, (label, image) in plain.items():
        assert label == ours[index][0]
        torch.testing.assert_close(image, ours[index][1], atol=1e-6, rtol=0)
