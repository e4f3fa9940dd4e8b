"""NNCLR: contrast with nearest neighbours (Dwibedi et al., 2021), https://arxiv.org/abs/2104.14548.

The embedding of one view is replaced by its nearest neighbour in a queue of earlier embeddings, which must match the
prediction from the other view among those of the batch. Positives are other images, not augmented copies alone.
"""

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import PositiveFloat, PositiveInt
from torch import Tensor

from ssl_core.blocks import distributed
from ssl_core.blocks.losses import batch_contrast
from ssl_core.blocks.queue import Queue, check_queue_size
from ssl_core.blocks.two_views import BYOL_VIEWS, SMALL_VIEWS, TwoViews, two_views
from ssl_core.data.batch import Batch
from ssl_core.data.views import Views
from ssl_core.methods.base import Losses, Memory, Method, MethodConfig, Preset, Progress, full_precision
from ssl_core.networks.backbones import Network
from ssl_core.networks.heads import mlp


class Config(TwoViews, MethodConfig):
    """Defaults: the paper's head with solo-learn's temperature for CIFAR (docs/sources.md#nnclr)."""

    name: Literal["nnclr"] = "nnclr"
    preset: Literal["small", "imagenet"] = "small"
    temperature: PositiveFloat = 0.2
    queue_size: PositiveInt = 4096
    projector_layers: PositiveInt = 3
    projector_hidden: PositiveInt = 2048
    predictor_hidden: PositiveInt = 4096
    embedding_dim: PositiveInt = 256


_LARS = {
    "optimizer": "lars", "learning_rate": 0.3, "weight_decay": 1e-6, "warmup_epochs": 10,
    "decay_exclusion": "norm_bias",
}  # fmt: skip

PRESETS = {
    "small": Preset(
        method=SMALL_VIEWS, training={**_LARS, "batch_size": 256, "epochs": 200},
        source="chosen here: solo-learn's temperature and views, lightly's queue, NNCLR's optimisation "
        "(docs/sources.md#nnclr)",
        networks="convolutional",
    ),
    "imagenet": Preset(
        method={"temperature": 0.1, "queue_size": 98304, **BYOL_VIEWS},
        training={**_LARS, "batch_size": 4096, "epochs": 1000},
        source="NNCLR, paper (docs/sources.md#nnclr)", networks="convolutional",
    ),
}  # fmt: skip


class NNCLR(Method):
    """A backbone with projector and predictor, and a queue of the projector's past embeddings."""

    Config = Config
    fixed_views = ("first", "second")

    def __init__(self, config: Config, backbone: Network, *, num_images: int, batch_size: int, seed: int) -> None:
        super().__init__(config, backbone, num_images=num_images, batch_size=batch_size, seed=seed)
        check_queue_size(config.queue_size, num_images, role="neighbours")
        self.config = config
        hidden, dim = [config.projector_hidden] * (config.projector_layers - 1), config.embedding_dim
        self.projector = mlp([backbone.num_features, *hidden, dim], final_batch_norm=True)
        self.predictor = mlp([dim, config.predictor_hidden, dim])
        self.queue = Queue(config.queue_size, dim)

    @staticmethod
    def views(config: Config, image_size: int) -> Views:
        """Return two views with two augmentation policies."""
        return two_views(config, image_size)

    def forward(self, batch: Batch, progress: Progress) -> Losses:
        """Return the contrast of each view's neighbour with the predictions from the other view, the mean."""
        projected = [self.projector(self.backbone(batch.views[group][0])) for group in ("first", "second")]
        predicted = [F.normalize(self.predictor(rows).float(), dim=1) for rows in projected]  # p: (batch, dim)
        first, second = (F.normalize(rows.detach().float(), dim=1) for rows in projected)  # z: (batch, dim)
        with full_precision(first):
            temperature = self.config.temperature
            everyone = [distributed.gather_with_gradient(rows) for rows in predicted]
            there = batch_contrast(nearest(first, self.queue.rows), everyone[1], temperature=temperature)
            back = batch_contrast(nearest(second, self.queue.rows), everyone[0], temperature=temperature)
            total = (there + back) / 2
            return Losses(total, {"contrast": total.detach()}, embedding=first, memory={"keys": first})

    @torch.no_grad()
    def after_step(self, progress: Progress, memories: Sequence[Memory]) -> None:
        """Put the first views' embeddings of this step into the queue."""
        for memory in memories:
            self.queue.enqueue(distributed.gather(memory["keys"]))


def nearest(rows: Tensor, queue: Tensor) -> Tensor:
    """Return for each of `rows` (batch, dim) the row of `queue` (size, dim) with the largest cosine; unit rows."""
    return queue[(rows @ queue.T).argmax(dim=1)]
