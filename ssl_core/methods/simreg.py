"""SimReg: regression of a frozen teacher's features (Navaneet et al., 2021), https://arxiv.org/abs/2201.05131.

A head of four linear layers predicts the teacher's features of the same weakly augmented view from the student's. The
head is dropped after the training.
"""

from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from ssl_core.blocks.frozen_teacher import Distilled, FrozenTeacher, Teacher, one_view
from ssl_core.data.batch import Batch
from ssl_core.data.views import POLICIES, Augmentation, Views
from ssl_core.methods.base import Losses, Method, MethodConfig, Preset, Progress, full_precision
from ssl_core.networks.backbones import Network


class Config(MethodConfig):
    """Defaults: the paper's (docs/sources.md#simreg)."""

    name: Literal["simreg"] = "simreg"
    preset: Literal["paper"] = "paper"
    teacher: Teacher
    area: tuple[float, float] = (0.2, 1.0)
    augmentation: Augmentation = POLICIES["weak"]


PRESETS = {
    "paper": Preset(
        method={},
        training={
            "optimizer": "sgd", "learning_rate": 0.05, "learning_rate_scaling": "none", "weight_decay": 1e-4,
            "batch_size": 256, "epochs": 130, "warmup_epochs": 0, "schedule_unit": "epoch",
        },
        source="SimReg, paper and code (docs/sources.md#simreg)",
    ),
}  # fmt: skip


class SimReg(Distilled, Method):
    """Student with a regression head, and the frozen teacher."""

    Config = Config
    fixed_views = ("both",)

    def __init__(self, config: Config, backbone: Network, *, num_images: int, batch_size: int, seed: int) -> None:
        super().__init__(config, backbone, num_images=num_images, batch_size=batch_size, seed=seed)
        self.config = config
        self.teacher = FrozenTeacher(config.teacher)
        self.predictor = regression_head(backbone.num_features, self.teacher.dim)

    @staticmethod
    def views(config: Config, image_size: int) -> Views:
        """Return a single view for both networks."""
        return one_view(image_size, config.area, config.augmentation)

    def forward(self, batch: Batch, progress: Progress) -> Losses:
        """Return the distance of the prediction to the teacher's features."""
        (view,) = batch.views["both"]
        prediction = self.predictor(self.backbone(view)).float()  # (batch, dim)
        target = self.teacher(view)
        with full_precision(prediction):
            loss = simreg_loss(prediction, target)
        return Losses(loss, {}, embedding=prediction.detach())


def regression_head(num_features: int, dim: int) -> nn.Sequential:
    """Build the head d-2d(BN, ReLU)-d-2d(BN, ReLU)-dim; its second layer is linear, as in the code."""
    wide = 2 * num_features
    return nn.Sequential(
        nn.Linear(num_features, wide),
        nn.BatchNorm1d(wide),
        nn.ReLU(),
        nn.Linear(wide, num_features),
        nn.Linear(num_features, wide),
        nn.BatchNorm1d(wide),
        nn.ReLU(),
        nn.Linear(wide, dim),
    )


def simreg_loss(prediction: Tensor, target: Tensor) -> Tensor:
    """Return the squared distance of the unit vectors, 2 - 2 cos, of (batch, dim), mean over the batch."""
    cosine = (F.normalize(prediction, dim=1) * F.normalize(target.detach(), dim=1)).sum(dim=1)
    return (2 - 2 * cosine).mean()
