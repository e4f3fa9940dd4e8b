"""Find the PNG files whose structure is plain, which all decoders read alike. Torch-free.

PIL accepts chunks that libpng, DALI's decoder, refuses, and shows the first picture of an animation. As for JPEG
(`plain_jpeg.py`), the structure is checked instead of decoding with both.
"""

import struct
import zlib
from collections.abc import Container

from ssl_core.data.exif import UPRIGHT, OddFile, read_orientation

SIGNATURE = b"\x89PNG\r\n\x1a\n"
GRAY, RGB, PALETTE, GRAY_ALPHA, RGBA = 0, 2, 3, 4, 6  # colour types
CHANNELS = {GRAY: 1, RGB: 3, PALETTE: 1, GRAY_ALPHA: 2, RGBA: 4}
DEPTHS = {GRAY: (1, 2, 4, 8, 16), RGB: (8, 16), PALETTE: (1, 2, 4, 8), GRAY_ALPHA: (8, 16), RGBA: (8, 16)}
ADAM7 = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))
CRITICAL = (b"IHDR", b"PLTE", b"IDAT", b"IEND")
ANIMATION = (b"acTL", b"fcTL", b"fdAT")
BEFORE_PIXELS = (b"PLTE", b"tRNS", b"bKGD", b"hIST", b"sBIT", b"gAMA", b"cHRM", b"sRGB", b"iCCP", b"eXIf", b"pHYs")
BEFORE_PALETTE = (b"sBIT", b"gAMA", b"cHRM", b"sRGB", b"iCCP")
AFTER_PALETTE = (b"tRNS", b"bKGD", b"hIST")
BLOCK = 1 << 20  # bytes of pixels unpacked at once


def png_orientation(content: bytes) -> int:
    """Return the orientation (1 to 8, as in EXIF) of a plain PNG; raise `OddFile` for any other content."""
    try:
        chunks = _chunks(content)
        header = struct.unpack(">IIBBBBB", chunks[0][1])
        colour, entries = header[3], _check_chunks(chunks, header[3], header[2])
        if (colour == PALETTE) != (entries > 0) and colour not in (RGB, RGBA):
            raise OddFile("a palette is missing or not needed")
        _check_pixels(header, [body for name, body in chunks if name == b"IDAT"])
        exif = [body for name, body in chunks if name == b"eXIf"]
        return read_orientation(exif[0]) if exif else UPRIGHT
    except (struct.error, IndexError, zlib.error):
        raise OddFile("a chunk that ends early") from None


def _chunks(content: bytes) -> list[tuple[bytes, bytes]]:
    """Return the names and contents of the chunks up to the end, from IHDR to IEND; raise `OddFile` for a wrong CRC."""
    if content[:8] != SIGNATURE:
        raise OddFile("no signature")
    chunks: list[tuple[bytes, bytes]] = []
    position = len(SIGNATURE)
    while not chunks or chunks[-1][0] != b"IEND":
        size, name = struct.unpack_from(">I4s", content, position)
        body = content[position + 8 : position + 8 + size]
        (checksum,) = struct.unpack_from(">I", content, position + 8 + size)
        if zlib.crc32(body, zlib.crc32(name)) != checksum:
            raise OddFile("a wrong checksum")
        if (name == b"IHDR") != (not chunks):
            raise OddFile("a header that is not first")
        chunks.append((name, body))
        position += 12 + size
    return chunks


def _check_chunks(chunks: list[tuple[bytes, bytes]], colour: int, depth: int) -> int:
    """Check names, order and lengths of the chunks; return the number of colours in the palette."""
    names = [name for name, _ in chunks]
    first_pixels = names.index(b"IDAT") if b"IDAT" in names else 0
    num_pixels = names.count(b"IDAT")
    if names[first_pixels : first_pixels + num_pixels] != [b"IDAT"] * num_pixels or not num_pixels:
        raise OddFile("pixels in no place or several places")
    palette = names.index(b"PLTE") if b"PLTE" in names else None
    entries = len(chunks[palette][1]) / 3 if palette is not None else 0
    if palette is not None and (entries not in range(1, 257) or (colour == PALETTE and entries > 1 << depth)):
        raise OddFile("the length of the palette")
    for position, (name, body) in enumerate(chunks):
        is_critical = not name[0] & 0x20
        if not name.isalpha() or name in ANIMATION or (is_critical and name not in CRITICAL):
            raise OddFile("a rare chunk")
        if name in BEFORE_PIXELS and (position > first_pixels or names.count(name) > 1):
            raise OddFile("a chunk behind the pixels or twice")
        if palette is not None and name in BEFORE_PALETTE and position > palette:
            raise OddFile("a chunk behind the palette")
        if palette is not None and name in AFTER_PALETTE and position < palette:
            raise OddFile("a chunk before the palette")
        if len(body) not in _lengths(name, colour, int(entries), len(body)):
            raise OddFile("the length of a chunk")
    return int(entries)


def _lengths(name: bytes, colour: int, entries: int, length: int) -> Container[int]:
    """Return the valid lengths of a chunk; chunks without a fixed length have any."""
    fixed = {b"IEND": 0, b"gAMA": 4, b"cHRM": 32, b"sRGB": 1, b"pHYs": 9, b"tIME": 7, b"hIST": 2 * entries}
    by_colour = {
        b"bKGD": {GRAY: 2, RGB: 6, PALETTE: 1, GRAY_ALPHA: 2, RGBA: 6},
        b"sBIT": {GRAY: 1, RGB: 3, PALETTE: 3, GRAY_ALPHA: 2, RGBA: 4},
    }
    if name == b"tRNS":
        return {GRAY: (2,), RGB: (6,), PALETTE: range(1, entries + 1)}.get(colour, ())
    if name in by_colour:
        return (by_colour[name].get(colour),)
    return (fixed.get(name, length),)


def _check_pixels(header: tuple[int, ...], parts: list[bytes]) -> None:
    """Raise `OddFile` unless the unpacked pixels have exactly the length that the header announces."""
    width, height, depth, colour, compression, filtering, interlacing = header
    if depth not in DEPTHS.get(colour, ()) or compression or filtering or interlacing > 1 or not width or not height:
        raise OddFile("the header")
    bits = depth * CHANNELS[colour]
    remaining = _packed_rows(width, height, bits)
    if interlacing:
        remaining = 0
        for left, top, across, down in ADAM7:
            remaining += _packed_rows(-(-(width - left) // across), -(-(height - top) // down), bits)
    unpacker = zlib.decompressobj()
    packed = b"".join(parts)
    while remaining >= 0 and not unpacker.eof:
        unpacked = unpacker.decompress(packed, BLOCK)
        packed = unpacker.unconsumed_tail
        remaining -= len(unpacked)
        if not unpacked and not unpacker.eof:
            raise OddFile("too few pixels")
    if remaining or not unpacker.eof or unpacker.unused_data:
        raise OddFile("too few or too many pixels")


def _packed_rows(width: int, height: int, bits: int) -> int:
    """Return the bytes of rows with their filters; a pass of Adam7 without pixels has none."""
    return height * (1 + -(-width * bits // 8)) if width > 0 and height > 0 else 0
