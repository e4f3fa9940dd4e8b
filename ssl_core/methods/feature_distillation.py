"""Distillation of a large free network, such as DINOv2: its pooled features and its last map.

Each of two heads predicts one of them from the student's counterpart, for the same view, in the form of AM-RADIO
(Ranzinger et al., 2024, https://arxiv.org/abs/2312.06709); the heads are dropped after the training.
"""

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import NonNegativeFloat, PositiveInt, model_validator
from torch import Tensor, nn

from ssl_core.blocks.frozen_teacher import Distilled, FrozenTeacher, Teacher, one_view
from ssl_core.data.batch import Batch
from ssl_core.data.views import POLICIES, Augmentation, Views
from ssl_core.methods.base import Losses, Method, MethodConfig, Preset, Progress, full_precision
from ssl_core.networks.backbones import Network
from ssl_core.networks.families import features_and_map
from ssl_core.networks.heads import mlp

PROBE_SIZE = 224  # pixels; a multiple of the patches of all usual vision transformers


class Config(MethodConfig):
    """Defaults: chosen here (docs/sources.md#feature-distillation)."""

    name: Literal["feature_distillation"] = "feature_distillation"
    preset: Literal["default"] = "default"
    teacher: Teacher
    loss: Literal["cosine", "mse"] = "cosine"
    pooled_weight: NonNegativeFloat = 1.0
    spatial_weight: NonNegativeFloat = 1.0
    head_hidden: PositiveInt = 2048
    area: tuple[float, float] = (0.2, 1.0)
    augmentation: Augmentation = POLICIES["weak"]

    @model_validator(mode="after")
    def _something_is_distilled(self) -> "Config":
        if not self.pooled_weight and not self.spatial_weight:
            raise ValueError("pooled_weight and spatial_weight are both 0, which distils nothing: set one above 0")
        if self.teacher.projector is not None:
            raise ValueError("teacher.projector has no effect on features: leave it out")
        return self


PRESETS = {
    "default": Preset(
        method={},
        training={
            "optimizer": "adamw", "learning_rate": 1e-3, "weight_decay": 0.05, "batch_size": 256, "epochs": 100,
            "warmup_epochs": 5, "decay_exclusion": "norm_bias",
        },
        source="chosen here, in the form of AM-RADIO (docs/sources.md#feature-distillation)",
    ),
}  # fmt: skip


class FeatureDistillation(Distilled, Method):
    """Student with heads for pooled features and for the map, and the frozen teacher."""

    Config = Config
    fixed_views = ("both",)

    def __init__(self, config: Config, backbone: Network, *, num_images: int, batch_size: int, seed: int) -> None:
        super().__init__(config, backbone, num_images=num_images, batch_size=batch_size, seed=seed)
        self.config = config
        self.teacher = FrozenTeacher(config.teacher)
        if config.pooled_weight:
            self.predictor = mlp([backbone.num_features, config.head_hidden, self.teacher.num_features])
        if config.spatial_weight:
            widths = map_channels(backbone), map_channels(self.teacher.network[0])
            self.map_predictor = map_head(widths[0], config.head_hidden, widths[1])

    @staticmethod
    def views(config: Config, image_size: int) -> Views:
        """Return a single view for both networks."""
        return one_view(image_size, config.area, config.augmentation)

    def forward(self, batch: Batch, progress: Progress) -> Losses:
        """Return the weighted distances of both predictions to the teacher's features and map."""
        (view,) = batch.views["both"]
        features, maps = features_and_map(self.backbone, view)
        target, target_map = self.teacher.features_and_map(view)
        weights = {"pooled": self.config.pooled_weight, "spatial": self.config.spatial_weight}
        losses: dict[str, Tensor] = {}
        if weights["pooled"]:
            losses["pooled"] = self._distance(self.predictor(features), target)
        if weights["spatial"]:
            prediction = self.map_predictor(maps)
            losses["spatial"] = self._distance(prediction, resized(target_map, prediction.shape[2:]))
        total = torch.stack([weights[name] * loss for name, loss in losses.items()]).sum()
        parts = {name: loss.detach() for name, loss in losses.items()}
        return Losses(total, parts, embedding=features.detach().float())

    def _distance(self, prediction: Tensor, target: Tensor) -> Tensor:
        with full_precision(prediction):
            return distance(prediction.float(), target, loss=self.config.loss)


def distance(prediction: Tensor, target: Tensor, *, loss: str) -> Tensor:
    """Return 1 - cos over channels, or the squared error, of (batch, channels, ...), mean over all other axes."""
    if loss == "cosine":
        return 1 - (F.normalize(prediction, dim=1) * F.normalize(target.detach(), dim=1)).sum(dim=1).mean()
    return F.mse_loss(prediction, target.detach())


def resized(maps: Tensor, size: Sequence[int]) -> Tensor:
    """Interpolate maps (batch, channels, height, width) to another height and width, with averaging."""
    if maps.shape[2:] == torch.Size(size):
        return maps
    return F.interpolate(maps, size=[*size], mode="bilinear", antialias=True)


def map_head(channels: int, hidden: int, dim: int) -> nn.Sequential:
    """Build the head of a map: two 1x1 convolutions, the counterpart of the two linear layers of `mlp`."""
    return nn.Sequential(
        nn.Conv2d(channels, hidden, kernel_size=1),
        nn.BatchNorm2d(hidden),
        nn.ReLU(),
        nn.Conv2d(hidden, dim, kernel_size=1),
    )


@torch.no_grad()
def map_channels(network: nn.Module) -> int:
    """Return the number of channels of a network's last map, from a forward pass."""
    training = network.training
    _, maps = features_and_map(network.eval(), torch.zeros(1, 3, PROBE_SIZE, PROBE_SIZE))
    network.train(training)
    return maps.shape[1]
