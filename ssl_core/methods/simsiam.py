"""SimSiam: simple Siamese networks (Chen & He, 2021), https://arxiv.org/abs/2011.10566.

A predictor maps the embedding of one view to that of the other, which gets no gradient. There are no negatives, no
memory and no teacher: predictor and stop-gradient prevent collapse.
"""

from typing import Literal

import torch.nn.functional as F
from pydantic import PositiveInt
from torch import Tensor

from ssl_core.data.batch import Batch
from ssl_core.data.views import POLICIES, Augmentation, View, Views
from ssl_core.methods.base import Losses, Method, MethodConfig, Preset, Progress, full_precision
from ssl_core.networks.backbones import Network
from ssl_core.networks.batchnorm import zero_residuals
from ssl_core.networks.heads import mlp


class Config(MethodConfig):
    """Defaults: the paper's CIFAR experiments (appendix D; docs/sources.md#simsiam)."""

    name: Literal["simsiam"] = "simsiam"
    preset: Literal["cifar", "imagenet", "cao_wu"] = "cifar"
    projector_layers: PositiveInt = 2
    embedding_dim: PositiveInt = 2048  # also the width of the projector's hidden layers
    predictor_hidden: PositiveInt = 512
    constant_predictor_rate: bool = True  # constant learning rate of the predictor (Table 1 c)
    zero_initial_residual: bool = True  # residual blocks of ResNets are initialised as identities, as in the code
    batchnorm_splits: PositiveInt = 1  # parts of the global batch with separate BatchNorm statistics
    area: tuple[float, float] = (0.2, 1.0)
    augmentation: Augmentation = POLICIES["contrastive_no_blur"]


_SGD = {"optimizer": "sgd", "batch_size": 512, "warmup_epochs": 0, "schedule_unit": "epoch"}

PRESETS = {
    "cifar": Preset(  # 91.8 % linear accuracy (appendix D)
        method={}, training={**_SGD, "learning_rate": 0.03, "weight_decay": 5e-4, "epochs": 800},
        source="SimSiam, paper, appendix D (docs/sources.md#simsiam)",
    ),
    "imagenet": Preset(
        method={"projector_layers": 3, "augmentation": "contrastive"},
        training={**_SGD, "learning_rate": 0.05, "weight_decay": 1e-4, "epochs": 100},
        source="SimSiam, paper and code, ImageNet (docs/sources.md#simsiam)",
    ),
    "cao_wu": Preset(  # SSQL's code, used by Cao & Wu: absolute learning rate, BatchNorm per GPU of four
        method={
            "projector_layers": 3, "predictor_hidden": 2048, "constant_predictor_rate": False, "batchnorm_splits": 4,
        },
        training={
            **_SGD, "learning_rate": 0.05, "learning_rate_scaling": "none", "weight_decay": 5e-4, "epochs": 400,
        },
        source="SSQL's code, also Cao & Wu's baseline (docs/sources.md#simsiam)",
    ),
}  # fmt: skip


class SimSiam(Method):
    """A backbone, a projector and a predictor; two views of each image."""

    Config = Config
    fixed_views = ("student",)

    def __init__(self, config: Config, backbone: Network, *, num_images: int, batch_size: int, seed: int) -> None:
        super().__init__(config, backbone, num_images=num_images, batch_size=batch_size, seed=seed)
        dim = config.embedding_dim
        if config.zero_initial_residual:
            zero_residuals(backbone)
        self.constant_rate = ("predictor",) if config.constant_predictor_rate else ()
        self.projector = mlp(
            [backbone.num_features, *[dim] * config.projector_layers],
            bias=False,
            final_batch_norm=True,
            final_affine=False,
        )
        self.predictor = mlp([dim, config.predictor_hidden, dim], bias=False)
        self.split_batchnorm(config.batchnorm_splits)

    @staticmethod
    def views(config: Config, image_size: int) -> Views:
        """Return two views with the same augmentation."""
        return {"student": View(count=2, size=image_size, area=config.area, augmentation=config.augmentation)}

    def forward(self, batch: Batch, progress: Progress) -> Losses:
        """Return L = D(p1, z2) / 2 + D(p2, z1) / 2 (eq. 2), in [-1, 1]."""
        first, second = (self.projector(self.backbone(view)) for view in batch.views["student"])  # z: (batch, dim)
        predictions = self.predictor(first), self.predictor(second)  # p: (batch, dim)
        with full_precision(first):
            forward = negative_cosine(predictions[0], second)
            backward = negative_cosine(predictions[1], first)
            total = (forward + backward) / 2
            return Losses(total, {"negative_cosine": total.detach()}, embedding=first.detach().float())


def negative_cosine(prediction: Tensor, target: Tensor) -> Tensor:
    """Return minus the mean cosine of the rows of `prediction` and `target` (batch, dim) (Chen & He, 2021, eq. 1).

    No gradient reaches the target.
    """
    return -F.cosine_similarity(prediction.float(), target.detach().float(), dim=1).mean()
