"""Prepare an image file for a shard: keep it, re-encode it, or refuse it with a reason. Torch-free.

A JPEG or PNG is kept if PIL decodes it and its structure is plain (`plain_jpeg.py`, `plain_png.py`), so that DALI reads
it too and shows the same pixels; another image that PIL decodes is re-encoded. `datasets/README.md` lists the outcomes.
The reasons are part of the manifest (`Rejected`), so another wording gives another manifest.
"""

import io
import math
import posixpath
from collections.abc import Mapping

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
MAX_SIDE = 1_000_000  # pixels; libpng's limit
TURNS = {  # by EXIF's orientation, as in PIL's exif_transpose
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
SIXTEEN_BITS = ("I;16", "I;16B", "I;16L", "I;16N")


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


def prepare(content: bytes | Image.Image) -> tuple[str, bytes, Image.Image]:
    """Return the extension, the bytes to store and the decoded image; raise `ValueError` with the reason if unusable.

    PIL may warn of odd metadata; filtering these warnings is left to the caller.
    """
    try:
        return _prepare(content)
    except UnidentifiedImageError:
        raise ValueError(f"it is no image of a format that is read ({', '.join(FORMATS)})") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise ValueError(f"it has more than {Image.MAX_IMAGE_PIXELS} pixels: shrink it") from None
    except Exception as error:  # a broken file can raise anything: OSError, SyntaxError, struct.error, zlib.error, ...
        raise ValueError(f"it cannot be decoded: {excerpt(error) or type(error).__name__}") from None


def has_plain_structure(content: bytes) -> bool:
    """Return whether a file is a JPEG or PNG that may be stored as it is; without decoding it."""
    return _plain_orientation(content) is not None


def encode(image: Image.Image) -> tuple[bytes, Image.Image]:
    """Return the image upright as an 8-bit gray or RGB PNG, encoded and decoded.

    Alpha is dropped, as DALI and PIL's `convert` do. EXIF data that PIL cannot read do not turn the image.
    """
    turn = TURNS.get(read_orientation(image))
    upright = image if turn is None else image.transpose(turn)
    if upright.mode in SIXTEEN_BITS:  # PIL's own conversion clips at 255: nearly all white
        upright = Image.fromarray(np.round(np.asarray(upright) / 257).astype(np.uint8))
    if upright.mode in ("I", "F"):
        raise ValueError(f"its pixels (mode {upright.mode}) have no known range: convert it to 8 bits")
    buffer = io.BytesIO()
    stored = upright.convert("L" if upright.mode in ("1", "L", "LA") else "RGB")
    stored.save(buffer, "PNG")
    return buffer.getvalue(), stored


def channel_moments(image: Image.Image) -> np.ndarray:
    """Return the means of the three channels and of their squares as (2, 3), pixels in 0..1."""
    rgb = image if image.mode == "RGB" else image.convert("RGB")  # convert would copy
    counts = np.array(rgb.histogram(), dtype=np.float64).reshape(3, 256)
    levels = np.arange(256) / 255
    return np.stack([counts @ levels, counts @ np.square(levels)]) / (image.width * image.height)


def _prepare(content: bytes | Image.Image) -> tuple[str, bytes, Image.Image]:
    if isinstance(content, Image.Image):
        return "png", *encode(content)
    if not content:
        raise ValueError("the file is empty")
    image = Image.open(io.BytesIO(content), formats=FORMATS)
    if image.width * image.height > (Image.MAX_IMAGE_PIXELS or math.inf):  # PIL itself refuses twice as many
        raise Image.DecompressionBombError
    if max(image.size) > MAX_SIDE:
        raise ValueError(f"it has a side of more than {MAX_SIDE} pixels")
    image.load()  # all pixels
    if image.format in ("JPEG", "MPO") and _is_plain(content, image):  # MPO: a JPEG followed by more pictures
        return "jpg", content, image
    if image.format == "PNG" and _is_plain(content, image):
        return "png", content, image
    if image.format == "PNG":  # PIL ignores a wrong checksum and a missing end: the file is damaged
        Image.open(io.BytesIO(content), formats=FORMATS).verify()
    return "png", *encode(image)


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
    try:
        orientation = image.getexif().get(ORIENTATION, UPRIGHT)
    except Exception:  # of damaged EXIF data: SyntaxError, struct.error, ...
        return 0
    return orientation if orientation in range(1, 9) else UPRIGHT
