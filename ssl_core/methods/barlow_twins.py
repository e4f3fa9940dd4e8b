"""Barlow Twins: redundancy reduction (Zbontar et al., 2021), https://arxiv.org/abs/2103.03230.

The cross-correlation matrix of the embeddings of two views, over the batch, is moved towards the identity: equal
dimensions of both views agree, different ones are uncorrelated. There are no negatives, no memory and no teacher.
"""

from typing import Literal

import torch.nn.functional as F
from pydantic import PositiveFloat, PositiveInt
from torch import Tensor

from ssl_core.blocks import distributed
from ssl_core.blocks.two_views import BYOL_VIEWS, TwoViews, two_views
from ssl_core.data.batch import Batch
from ssl_core.data.views import Views
from ssl_core.methods.base import Losses, Method, MethodConfig, Preset, Progress, full_precision
from ssl_core.networks.backbones import Network
from ssl_core.networks.batchnorm import zero_residuals
from ssl_core.networks.heads import mlp


class Config(TwoViews, MethodConfig):
    """Defaults: lightly's CIFAR-10 benchmark (docs/sources.md#barlow-twins)."""

    name: Literal["barlow_twins"] = "barlow_twins"
    preset: Literal["small", "imagenet"] = "small"
    redundancy_weight: PositiveFloat = 0.005  # lambda of eq. 1
    # Factor of the whole loss. Under LARS it sets the rate of biases and BatchNorm, which have no trust ratio.
    loss_scale: PositiveFloat = 1.0
    projector_layers: PositiveInt = 2
    embedding_dim: PositiveInt = 2048  # also the width of the projector's hidden layers
    zero_initial_residual: bool = False  # residual blocks of ResNets are initialised as identities, as in the code
    area: tuple[float, float] = (0.08, 1.0)


PRESETS = {
    "small": Preset(  # kNN 83.5 % after 200 epochs of ResNet-18, according to the benchmark
        method={},
        training={
            "optimizer": "sgd", "learning_rate": 0.12, "weight_decay": 5e-4, "batch_size": 128, "epochs": 200,
            "warmup_epochs": 0, "schedule_unit": "epoch",
        },
        source="lightly's CIFAR-10 benchmark (docs/sources.md#barlow-twins)",
    ),
    "imagenet": Preset(
        method={
            "redundancy_weight": 0.0051, "loss_scale": 0.024, "projector_layers": 3, "embedding_dim": 8192,
            "zero_initial_residual": True, **BYOL_VIEWS,
        },
        training={
            "optimizer": "lars", "learning_rate": 0.2, "minimum_learning_rate": 0.0016, "weight_decay": 1e-6,
            "batch_size": 2048, "epochs": 1000, "warmup_epochs": 10, "decay_exclusion": "norm_bias",
        },
        source="Barlow Twins, paper and code (docs/sources.md#barlow-twins)", networks="convolutional",
    ),
}  # fmt: skip


class BarlowTwins(Method):
    """A backbone and a projector; two views of each image."""

    Config = Config
    fixed_views = ("first", "second")

    def __init__(self, config: Config, backbone: Network, *, num_images: int, batch_size: int, seed: int) -> None:
        super().__init__(config, backbone, num_images=num_images, batch_size=batch_size, seed=seed)
        self.config = config
        if config.zero_initial_residual:
            zero_residuals(backbone)
        widths = [config.embedding_dim] * config.projector_layers
        self.projector = mlp([backbone.num_features, *widths], bias=False, final_bias=False)

    @staticmethod
    def views(config: Config, image_size: int) -> Views:
        """Return two views with two augmentation policies."""
        return two_views(config, image_size)

    def forward(self, batch: Batch, progress: Progress) -> Losses:
        """Return the distance of the cross-correlation from the identity, over the batches of all processes (eq. 1)."""
        first, second = (self._embed(batch.views[group][0]) for group in ("first", "second"))
        with full_precision(first):
            everyone = distributed.gather_with_gradient(first), distributed.gather_with_gradient(second)
            invariance, redundancy = correlation_losses(*everyone)
            total = self.config.loss_scale * (invariance + self.config.redundancy_weight * redundancy)
            parts = {"invariance": invariance.detach(), "redundancy": redundancy.detach()}
            return Losses(total, parts, embedding=first.detach())

    def _embed(self, view: Tensor) -> Tensor:
        return self.projector(self.backbone(view)).float()  # z: (batch, dim)


def correlation_losses(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Return the squared distances of the cross-correlation (dim, dim) from 1 on the diagonal and from 0 off it.

    `first` and `second` are (batch, dim); each dimension is normalised over the batch.
    """
    first, second = (F.batch_norm(rows, None, None, training=True) for rows in (first, second))
    correlation = first.T @ second / len(first)
    invariance = (correlation.diagonal() - 1).square().sum()
    return invariance, correlation.fill_diagonal_(0).square().sum()
