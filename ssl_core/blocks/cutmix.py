"""CutMix between the images of a batch (Yun et al., 2019), as Cao & Wu's code uses it."""

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor


class Mixed(NamedTuple):
    """Mixed images: image i keeps `share` of its pixels and has the rest from image partner[i]."""

    images: Tensor  # (batch, 3, height, width)
    partner: Tensor  # (batch,) int64
    share: float


def cutmix(images: Tensor, *, alpha: float | None, generator: np.random.Generator) -> Mixed:
    """Replace the same box in every image by that of its neighbour; with `alpha` None return the images unchanged.

    The share is max(l, 1 - l) with l ~ Beta(alpha, alpha), corrected for a box that is cut at the image's border.
    Neighbours 2i and 2i + 1 are partners, and the last image of an odd batch is not mixed. The official code permutes
    at random; batches are in random order already, and with neighbours N processes mix like one.
    """
    partner = torch.arange(len(images), device=images.device)
    if alpha is None:
        return Mixed(images, partner, 1.0)
    partner = (partner ^ 1).clamp(max=len(images) - 1)
    share = generator.beta(alpha, alpha)
    side = math.sqrt(1 - max(share, 1 - share))
    rows, columns = (_span(length, side, generator.random()) for length in images.shape[2:])
    mixed = images.clone()
    mixed[:, :, rows, columns] = images[partner][:, :, rows, columns]
    area = (rows.stop - rows.start) * (columns.stop - columns.start)
    return Mixed(mixed, partner, 1 - area / (images.shape[2] * images.shape[3]))


def cutmix_pairs(
    images: Tensor, others: Tensor, *, alpha: float, generator: np.random.Generator
) -> tuple[Tensor, float]:
    """Replace the same box in every image by that of the other image in the same place of `others`.

    Returns the mixed images (batch, 3, height, width) and the share of their pixels that is left of `images`. The share
    is l ~ Beta(alpha, alpha), corrected for a box that is cut at the image's border.
    """
    side = math.sqrt(1 - generator.beta(alpha, alpha))
    rows, columns = (_span(length, side, generator.random()) for length in images.shape[2:])
    mixed = images.clone()
    mixed[:, :, rows, columns] = others[:, :, rows, columns]
    area = (rows.stop - rows.start) * (columns.stop - columns.start)
    return mixed, 1 - area / (images.shape[2] * images.shape[3])


def _span(length: int, share: float, place: float) -> slice:
    """Return a span of about `share` of `length` pixels around `place` in [0, 1), cut at the border."""
    half, centre = int(length * share) // 2, int(place * length)
    return slice(max(0, centre - half), min(length, centre + half))
