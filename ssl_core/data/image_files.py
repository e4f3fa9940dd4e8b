"""Prepare an image file for a shard: keep it, re-encode it, or refuse it with a reason. Torch-free.

A JPEG or PNG is kept if PIL decodes it and its structure is plain (`plain_jpeg.py`, `plain_png.py`), so that DALI reads
it too and shows the same pixels; another image that PIL decodes is re-encoded, as is an image above the card's
`max_side`. `datasets/README.md` lists the outcomes. The reasons are part of the manifest (`Rejected`), so another
wording gives another manifest.
"""

import io
import math
import posixpath
from collections.abc import Mapping
from typing import Literal, NamedTuple

import numpy as np
from PIL import Image, UnidentifiedImageError

from ssl_core.data.exif import ORIENTATION, UPRIGHT, OddFile
from ssl_core.data.plain_jpeg import jpeg_orientation
from ssl_core.data.plain_png import SIGNATURE, png_orientation
from ssl_core.mistakes import excerpt

# A file counts as an image by its name; its format is read from its content.
EXTENSIONS = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".gif", ".bmp", ".dib", ".ppm", ".pgm", ".pbm", ".pnm")
EXTENSIONS += (".tif", ".tiff", ".webp", ".jp2", ".avif")
# Pictures of other formats, which sharding counts instead of reading; first those of cameras.
UNREAD_EXTENSIONS = (".arw", ".cr2", ".cr3", ".dng", ".nef", ".orf", ".pef", ".raf", ".raw", ".rw2", ".srw", ".mpo")
UNREAD_EXTENSIONS += (".heic", ".heif", ".hif", ".jxl", ".jxr", ".wdp", ".j2c", ".j2k", ".jpc", ".jpf", ".jpx", ".bpg")
UNREAD_EXTENSIONS += (".apng", ".mng", ".jng", ".ico", ".icns", ".cur", ".svg", ".svgz", ".eps", ".emf", ".wmf")
UNREAD_EXTENSIONS += (".tga", ".psd", ".psb", ".xcf", ".exr", ".hdr", ".pfm", ".pam", ".dds", ".dcm", ".pcx", ".qoi")
UNREAD_EXTENSIONS += (".ras", ".sgi", ".xbm", ".xpm", ".flif", ".pict", ".jps")
FORMATS = ("JPEG", "PNG", "GIF", "BMP", "PPM", "TIFF", "WEBP", "JPEG2000", "AVIF")  # EPS would start another program
PNG_SIDE = 1_000_000  # pixels; libpng's limit
NARROW = 4  # a longer side of more than so many shorter sides
JPEG_QUALITY = 95  # of reduced JPEGs
TURNS = {  # by EXIF's orientation, as in PIL's exif_transpose
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
TAGS = {"exif", "Raw profile type exif", "xmp", "XML:com.adobe.xmp"}  # where PIL finds the orientation, with TIFF's own
LEVELS = np.arange(256) / 255  # pixels in 0..1
SQUARES = np.square(LEVELS)
SIXTEEN_BITS = ("I;16", "I;16B", "I;16L", "I;16N")


class Encoded(NamedTuple):
    """An image file for a shard."""

    extension: str
    content: bytes
    image: Image.Image  # its pixels
    is_reduced: bool = False  # smaller than in the source


def is_image(name: str) -> bool:
    """Return whether a file name has an image's extension; hidden files and macOS resource forks do not count."""
    return _extension(name) in EXTENSIONS and not _is_hidden(name)


def unread_extension(name: str) -> str | None:
    """Return the lower-case extension of a picture whose format is not read; None for any other file."""
    extension = _extension(name)
    return extension if extension in UNREAD_EXTENSIONS and not _is_hidden(name) else None


def list_counts(unread: Mapping[str, int]) -> str:
    """Return numbers of files by extension as text, for example `3 .heic, 1 .tga`."""
    return ", ".join(f"{count} {extension}" for extension, count in unread.items())


def _extension(name: str) -> str:
    return posixpath.splitext(name)[1].lower()


def _is_hidden(name: str) -> bool:
    parts = name.split("/")
    return any(part.startswith(".") for part in parts) or "__MACOSX" in parts[:-1]


def prepare(content: bytes | Image.Image, max_side: int | None = None) -> Encoded:
    """Return an image as it is stored, reduced to `max_side`; raise `ValueError` with the reason if it is unusable.

    PIL may warn of odd metadata; filtering these warnings is left to the caller.
    """
    try:
        return _prepare(content, max_side)
    except UnidentifiedImageError:
        raise ValueError(f"it is no image of a format that is read ({', '.join(FORMATS)})") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise ValueError(f"it has more than {Image.MAX_IMAGE_PIXELS} pixels: shrink it") from None
    except Exception as error:  # a broken file can raise anything: OSError, SyntaxError, struct.error, zlib.error, ...
        raise ValueError(f"it cannot be decoded: {excerpt(error) or type(error).__name__}") from None


def reduced_size(size: tuple[int, int], max_side: int | None) -> tuple[int, int] | None:
    """Return the size of an image whose longer side exceeds `max_side`, None for other images.

    The shorter side of a narrow image is reduced to a quarter of `max_side` at most, so that strips keep their content.
    """
    if max_side is None:
        return None
    scale = max_side / min(max(size), NARROW * min(size))
    return (round(size[0] * scale), round(size[1] * scale)) if scale < 1 else None


def has_plain_structure(content: bytes) -> bool:
    """Return whether a file is a JPEG or PNG that may be stored as it is; without decoding it."""
    return _plain_orientation(content) is not None


def encode(image: Image.Image, kind: Literal["JPEG", "PNG"] = "PNG", size: tuple[int, int] | None = None) -> Encoded:
    """Return the image upright as an 8-bit gray or RGB file, with the pixels of `size` (None: unchanged).

    Alpha is dropped, as DALI and PIL's `convert` do. EXIF data that PIL cannot read do not turn the image.
    """
    turn = TURNS.get(read_orientation(image))
    if image.mode in SIXTEEN_BITS:  # PIL's own conversion clips at 255: nearly all white
        image = Image.fromarray(np.round(np.asarray(image) / 257).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError(f"its pixels (mode {image.mode}) have no known range: convert it to 8 bits")
    stored = image.convert("L" if image.mode in ("1", "L", "LA") else "RGB")
    if size is not None:
        stored = stored.resize(size, Image.Resampling.LANCZOS)
    if turn is not None:
        stored = stored.transpose(turn)
    buffer = io.BytesIO()
    stored.save(buffer, kind, quality=JPEG_QUALITY)
    return Encoded("jpg" if kind == "JPEG" else "png", buffer.getvalue(), stored, is_reduced=size is not None)


def channel_moments(image: Image.Image) -> np.ndarray:
    """Return the means of the three channels and of their squares as (2, 3), pixels in 0..1."""
    rgb = image if image.mode == "RGB" else image.convert("RGB")  # convert would copy
    counts = np.array(rgb.histogram(), dtype=np.float64).reshape(3, 256)
    return np.array([counts @ LEVELS, counts @ SQUARES]) / (image.width * image.height)


def _prepare(content: bytes | Image.Image, max_side: int | None) -> Encoded:
    if isinstance(content, Image.Image):
        return encode(content, "PNG", reduced_size(content.size, max_side))
    if not content:
        raise ValueError("the file is empty")
    image = Image.open(io.BytesIO(content), formats=FORMATS)
    if image.width * image.height > (Image.MAX_IMAGE_PIXELS or math.inf):  # PIL itself refuses twice as many
        raise Image.DecompressionBombError
    if max(image.size) > PNG_SIDE:
        raise ValueError(f"it has a side of more than {PNG_SIDE} pixels")
    size = reduced_size(image.size, max_side)
    if size is not None:
        image.draft(image.mode, size)  # a JPEG is decoded at a half, a quarter or an eighth of its size
    image.load()  # all pixels
    is_jpeg = image.format in ("JPEG", "MPO")  # MPO: a JPEG followed by more pictures
    if size is None and is_jpeg and _is_plain(content, image):
        return Encoded("jpg", content, image)
    if size is None and image.format == "PNG" and _is_plain(content, image):
        return Encoded("png", content, image)
    if image.format == "PNG":  # PIL ignores a wrong checksum and a missing end: the file is damaged
        Image.open(io.BytesIO(content), formats=FORMATS).verify()
    return encode(image, "JPEG" if is_jpeg and size is not None else "PNG", size)


def _is_plain(content: bytes, image: Image.Image) -> bool:
    """Return whether DALI decodes a JPEG or PNG to PIL's pixels: its structure is plain, and both turn it alike."""
    if image.mode in SIXTEEN_BITS:
        return False
    orientation = _plain_orientation(content)
    return orientation is not None and orientation == read_orientation(image)


def _plain_orientation(content: bytes) -> int | None:
    """Return the orientation of a JPEG or PNG with a plain structure; None for any other file."""
    read = png_orientation if content.startswith(SIGNATURE) else jpeg_orientation
    try:
        return read(content)
    except OddFile:
        return None


def read_orientation(image: Image.Image) -> int:
    """Return the orientation (1 to 8) that PIL reads from EXIF or XMP; 0 if it cannot read them."""
    if TAGS.isdisjoint(image.info) and not hasattr(image, "tag_v2"):  # `getexif` takes a tenth of a small image's time
        return UPRIGHT
    try:
        orientation = image.getexif().get(ORIENTATION, UPRIGHT)
    except Exception:  # of damaged EXIF data: SyntaxError, struct.error, ...
        return 0
    return orientation if orientation in range(1, 9) else UPRIGHT
