"""VICReg: variance-invariance-covariance regularization (Bardes et al., 2022), https://arxiv.org/abs/2105.04906.

Two views of an image must have the same embedding. Two terms over the batch prevent collapse: each dimension must vary
and no two may be correlated. There are no negatives, no memory and no teacher.
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
    """Defaults: the paper's loss with solo-learn's head for CIFAR (docs/sources.md#vicreg)."""

    name: Literal["vicreg"] = "vicreg"
    preset: Literal["small", "imagenet", "imagenet_100"] = "small"
    invariance_weight: PositiveFloat = 25.0  # lambda, mu and nu of eq. 6
    variance_weight: PositiveFloat = 25.0
    covariance_weight: PositiveFloat = 1.0
    projector_layers: PositiveInt = 3
    embedding_dim: PositiveInt = 2048  # also the width of the projector's hidden layers
    zero_initial_residual: bool = False  # residual blocks of ResNets are initialised as identities, as in the code


_SMALL_AUGMENTATION = {"policy": "byol_first", "blur": 0.0, "solarize": 0.1}
_PAPER = {"embedding_dim": 8192, "zero_initial_residual": True, **BYOL_VIEWS}
_LARS = {"optimizer": "lars", "weight_decay": 1e-6, "warmup_epochs": 10, "decay_exclusion": "norm_bias"}

PRESETS = {
    "small": Preset(
        method={"first_augmentation": _SMALL_AUGMENTATION, "second_augmentation": _SMALL_AUGMENTATION},
        training={
            **_LARS, "learning_rate": 0.3, "minimum_learning_rate": 0.0003, "batch_size": 256, "epochs": 200,
        },
        source="chosen here: solo-learn's head and views, VICReg's optimisation (docs/sources.md#vicreg)",
        networks="convolutional",
    ),
    "imagenet": Preset(
        method=_PAPER,
        training={
            **_LARS, "learning_rate": 0.2, "minimum_learning_rate": 0.0016, "batch_size": 2048, "epochs": 1000,
        },
        source="VICReg, paper and code, 1,000 epochs (docs/sources.md#vicreg)", networks="convolutional",
    ),
    "imagenet_100": Preset(
        method=_PAPER,
        training={
            **_LARS, "learning_rate": 0.3, "minimum_learning_rate": 0.0006, "batch_size": 512, "epochs": 100,
        },
        source="VICReg's code, command for 100 epochs (docs/sources.md#vicreg)", networks="convolutional",
    ),
}  # fmt: skip


class VICReg(Method):
    """A backbone and a projector (the paper's expander); two views of each image."""

    Config = Config
    fixed_views = ("first", "second")

    def __init__(self, config: Config, backbone: Network, *, num_images: int, batch_size: int, seed: int) -> None:
        super().__init__(config, backbone, num_images=num_images, batch_size=batch_size, seed=seed)
        self.config = config
        if config.zero_initial_residual:
            zero_residuals(backbone)
        widths = [config.embedding_dim] * config.projector_layers
        self.projector = mlp([backbone.num_features, *widths], final_bias=False)

    @staticmethod
    def views(config: Config, image_size: int) -> Views:
        """Return two views with two augmentation policies."""
        return two_views(config, image_size)

    def forward(self, batch: Batch, progress: Progress) -> Losses:
        """Return the weighted sum of the three terms (eq. 6), with statistics of the batches of all processes."""
        first, second = (self._embed(batch.views[group][0]) for group in ("first", "second"))
        with full_precision(first):
            all_first, all_second = distributed.gather_with_gradient(first), distributed.gather_with_gradient(second)
            terms = {
                "invariance": F.mse_loss(all_first, all_second),
                "variance": (variance(all_first) + variance(all_second)) / 2,
                "covariance": covariance(all_first) + covariance(all_second),
            }
            total = (
                self.config.invariance_weight * terms["invariance"]
                + self.config.variance_weight * terms["variance"]
                + self.config.covariance_weight * terms["covariance"]
            )
            parts = {name: term.detach() for name, term in terms.items()}
            return Losses(total, parts, embedding=first.detach())

    def _embed(self, view: Tensor) -> Tensor:
        return self.projector(self.backbone(view)).float()  # z: (batch, dim)


def variance(rows: Tensor) -> Tensor:
    """Return how far the deviations of the dimensions of `rows` (batch, dim) are below 1, mean over dim (eq. 1)."""
    return F.relu(1 - (rows.var(dim=0) + 1e-4).sqrt()).mean()


def covariance(rows: Tensor) -> Tensor:
    """Return the squared covariances between different dimensions of `rows` (batch, dim), summed and / dim (eq. 4)."""
    return rows.T.cov().fill_diagonal_(0).square().sum() / rows.shape[1]
