"""The orientation in EXIF data, for `plain_jpeg.py` and `plain_png.py`. Torch-free."""

import struct

ORIENTATION = 0x0112
UNKNOWN, UPRIGHT = 0, 1
SHORT = 3
SIZES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8}  # bytes of a value, by its type


class OddFile(Exception):
    """The structure of an image file is not plain."""


def read_orientation(exif: bytes) -> int:
    """Return the orientation (1 to 8) of plain EXIF data; raise `OddFile` or `struct.error` for any other content."""
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(exif[:4])
    if order is None:
        raise OddFile("EXIF data without its start")
    (start,) = struct.unpack_from(f"{order}I", exif, 4)
    (count,) = struct.unpack_from(f"{order}H", exif, start)
    orientations, all_plain = [], True
    for entry in range(start + 2, start + 2 + 12 * count, 12):
        tag, kind, values, offset = struct.unpack_from(f"{order}HHII", exif, entry)
        size = SIZES.get(kind, 0) * values
        all_plain = all_plain and size > 0 and (size <= 4 or offset + size <= len(exif))
        if tag == ORIENTATION:
            if (kind, values) != (SHORT, 1):
                raise OddFile("the type of EXIF's orientation")
            orientations += struct.unpack_from(f"{order}H", exif, entry + 8)
    if orientations in ([], [UNKNOWN], [UPRIGHT]):
        return UPRIGHT
    if len(orientations) > 1 or orientations[0] not in range(1, 9):
        raise OddFile("EXIF's orientation")
    if not all_plain:  # other decoders may stop at an invalid entry
        raise OddFile("an entry of EXIF")
    return orientations[0]
