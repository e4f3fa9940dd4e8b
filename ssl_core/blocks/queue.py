"""A ring buffer of embeddings."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def check_queue_size(size: int, num_images: int) -> None:
    """Raise `ValueError` for a queue in which most images would meet an old embedding of themselves (recipes rule 5).

    In a smaller one a share of size² / (2 num_images²) still does: 2 % at a fifth of the data set.
    """
    if size > num_images:
        raise ValueError(
            f"method.queue_size {size} is larger than the data set ({num_images} images): the queue would hold an "
            f"image's own old embeddings as if they were others; choose some {max(1, num_images // 5)}"
        )


class Queue(nn.Module):
    """The last `size` embeddings, unit rows, as a buffer; random rows stand in until it is full."""

    rows: Tensor
    position: Tensor

    def __init__(self, size: int, dim: int) -> None:
        super().__init__()
        self.register_buffer("rows", F.normalize(torch.randn(size, dim), dim=1))
        self.register_buffer("position", torch.zeros((), dtype=torch.long))

    @torch.no_grad()
    def enqueue(self, keys: Tensor) -> None:
        """Overwrite the oldest rows by `keys` (batch, dim), in order; of more keys than rows the last ones stay.

        Works on the device alone, without waiting for the pointer's value.
        """
        size = len(self.rows)
        kept = keys[-size:]
        first = self.position + (len(keys) - len(kept))
        slots = (first + torch.arange(len(kept), device=keys.device)) % size
        self.rows.index_copy_(0, slots, kept.to(self.rows.dtype))
        self.position.copy_((self.position + len(keys)) % size)
