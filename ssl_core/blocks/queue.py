"""A ring buffer of embeddings."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def check_queue_size(size: int, num_images: int, *, role: str = "negatives") -> None:
    """Raise `ValueError` for a queue longer than the data set: most images would be their own negatives (`role`).

    In a shorter queue size² / (2 num_images²) of the images still are: 2 % at a fifth of the data set
    (docs/sources.md#queue-size).
    """
    if size > num_images:
        raise ValueError(
            f"method.queue_size {size} is larger than the data set ({num_images} images), so that images would be "
            f"their own {role}: choose about {max(1, num_images // 5)}"
        )


class Queue(nn.Module):
    """The last `size` embeddings as unit rows of a buffer, initialised with random rows."""

    rows: Tensor
    position: Tensor

    def __init__(self, size: int, dim: int) -> None:
        super().__init__()
        self.register_buffer("rows", F.normalize(torch.randn(size, dim), dim=1))
        self.register_buffer("position", torch.zeros((), dtype=torch.long))

    @torch.no_grad()
    def enqueue(self, keys: Tensor) -> None:
        """Overwrite the oldest rows with `keys` (batch, dim) in order; of more keys than rows only the last are kept.

        The position is a tensor, so that the device is not synchronised.
        """
        size = len(self.rows)
        kept = keys[-size:]
        first = self.position + (len(keys) - len(kept))
        slots = (first + torch.arange(len(kept), device=keys.device)) % size
        self.rows.index_copy_(0, slots, kept.to(self.rows.dtype))
        self.position.copy_((self.position + len(keys)) % size)
