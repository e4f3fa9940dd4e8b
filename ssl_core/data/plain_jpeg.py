"""Find the JPEG files whose structure is plain, which all decoders read alike. Torch-free.

PIL accepts faults that DALI's decoders refuse (bytes between two segments) and shows colours otherwise than they do
(CMYK without Adobe's marker). Decoding with both would double the time of sharding, so the segments are checked
instead: of thousands of damaged files, those with plain segments have the same pixels in both
(`tests/data/test_mutations.py`). Damage between the segments, in the coded pixels, looks the same in both.
"""

import re
import struct
from copy import copy
from functools import lru_cache

from ssl_core.data.exif import UPRIGHT, OddFile, read_orientation

START = b"\xff\xd8"
SOS, EOI, DHT, DQT, DRI, COM = 0xDA, 0xD9, 0xC4, 0xDB, 0xDD, 0xFE
APP0, APP1, APP14, APP15 = 0xE0, 0xE1, 0xEE, 0xEF
BASELINE, EXTENDED, PROGRESSIVE = 0xC0, 0xC1, 0xC2
FIRST_RESTART = 0xD0
MARKER_IN_PIXELS = re.compile(rb"\xff[^\x00]", re.DOTALL)
EXIF, JFIF, ADOBE = b"Exif\0\0", b"JFIF\0", b"Adobe"
YCC, YCCK = 1, 2  # Adobe's colour transforms; 0: none
LUMINANCE_SAMPLING = (0x11, 0x12, 0x21, 0x22, 0x41, 0x14, 0x42, 0x24)  # horizontal * 16 + vertical


def jpeg_orientation(content: bytes) -> int:
    """Return the orientation (1 to 8, as in EXIF) of a plain JPEG; raise `OddFile` for any other content."""
    try:
        header = content[: _header_size(content)]
        walk = copy(_walk_header(header))
        walk.read_scans(content, len(header))
        return walk.orientation
    except (struct.error, IndexError):
        raise OddFile("a segment that ends early") from None


def _header_size(content: bytes) -> int:
    """Return the position of the first pixels; the segments before them are not checked."""
    position, marker = 2, 0
    while marker != SOS:
        marker, size = struct.unpack_from(">xBH", content, position)
        position += 2 + size
    return position


@lru_cache(maxsize=64)  # small images of one size often have the same header
def _walk_header(header: bytes) -> "_Walk":
    """Return the walk over all segments before the first pixels. Its state is shared: copy it."""
    if header[:2] != START:
        raise OddFile("no start")
    walk, position = _Walk(), 2
    while position < len(header):
        position = walk.read_segment(header, position)
    return walk


class _Walk:
    """The state of a walk over the segments. Its sets are replaced and never changed, so that a copy has its own."""

    def __init__(self) -> None:
        self.orientation = UPRIGHT
        self.has_exif = self.has_jfif = False
        self.adobe_transform: int | None = None
        self.restart_interval = 0
        self.quantizers: frozenset[int] = frozenset()
        self.huffman: frozenset[int] = frozenset()  # class * 16 + identifier
        self.frame = 0  # marker of the frame
        self.components: dict[int, int] = {}  # identifier -> quantizer
        self.with_pixels: frozenset[int] = frozenset()

    def read_scans(self, content: bytes, position: int) -> None:
        """Read everything from the first pixels to the end."""
        position = self._find_end(content, position)
        while content[position : position + 2] != bytes((0xFF, EOI)):
            marker = content[position + 1]
            position = self.read_segment(content, position)
            if marker == SOS:
                position = self._find_end(content, position)
        if not self.components or self.with_pixels != set(self.components):
            raise OddFile("a component without pixels")

    def read_segment(self, content: bytes, position: int) -> int:
        """Read the segment at a position and return its end."""
        lead, marker, size = struct.unpack_from(">BBH", content, position)
        body = content[position + 4 : position + 2 + size]
        if lead != 0xFF or len(body) != size - 2:
            raise OddFile("bytes between two segments, or a wrong length")
        self._read_segment(marker, body)
        return position + 2 + size

    def _read_segment(self, marker: int, body: bytes) -> None:
        if marker == DQT:
            self.quantizers |= _quantizers(body)
        elif marker == DHT:
            self.huffman |= _huffman_tables(body)
        elif marker in (BASELINE, EXTENDED, PROGRESSIVE):
            self._read_frame(marker, body)
        elif marker == SOS:
            self._read_scan(body)
        elif marker == DRI:
            (self.restart_interval,) = struct.unpack(">H", body)
        elif APP0 <= marker <= APP15:
            self._read_application(marker, body)
        elif marker != COM:
            raise OddFile("a rare segment")

    def _read_application(self, marker: int, body: bytes) -> None:
        if marker == APP0 and body.startswith(JFIF):
            self.has_jfif = True
        elif marker == APP1 and body.startswith(EXIF):
            if self.has_exif or self.frame:
                raise OddFile("EXIF data twice or behind the frame")
            self.has_exif = True
            self.orientation = read_orientation(body[len(EXIF) :])
        elif marker == APP14 and body.startswith(ADOBE):
            if self.adobe_transform is not None or self.frame or len(body) != 12:
                raise OddFile("Adobe's segment twice or behind the frame")
            self.adobe_transform = body[11]

    def _read_frame(self, marker: int, body: bytes) -> None:
        precision, height, width, count = struct.unpack_from(">BHHB", body)
        if self.frame or precision != 8 or not height or not width or len(body) != 6 + 3 * count:
            raise OddFile("a frame")
        self.frame = marker
        identifiers, samplings, quantizers = body[6::3], body[7::3], body[8::3]
        self.components = dict(zip(identifiers, quantizers, strict=True))
        if len(self.components) != count:
            raise OddFile("a component twice")
        if samplings[0] not in LUMINANCE_SAMPLING or any(sampling != 0x11 for sampling in samplings[1:3]):
            raise OddFile("a rare sampling of the colours")
        if samplings[3:] not in (b"", samplings[:1]):
            raise OddFile("a rare sampling of black")
        if not self._has_plain_colours():
            raise OddFile("rare colours")

    def _has_plain_colours(self) -> bool:
        count = len(self.components)
        if count == 3:
            names_decide = not self.has_jfif and self.adobe_transform is None  # the components' names, such as R, G, B
            return self.adobe_transform in (None, YCC) and (not names_decide or list(self.components) == [1, 2, 3])
        if count == 4:
            return self.adobe_transform in (0, YCCK)  # without Adobe's marker decoders disagree on inversion
        return count == 1

    def _read_scan(self, body: bytes) -> None:
        count = body[0]
        if not self.frame or not 1 <= count <= len(self.components) or len(body) != 4 + 2 * count:
            raise OddFile("a scan")
        for identifier, tables in zip(body[1 : 1 + 2 * count : 2], body[2 : 2 + 2 * count : 2], strict=True):
            if self.components.get(identifier) not in self.quantizers:
                raise OddFile("a scan of no component or without quantizer")
            if self.frame != PROGRESSIVE:
                dc, ac = tables >> 4, 16 + (tables & 15)
                if identifier in self.with_pixels or not {dc, ac} <= self.huffman:
                    raise OddFile("a scan twice or without Huffman tables")
            self.with_pixels |= {identifier}
        if self.frame != PROGRESSIVE and body[-3:] != b"\0\x3f\0":
            raise OddFile("a scan's band")

    def _find_end(self, content: bytes, start: int) -> int:
        """Return the position of the first marker behind the pixels; restart markers must count from 0 to 7."""
        for restarts, match in enumerate(MARKER_IN_PIXELS.finditer(content, start)):
            if not self.restart_interval or match[0][1] != FIRST_RESTART + restarts % 8:
                return match.start()
        raise OddFile("no end")


@lru_cache(maxsize=256)  # most files have the tables of the standard or of one camera
def _quantizers(body: bytes) -> frozenset[int]:
    """Return the identifiers of the quantizers in a segment."""
    numbers, position = set(), 0
    while position < len(body):
        bits, number = divmod(body[position], 16)
        if bits > 1 or number > 3:
            raise OddFile("a quantizer")
        numbers.add(number)
        position += 1 + 64 * (bits + 1)
    if position != len(body):
        raise OddFile("the length of a quantizer")
    return frozenset(numbers)


@lru_cache(maxsize=256)
def _huffman_tables(body: bytes) -> frozenset[int]:
    """Return class * 16 + identifier of the Huffman tables in a segment."""
    numbers, position = set(), 0
    while position < len(body):
        kind, number = divmod(body[position], 16)
        counts = body[position + 1 : position + 17]
        symbols = body[position + 17 : position + 17 + sum(counts)]
        codes = sum(count << (15 - length) for length, count in enumerate(counts))
        if kind > 1 or number > 3 or codes > 1 << 16:
            raise OddFile("a Huffman table")
        if len(set(symbols)) != len(symbols) or (kind == 0 and max(symbols, default=0) > 15):
            raise OddFile("the symbols of a Huffman table")
        numbers.add(16 * kind + number)
        position += 17 + sum(counts)
    if position != len(body):
        raise OddFile("the length of a Huffman table")
    return frozenset(numbers)
