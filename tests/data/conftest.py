"""A tiny data set of synthetic images, written as shards."""

import hashlib
import io
import json
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ssl_core.data.shards import Manifest

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
    """Return what writes shards and their manifest, without the code under test that writes real ones."""

    def make(folder: Path, images: Sequence[bytes], labels: Sequence[int], *, per_shard: int = 40) -> Manifest:
        folder.mkdir(parents=True, exist_ok=True)
        order = np.random.default_rng(1).permutation(len(images))
        shards = [
            _write_shard(folder / f"train-{number:06d}.tar", images, labels, order[start : start + per_shard])
            for number, start in enumerate(range(0, len(images), per_shard))
        ]
        split = {
            "images": len(images), "labelled": min(labels) >= 0, "bytes": sum(int(str(s["bytes"])) for s in shards),
            "class_counts": None, "shards": shards, "rejected": [],
        }  # fmt: skip
        manifest = {
            "version": 1, "dataset": "tiny", "image_size": 32, "mean": [0.5, 0.4, 0.3], "std": [0.2, 0.25, 0.3],
            "classes": None, "avoid": [], "splits": {"train": split},
        }  # fmt: skip
        path = folder / "manifest.json"
        path.write_text(json.dumps(manifest))
        return Manifest.load(path)

    return make


def _write_shard(path: Path, images: Sequence[bytes], labels: Sequence[int], numbers: np.ndarray) -> dict[str, object]:
    lines = [f"v1.2 {len(numbers)}"]
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for number in map(int, numbers):
            extension = "png" if images[number].startswith(b"\x89PNG") else "jpg"
            fields = []
            meta = np.array([labels[number], number], dtype="<i8").tobytes()
            for kind, content in ((extension, images[number]), ("meta.i64", meta)):
                member = tarfile.TarInfo(f"{number:08d}.{kind}")
                member.size = len(content)
                fields.append(f"{kind} {tar.offset + 512} {len(content)} {member.name}")
                tar.addfile(member, io.BytesIO(content))
            lines.append(" ".join(fields))
    path.with_suffix(".idx").write_text("\n".join([*lines, ""]))
    content = path.read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    return {"file": path.name, "images": len(numbers), "bytes": len(content), "sha256": digest}


@pytest.fixture(scope="session")
def pictures() -> list[Image.Image]:
    """101 pictures of 32 px."""
    return [smooth_picture(seed, 32) for seed in range(101)]


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory, make_shards: MakeShards, pictures: list[Image.Image]) -> Manifest:
    """The pictures as three shards; the label of image i is i modulo 7."""
    folder = tmp_path_factory.mktemp("tiny")
    return make_shards(folder, [encode(image) for image in pictures], [number % 7 for number in range(101)])
