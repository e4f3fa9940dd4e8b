"""Thousands of damaged JPEG and PNG files: DALI decodes each image that sharding stores, to PIL's pixels."""

import importlib
import io
import struct
import subprocess
import sys
import tarfile
import warnings
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from PIL import Image, ImageOps

from ssl_core.data.image_files import SIXTEEN_BITS, is_image, prepare

from .conftest import encode, smooth_picture

BATCH = 16
START_OF_SCAN = 0xDA
NEW_CHUNKS = (b"tEXt", b"ABCD", b"abCD", b"PLTE", b"tRNS", b"acTL", b"gAMA", b"sBIT", b"bKGD", b"hIST", b"eXIf")


class Stored(NamedTuple):
    """An image as it is stored, and the pixels that PIL shows of its file."""

    name: str
    content: bytes
    is_kept: bool
    pixels: np.ndarray


def jpegs() -> dict[str, bytes]:
    picture = smooth_picture(0, 40).resize((61, 37))
    turned = Image.Exif()
    turned[0x0112] = 6
    turned[0x010F] = "Maker"
    return {
        "plain": encode(picture, "JPEG"),
        "full colours": encode(picture, "JPEG", subsampling=0, quality=95),
        "half colours": encode(picture, "JPEG", subsampling=1),
        "progressive": encode(picture, "JPEG", progressive=True),
        "gray": encode(picture.convert("L"), "JPEG"),
        "restarts": encode(picture, "JPEG", restart_marker_blocks=3),
        "turned": encode(picture, "JPEG", exif=turned.tobytes()),
        "cmyk": encode(picture.convert("CMYK"), "JPEG"),
        "comment": encode(picture, "JPEG", optimize=True, comment=b"hello"),
    }


def pngs() -> dict[str, bytes]:
    picture = smooth_picture(0, 40).resize((61, 37))
    transparent = picture.copy()
    transparent.putalpha(picture.convert("L"))
    turned = Image.Exif()
    turned[0x0112] = 6
    turned[0x010F] = "Maker"
    return {
        "rgb": encode(picture),
        "gray": encode(picture.convert("L")),
        "palette": encode(picture.quantize(40)),
        "small palette": encode(picture.quantize(12), bits=4),
        "transparent colour": encode(picture.quantize(32), transparency=3),
        "alpha": encode(transparent),
        "gray alpha": encode(transparent.convert("LA")),
        "bits": encode(picture.convert("1")),
        "turned": encode(picture, exif=turned.tobytes()),
        "profile": encode(picture, dpi=(72, 72), icc_profile=b"x" * 200),
        "16 bits": deep_png(colour=2, channels=3),
        "16 bits, alpha": deep_png(colour=6, channels=4),
    }


def deep_png(*, colour: int, channels: int) -> bytes:
    """Return a PNG of 6 x 4 pixels with 16 bits per channel, which PIL does not write."""
    pixels = np.random.default_rng(0).integers(0, 65536, (4, 6 * channels)).astype(">u2")
    rows = b"".join(b"\0" + row.tobytes() for row in pixels)
    header = struct.pack(">IIBBBBB", 6, 4, 16, colour, 0, 0, 0)
    return join_chunks([(b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")])


def split_chunks(png: bytes) -> list[tuple[bytes, bytes]]:
    chunks, position = [], 8
    while position < len(png):
        size, name = struct.unpack_from(">I4s", png, position)
        chunks.append((name, png[position + 8 : position + 8 + size]))
        position += 12 + size
    return chunks


def join_chunks(chunks: Iterable[tuple[bytes, bytes]]) -> bytes:
    parts = [b"\x89PNG\r\n\x1a\n"]
    for name, body in chunks:
        parts.append(struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body)))
    return b"".join(parts)


def segments(jpeg: bytes) -> list[tuple[int, int]]:
    """Return start and end of each segment before the pixels."""
    places, position = [], 2
    while True:
        marker, size = struct.unpack_from(">xBH", jpeg, position)
        places.append((position, position + 2 + size))
        position += 2 + size
        if marker == START_OF_SCAN:
            return places


def change_bytes(content: bytes, end: int, generator: np.random.Generator) -> bytes:
    """Change, insert, remove or blank some bytes before `end`."""
    changed = bytearray(content)
    place = int(generator.integers(2, end))
    random = generator.bytes(int(generator.choice((1, 1, 2, 8))))
    kind = generator.integers(6)
    if kind == 0:
        changed[place : place + len(random)] = random
    elif kind == 1:
        changed[place] ^= 1 << int(generator.integers(8))
    elif kind == 2:
        changed[place:place] = generator.choice((b"\0", b"\xff", random))
    elif kind == 3:
        del changed[place : place + len(random)]
    elif kind == 4:
        changed[place : place + 20] = bytes(20)
    else:
        changed[place:] = generator.choice((b"", b"\xff\xd9"))
    return bytes(changed)


def mutate_jpeg(content: bytes, generator: np.random.Generator) -> bytes:
    places = segments(content)
    start, end = places[generator.integers(len(places))]
    target = places[generator.integers(len(places))][0]
    kind = generator.integers(10)
    if kind == 0:  # a byte before a marker
        return content[:start] + bytes([generator.choice((0, 255))]) + content[start:]
    if kind == 1:  # a segment twice
        return content[:target] + content[start:end] + content[target:]
    if kind == 2:
        return content[:start] + content[end:]
    if kind < 7:
        return change_bytes(content, places[-1][1], generator)
    return change_bytes(content, len(content), generator)


def mutate_png(content: bytes, generator: np.random.Generator) -> bytes:
    """Change a PNG; most changes have a valid checksum."""
    chunks = split_chunks(content)
    place = int(generator.integers(len(chunks)))
    name, body = chunks[place]
    kind = generator.integers(8)
    if kind == 0:
        return change_bytes(content, len(content), generator)
    if kind == 1:
        chunks.insert(int(generator.integers(len(chunks) + 1)), (name, body))
    elif kind == 2:
        del chunks[place]
    elif kind == 3:
        chunks[place] = (name, body[: generator.integers(len(body) + 1)])
    elif kind == 4:
        added = NEW_CHUNKS[generator.integers(len(NEW_CHUNKS))], generator.bytes(int(generator.integers(33)))
        chunks.insert(int(generator.integers(1, len(chunks) + 1)), added)
    elif len(body) > 2:
        chunks[place] = (name, change_bytes(b"  " + body, 2 + len(body), generator)[2:])
    return join_chunks(chunks)


def pixels_of_pil(content: bytes) -> np.ndarray:
    image = Image.open(io.BytesIO(content))
    try:
        image = ImageOps.exif_transpose(image)
    except Exception:  # EXIF data that PIL cannot read
        image.load()
    return np.asarray(image.convert("RGB"))


def store(files: Iterable[tuple[str, bytes]]) -> Iterator[Stored]:
    """Yield the files that sharding stores."""
    for name, content in files:
        try:
            stored = prepare(content).content
        except ValueError:
            continue
        yield Stored(name, stored, stored is content, pixels_of_pil(content))


def decode(contents: list[bytes]) -> list[np.ndarray | str]:
    """Decode a batch as training does; where that fails, return the message of each failing image."""
    dali: Any = importlib.import_module("nvidia.dali")
    fn, types = dali.fn, dali.types

    @dali.pipeline_def(batch_size=len(contents), num_threads=1, device_id=None, prefetch_queue_depth=1)
    def pipeline() -> Any:
        return fn.decoders.image(fn.external_source(name="file", dtype=types.UINT8, ndim=1), output_type=types.RGB)

    running = pipeline()
    running.feed_input("file", [np.frombuffer(content, np.uint8) for content in contents])
    try:
        (images,) = running.run()
    except RuntimeError as error:
        if len(contents) == 1:
            return [str(error)]
        return [result for content in contents for result in decode([content])]
    return [np.array(images.at(position)) for position in range(len(contents))]


def differences(images: list[Stored]) -> list[str]:
    """Return a line per image that DALI does not decode, or decodes to other pixels than PIL."""
    lines = []
    for start in range(0, len(images), BATCH):
        batch = images[start : start + BATCH]
        for image, decoded in zip(batch, decode([image.content for image in batch]), strict=True):
            how = "kept" if image.is_kept else "re-encoded"
            if isinstance(decoded, str):
                lines.append(f"{image.name} ({how}): {decoded[-200:]}")
            elif decoded.shape != image.pixels.shape:
                lines.append(f"{image.name} ({how}): {decoded.shape} instead of {image.pixels.shape}")
            elif np.abs(decoded.astype(int) - image.pixels).max() > 1:
                lines.append(f"{image.name} ({how}): other pixels")
    return lines


@pytest.mark.parametrize("kind", ["jpeg", "png"])
@pytest.mark.parametrize(
    "mutations",
    [150, pytest.param(10_000, marks=[pytest.mark.long, pytest.mark.timeout(900)])],
)
def test_dali_decodes_each_stored_mutation_to_pils_pixels(kind: str, mutations: int) -> None:
    originals = list((jpegs() if kind == "jpeg" else pngs()).items())
    mutate = mutate_jpeg if kind == "jpeg" else mutate_png
    generator = np.random.default_rng(mutations)

    def mutated() -> Iterator[tuple[str, bytes]]:
        for number in range(mutations):
            name, content = originals[number % len(originals)]
            yield f"{name} {number}", mutate(content, generator)

    with warnings.catch_warnings(action="ignore"):
        images = list(store(mutated()))
    assert mutations > len(images) > mutations / 5  # PIL decodes some and refuses others
    num_kept = sum(image.is_kept for image in images)
    assert mutations / 10 < num_kept < len(images)
    assert differences(images) == []


def test_plain_files_are_kept() -> None:
    for name, content in (jpegs() | pngs()).items():
        assert prepare(content).content is content, name


@pytest.mark.long
@pytest.mark.timeout(900)
def test_the_images_of_other_libraries_tests_are_stored_as_pil_shows_them(tmp_path: Path) -> None:
    download = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(tmp_path)]
    for options in (["--no-binary", "pillow", f"pillow=={Image.__version__}"], ["scikit-image"]):
        if subprocess.run([*download, *options], check=False, capture_output=True).returncode:
            pytest.skip("no package index")
    with warnings.catch_warnings(action="ignore"):
        images = list(store(packaged_images(tmp_path)))
    assert len(images) > 300
    assert differences(images) == []


def packaged_images(folder: Path) -> Iterator[tuple[str, bytes]]:
    """Yield the images in tars and wheels, without 16-bit grayscale, of which PIL shows a clipped copy."""
    for path in sorted(folder.iterdir()):
        files = read_wheel(path) if path.suffix == ".whl" else read_tar(path)
        for name, content in files:
            if is_image(name.rpartition("/")[2]) and not is_deep_gray(content):
                yield name, content


def read_tar(path: Path) -> Iterator[tuple[str, bytes]]:
    with tarfile.open(path) as archive:
        for member in archive:
            file = archive.extractfile(member)
            if file is not None:
                yield member.name, file.read()


def read_wheel(path: Path) -> Iterator[tuple[str, bytes]]:
    with zipfile.ZipFile(path) as archive:
        for name in archive.namelist():
            yield name, archive.read(name)


def is_deep_gray(content: bytes) -> bool:
    try:
        return Image.open(io.BytesIO(content)).mode in SIXTEEN_BITS
    except Exception:  # prepare refuses it with its reason
        return False
