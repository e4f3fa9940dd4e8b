"""Losses that several methods share."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ssl_core.blocks import distributed


def info_nce(query: Tensor, key: Tensor, queue: Tensor, *, temperature: float) -> Tensor:
    """Return the cross-entropy of finding each query's key among the keys of the queue (He et al., 2020, eq. 1).

    `query` and `key` are (batch, dim), `queue` (size, dim), all with unit rows; column 0 of the logits is the positive.
    """
    positive = (query * key).sum(dim=1, keepdim=True)
    logits = torch.cat([positive, query @ queue.T], dim=1) / temperature  # (batch, 1 + size)
    target = torch.zeros(len(query), dtype=torch.long, device=query.device)
    return F.cross_entropy(logits, target)


def batch_contrast(anchors: Tensor, candidates: Tensor, *, temperature: float) -> Tensor:
    """Return the cross-entropy of finding each anchor's partner among the candidates of all processes, batch mean.

    `anchors` are (batch, dim), `candidates` (processes * batch, dim) in rank order, all with unit rows.
    """
    start = distributed.rank() * len(anchors)
    partner = start + torch.arange(len(anchors), device=anchors.device)
    return F.cross_entropy(anchors @ candidates.T / temperature, partner)
