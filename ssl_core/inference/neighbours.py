"""The nearest images by cosine similarity, among any number of images."""

from collections.abc import Iterable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ssl_core.inference.embedding import Batch


class Neighbour(NamedTuple):
    """An image by its name, with its similarity."""

    similarity: float
    name: str


def nearest(query: Tensor, batches: Iterable[Batch], k: int) -> list[Neighbour]:
    """Return the `k` images with the largest cosine similarity to the features `query`, the nearest first.

    Only the best so far stay in memory. Of equal images the earlier comes first.
    """
    direction = F.normalize(query, dim=0)
    best: list[Neighbour] = []
    for batch in batches:
        similarities = F.normalize(batch.features, dim=1) @ direction
        order = torch.argsort(similarities, descending=True, stable=True)[:k].tolist()
        best += [Neighbour(similarities[row].item(), batch.names[row]) for row in order]
        best = sorted(best, key=lambda neighbour: -neighbour.similarity)[:k]
    return best
