"""A tiny data set of synthetic images, written as shards."""

import io
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ssl_core.data.shards import Manifest, Shard, Split, new_shard
from ssl_core.files import write_json

MakeShards = Callable[..., Manifest]


def smooth_picture(seed: int, side: int) -> Image.Image:
    """Return a colourful picture with structure at several scales."""
    generator = np.random.default_rng(seed)
    small = Image.fromarray(generator.integers(0, 256, (5, 5, 3), dtype=np.uint8))
    return small.resize((side, side), Image.Resampling.BICUBIC)


def encode(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


@pytest.fixture(scope="session")
def make_shards() -> MakeShards:
    """A function that writes images as shards with a manifest."""

    def make(folder: Path, images: Sequence[bytes], labels: Sequence[int], *, per_shard: int = 40) -> Manifest:
        folder.mkdir(parents=True, exist_ok=True)
        order = np.random.default_rng(1).permutation(len(images))
        shards = [
            _write_shard(folder / f"train-{number:06d}.tar", images, labels, order[start : start + per_shard])
            for number, start in enumerate(range(0, len(images), per_shard))
        ]
        split = Split(
            images=len(images),
            labelled=min(labels) >= 0,
            bytes=sum(shard.bytes for shard in shards),
            class_counts=None,
            shards=tuple(shards),
            rejected=(),
        )
        manifest = Manifest(
            dataset="tiny",
            image_size=32,
            mean=(0.5, 0.4, 0.3),
            std=(0.2, 0.25, 0.3),
            classes=None,
            avoid=(),
            splits={"train": split},
        )
        write_json(folder / "manifest.json", manifest.content())
        return Manifest.load(folder / "manifest.json")

    return make


def _write_shard(path: Path, images: Sequence[bytes], labels: Sequence[int], numbers: np.ndarray) -> Shard:
    with new_shard(path) as writer:
        for number in numbers.tolist():
            extension = "png" if images[number].startswith(b"\x89PNG") else "jpg"
            writer.add(number, extension, images[number], labels[number])
        return writer.close()


@pytest.fixture(scope="session")
def pictures() -> list[Image.Image]:
    """101 pictures of 32 px."""
    return [smooth_picture(seed, 32) for seed in range(101)]


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory, make_shards: MakeShards, pictures: list[Image.Image]) -> Manifest:
    """The pictures as three shards; the label of image i is i modulo 7."""
    folder = tmp_path_factory.mktemp("tiny")
    return make_shards(folder, [encode(image) for image in pictures], [number % 7 for number in range(101)])
