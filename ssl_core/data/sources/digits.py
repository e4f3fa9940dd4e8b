"""The coloured digits: a demonstration without a download, made of scikit-learn's 1,797 real handwritten digits.

Colour and position carry no information about the digit, so pre-training can beat the raw pixels.
"""

import colorsys
import math
from typing import Any

import numpy as np
from PIL import Image

from ssl_core.data.card import SklearnDigits
from ssl_core.data.records import OpenSource, SourceSplit
from ssl_core.data.sources.library import library_split

MARGIN = 3  # dark pixels around the 8x8 original, so that a shifted digit is not cut off


def open_digits(source: SklearnDigits) -> OpenSource:
    """Draw the digits and divide them among the splits, in the order of one seeded permutation."""
    digits = Digits(source)
    splits, start = {}, 0
    for name, split in source.splits.items():
        numbers = digits.order[start : start + split.images].tolist()
        if len(numbers) < split.images:
            total = sum(each.images for each in source.splits.values())
            raise ValueError(f"sklearn_digits has {len(digits.order)} images, but its splits take {total}: take fewer")
        splits[name] = _split(digits, numbers)
        start += split.images
    return OpenSource(tuple("0123456789"), splits)


class Digits:
    """The coloured digits. Each has a random generator of its own: a small motion, a bright colour on a dark one."""

    def __init__(self, source: SklearnDigits) -> None:
        from sklearn.datasets import load_digits

        bundle: Any = load_digits()
        self._source = source
        self._pictures = np.pad(bundle.images, ((0, 0), (MARGIN, MARGIN), (MARGIN, MARGIN))).astype(np.float32) / 16
        self.labels = bundle.target
        self.order = np.random.default_rng(source.seed).permutation(len(self.labels))

    def draw(self, number: int) -> tuple[Image.Image, int]:
        """Return a digit as a square RGB image of the source's size, and its class."""
        rng = np.random.default_rng([self._source.seed, number])
        ink = self._moved(Image.fromarray(self._pictures[number]), rng)[..., None]
        bright = np.array(colorsys.hsv_to_rgb(rng.random(), rng.random(), rng.uniform(0.6, 1)))
        dark = np.array(colorsys.hsv_to_rgb(rng.random(), rng.random(), rng.uniform(0, 0.45)))
        picture = Image.fromarray(np.round(255 * (dark + ink * (bright - dark))).astype(np.uint8))
        return picture, int(self.labels[number])

    def _moved(self, picture: Image.Image, rng: np.random.Generator) -> np.ndarray:
        """Rotate, zoom and shift a picture at random; return its ink as (size, size) in 0..1."""
        source = self._source
        angle = math.radians(rng.uniform(-source.rotation, source.rotation))
        step = (picture.width - 2 * MARGIN) / source.size / rng.uniform(1 - source.zoom, 1 + source.zoom)
        shift_x, shift_y = rng.uniform(-source.shift, source.shift, size=2)
        cos, sin = step * math.cos(angle), step * math.sin(angle)
        middle, centre_x, centre_y = picture.width / 2, source.size / 2 + shift_x, source.size / 2 + shift_y
        # PIL maps pixels of the result to pixels of the picture: (x, y) -> (a x + b y + c, d x + e y + f)
        across = (cos, sin, middle - cos * centre_x - sin * centre_y)
        down = (-sin, cos, middle + sin * centre_x - cos * centre_y)
        size = (source.size, source.size)
        moved = picture.transform(size, Image.Transform.AFFINE, (*across, *down), Image.Resampling.BILINEAR)
        return np.clip(np.asarray(moved), 0, 1)


def _split(digits: Digits, numbers: list[int]) -> SourceSplit:
    split = library_split("digits", len(numbers), lambda index: digits.draw(numbers[index]))
    return split._replace(labels=digits.labels[numbers])
