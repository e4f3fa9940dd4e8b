"""BYOL: bootstrap your own latent (Grill et al., 2020), https://arxiv.org/abs/2006.07733.

The student predicts, from its view, what a momentum teacher makes of another view of the same image. There are no
negatives: predictor, momentum and BatchNorm keep the embeddings from falling together.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import PositiveInt
from torch import Tensor, nn

from ssl_core.blocks import distributed
from ssl_core.blocks.momentum import make_teacher, update_teacher
from ssl_core.blocks.schedules import cosine_momentum
from ssl_core.data.loader import Batch
from ssl_core.data.views import POLICIES, Augmentation, Probability, View, Views
from ssl_core.methods.base import Losses, Method, MethodConfig, Preset, Progress, full_precision
from ssl_core.networks.backbones import Network
from ssl_core.networks.batchnorm import split_batchnorm
from ssl_core.networks.heads import mlp


class Config(MethodConfig):
    """Defaults are those of SSQL's CIFAR baseline, which Cao & Wu run (recipes M7); `imagenet` is the paper's."""

    name: Literal["byol"] = "byol"
    preset: Literal["small", "imagenet", "imagenet_300"] = "small"
    # The paper's 2 - 2 cos summed over both orders, or -cos averaged over them as in SSQL: gradients of a quarter.
    loss: Literal["regression", "negative_cosine"] = "negative_cosine"
    projector_layers: PositiveInt = 3
    projector_hidden: PositiveInt = 2048
    predictor_hidden: PositiveInt = 2048
    embedding_dim: PositiveInt = 512
    hidden_bias: bool = False  # of layers that a BatchNorm follows
    batchnorm_splits: PositiveInt = 1  # parts of the global batch with BatchNorm statistics of their own
    teacher_momentum: Probability = 0.99
    final_teacher_momentum: Probability | None = None  # reached on a cosine; None keeps it constant
    area: tuple[float, float] = (0.2, 1.0)
    interpolation: Literal["linear", "cubic"] = "linear"
    first_augmentation: Augmentation = POLICIES["contrastive_no_blur"]
    second_augmentation: Augmentation = POLICIES["contrastive_no_blur"]


_PAPER = {
    "loss": "regression", "projector_layers": 2, "projector_hidden": 4096, "predictor_hidden": 4096,
    "embedding_dim": 256, "hidden_bias": True, "teacher_momentum": 0.996, "final_teacher_momentum": 1.0,
    "area": (0.08, 1.0), "interpolation": "cubic", "first_augmentation": "byol_first",
    "second_augmentation": "byol_second",
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
    ),
    "imagenet": Preset(method=_PAPER, training=_LARS),
    "imagenet_300": Preset(
        method={**_PAPER, "teacher_momentum": 0.99},
        training={**_LARS, "learning_rate": 0.3, "weight_decay": 1e-6, "epochs": 300},
    ),
}  # fmt: skip


class BYOL(Method):
    """Student with a predictor, and a momentum teacher without."""

    Config = Config
    fixed_views = ("first", "second")

    def __init__(self, config: Config, backbone: Network, *, num_images: int, batch_size: int, seed: int) -> None:
        super().__init__(config, backbone, num_images=num_images, batch_size=batch_size, seed=seed)
        self.config = config
        self.backbone: Network = backbone
        hidden = [config.projector_hidden] * (config.projector_layers - 1)
        dim, bias = config.embedding_dim, config.hidden_bias
        self.projector = mlp([backbone.num_features, *hidden, dim], bias=bias)
        self.predictor = mlp([dim, config.predictor_hidden, dim], bias=bias)
        if config.batchnorm_splits > 1:
            split_batchnorm(self, max(1, config.batchnorm_splits // distributed.world_size()))
        self.teacher = make_teacher(nn.Sequential(self.backbone, self.projector))

    @staticmethod
    def views(config: Config, image_size: int) -> Views:
        """Two views of two policies, each seen by student and teacher."""
        policies = {"first": config.first_augmentation, "second": config.second_augmentation}
        return {
            group: View(
                size=image_size,
                area=config.area,
                interpolation=config.interpolation,
                augmentation=augmentation,
                seen_by=("student", "teacher"),
            )
            for group, augmentation in policies.items()
        }

    def forward(self, batch: Batch, progress: Progress) -> Losses:
        """Return what the student's predictions from each view miss of the teacher's embeddings of the other."""
        views = batch.views["first"][0], batch.views["second"][0]
        embeddings = [self.projector(self.backbone(view)) for view in views]  # z: (batch, dim)
        first, second = (self.predictor(embedding) for embedding in embeddings)  # q: (batch, dim)
        with torch.no_grad():
            target_first, target_second = (self.teacher(view) for view in views)  # z': (batch, dim)
        with full_precision(first):
            regression = regression_loss(first, target_second) + regression_loss(second, target_first)
            total = regression if self.config.loss == "regression" else regression / 4 - 1
            return Losses(total, {"regression": regression.detach()}, embedding=embeddings[0].detach().float())

    @torch.no_grad()
    def after_step(self, progress: Progress) -> None:
        """Move the teacher towards the student as the optimizer left it."""
        start, end = self.config.teacher_momentum, self.config.final_teacher_momentum
        momentum = start if end is None else cosine_momentum(progress.step, progress.total_steps, start, end)
        update_teacher(self.teacher, nn.Sequential(self.backbone, self.projector), momentum)


def regression_loss(prediction: Tensor, target: Tensor) -> Tensor:
    """Return the mean squared distance of `prediction` and `target` (batch, dim) as unit rows, 2 - 2 cos (eq. 2).

    No gradient reaches the target.
    """
    return 2 - 2 * F.cosine_similarity(prediction.float(), target.detach().float(), dim=1).mean()
