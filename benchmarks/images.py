"""Images for benchmarks, from an archive or synthetic, as bytes and as shards."""

import io
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

from ssl_core.data.shards import Manifest, Split, new_shard
from ssl_core.files import write_text

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def read_images(archive: Path, count: int, size: int) -> list[bytes]:
    """Return `count` encoded images of an archive, or synthetic ones without an archive."""
    if not archive.exists():
        return synthetic_images(count, size)
    images: list[bytes] = []
    with tarfile.open(archive) as tar:
        for member in tar:
            file = tar.extractfile(member) if member.name.lower().endswith((".jpg", ".jpeg")) else None
            if file is not None:
                images.append(file.read())
            if len(images) == count:
                break
    return images


def synthetic_images(count: int, size: int) -> list[bytes]:
    """Return `count` JPEGs of smooth noise, of photograph size if they replace photographs."""
    width, height = (500, 375) if size == 224 else (size, size)
    generator = np.random.default_rng(0)
    images = []
    for _ in range(count):
        noise = Image.fromarray(generator.integers(0, 256, (12, 16, 3), dtype=np.uint8))
        file = io.BytesIO()
        noise.resize((width, height), Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
        images.append(file.getvalue())
    return images


def write_shards(folder: Path, images: list[bytes], size: int) -> Manifest:
    """Write one shard and return its manifest."""
    path = folder / "train-000000.tar"
    path.parent.mkdir(parents=True)
    with new_shard(path) as writer:
        for number, image in enumerate(images):
            writer.add(number, "jpg", image, -1)
        shard = writer.close().model_copy(update={"file": path.name})
    split = Split(
        images=len(images), labelled=False, bytes=shard.bytes, class_counts=None, shards=(shard,), rejected=()
    )
    manifest = Manifest(
        dataset="benchmark", image_size=size, mean=MEAN, std=STD, classes=None, avoid=(), splits={"train": split}
    )
    write_text(folder / "manifest.json", manifest.model_dump_json())
    return Manifest.load(folder / "manifest.json")
