"""CutMix between the images of a batch (Yun et al., 2019), as Cao & Wu's code uses it."""

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor


class Mixed(NamedTuple):
    """Images with a box from their partner: image i shows share `share` of itself, the rest of image partner[i]."""

    images: Tensor  # (batch, 3, height, width)
    partner: Tensor  # (batch,) int64
    share: float


def cutmix(images: Tensor, *, alpha: float | None, generator: np.random.Generator) -> Mixed:
    """Give every image the same box of its neighbour's; `alpha` None leaves them as they are.

    Share max(l, 1 - l) with l ~ Beta(alpha, alpha), then exactly what the box leaves inside the image. Neighbours swap,
    the last of an odd batch stays whole: batches are in random order, and parts of a batch on several processes mix as
    the whole would on one (the official code permutes at random).
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


def _span(length: int, share: float, place: float) -> slice:
    """Cut a span of about `share` of `length` pixels around `place` in [0, 1), less what lies outside."""
    half, centre = int(length * share) // 2, int(place * length)
    return slice(max(0, centre - half), min(length, centre + half))
