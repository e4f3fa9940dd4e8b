"""MoCo's loss; ReSSL warms up with it."""

import torch
import torch.nn.functional as F
from torch import Tensor


def info_nce(query: Tensor, key: Tensor, queue: Tensor, *, temperature: float) -> Tensor:
    """Cross-entropy that picks each query's own key among the queue's (He et al., 2020, eq. 1).

    `query` and `key` are (batch, dim), `queue` (size, dim), all with unit rows; the positive stands in column 0.
    """
    positive = (query * key).sum(dim=1, keepdim=True)
    logits = torch.cat([positive, query @ queue.T], dim=1) / temperature  # (batch, 1 + size)
    target = torch.zeros(len(query), dtype=torch.long, device=query.device)
    return F.cross_entropy(logits, target)
