"""BYOL: bootstrap your own latent (Grill et al., 2020), https://arxiv.org/abs/2006.07733.

The student predicts from its view the momentum teacher's embedding of another view of the same image. There are no
negatives: predictor, momentum and BatchNorm prevent collapse.
"""

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import PositiveInt
from torch import Tensor

from ssl_core.blocks.momentum import MomentumTeacher
from ssl_core.blocks.two_views import BYOL_VIEWS, TwoViews, two_views
from ssl_core.data.batch import Batch
from ssl_core.data.views import Probability, Views
from ssl_core.methods.base import Losses, Memory, Method, MethodConfig, Preset, Progress, full_precision
from ssl_core.networks.backbones import Network
from ssl_core.networks.heads import mlp


class Config(TwoViews, MethodConfig):
    """Defaults: SSQL's CIFAR baseline, also used by Cao & Wu; `imagenet` is the paper's (docs/sources.md#byol)."""

    name: Literal["byol"] = "byol"
    preset: Literal["small", "imagenet", "imagenet_300"] = "small"
    # regression: 2 - 2 cos, summed over both directions (paper). negative_cosine: -cos, their mean (SSQL); its gradient
    # is a quarter of the paper's.
    loss: Literal["regression", "negative_cosine"] = "negative_cosine"
    projector_layers: PositiveInt = 3
    projector_hidden: PositiveInt = 2048
    predictor_hidden: PositiveInt = 2048
    embedding_dim: PositiveInt = 512
    hidden_bias: bool = False  # of layers in front of a BatchNorm
    batchnorm_splits: PositiveInt = 1  # parts of the global batch with separate BatchNorm statistics
    teacher_momentum: Probability = 0.99
    final_teacher_momentum: Probability | None = None  # at the end of a cosine; None: constant


_PAPER = {
    "loss": "regression", "projector_layers": 2, "projector_hidden": 4096, "predictor_hidden": 4096,
    "embedding_dim": 256, "hidden_bias": True, "teacher_momentum": 0.996, "final_teacher_momentum": 1.0, **BYOL_VIEWS,
}  # fmt: skip
_LARS = {
    "optimizer": "lars", "learning_rate": 0.2, "weight_decay": 1.5e-6, "batch_size": 4096, "epochs": 1000,
    "warmup_epochs": 10, "decay_exclusion": "norm_bias",
}  # fmt: skip

PRESETS = {
    "small": Preset(
        method={},
        training={
            "optimizer": "sgd", "learning_rate": 0.05, "learning_rate_scaling": "none", "weight_decay": 1e-4,
            "batch_size": 512, "epochs": 400, "warmup_epochs": 0, "schedule_unit": "epoch",
        },
        source="SSQL's code, also Cao & Wu's baseline (docs/sources.md#byol)",
    ),
    "imagenet": Preset(
        method=_PAPER, training=_LARS,
        source="BYOL, paper, 1,000 epochs (docs/sources.md#byol)",
    ),
    "imagenet_300": Preset(
        method={**_PAPER, "teacher_momentum": 0.99},
        training={**_LARS, "learning_rate": 0.3, "weight_decay": 1e-6, "epochs": 300},
        source="BYOL, paper, 300 epochs (docs/sources.md#byol)",
    ),
}  # fmt: skip


class BYOL(Method):
    """Student with a predictor, and a momentum teacher without."""

    Config = Config
    fixed_views = ("first", "second")

    def __init__(self, config: Config, backbone: Network, *, num_images: int, batch_size: int, seed: int) -> None:
        super().__init__(config, backbone, num_images=num_images, batch_size=batch_size, seed=seed)
        self.config = config
        hidden = [config.projector_hidden] * (config.projector_layers - 1)
        dim, bias = config.embedding_dim, config.hidden_bias
        self.projector = mlp([backbone.num_features, *hidden, dim], bias=bias)
        self.predictor = mlp([dim, config.predictor_hidden, dim], bias=bias)
        self.split_batchnorm(config.batchnorm_splits)
        self.teacher = MomentumTeacher(
            self.backbone,
            self.projector,
            momentum=config.teacher_momentum,
            final_momentum=config.final_teacher_momentum,
        )

    @staticmethod
    def views(config: Config, image_size: int) -> Views:
        """Return two views with two augmentation policies, both for student and teacher."""
        networks = ("student", "teacher")
        return two_views(config, image_size, first=networks, second=networks)

    def forward(self, batch: Batch, progress: Progress) -> Losses:
        """Return the distance of the student's prediction from each view to the teacher's embedding of the other."""
        views = batch.views["first"][0], batch.views["second"][0]
        embeddings = [self.projector(self.backbone(view)) for view in views]  # z: (batch, dim)
        first, second = (self.predictor(embedding) for embedding in embeddings)  # q: (batch, dim)
        with torch.no_grad():
            target_first, target_second = (self.teacher(view) for view in views)  # z': (batch, dim)
        with full_precision(first):
            regression = regression_loss(first, target_second) + regression_loss(second, target_first)
            total = regression if self.config.loss == "regression" else regression / 4 - 1
            return Losses(total, {"regression": regression.detach()}, embedding=embeddings[0].detach().float())

    def after_step(self, progress: Progress, memories: Sequence[Memory]) -> None:
        """Move the teacher towards the updated student."""
        self.teacher.update(self.backbone, self.projector, fraction=progress.fraction)


def regression_loss(prediction: Tensor, target: Tensor) -> Tensor:
    """Return the mean squared distance of the normalised rows of `prediction` and `target` (batch, dim) (eq. 2).

    No gradient reaches the target.
    """
    return 2 - 2 * F.cosine_similarity(prediction.float(), target.detach().float(), dim=1).mean()
