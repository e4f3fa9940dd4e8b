"""MoCo v3: momentum contrast without a queue (Chen et al., 2021), https://arxiv.org/abs/2104.02057.

The student's prediction from one view must match the momentum teacher's embedding of the other view of its image among
those of the batch. Vision transformers train more stably with a frozen random patch projection.
"""

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import PositiveFloat, PositiveInt
from torch import Tensor, nn

from ssl_core.blocks import distributed
from ssl_core.blocks.losses import batch_contrast
from ssl_core.blocks.momentum import MomentumTeacher
from ssl_core.blocks.two_views import BYOL_VIEWS, SMALL_VIEWS, TwoViews, two_views
from ssl_core.data.batch import Batch
from ssl_core.data.views import Probability, Views
from ssl_core.methods.base import Losses, Memory, Method, MethodConfig, Preset, Progress, full_precision
from ssl_core.networks.backbones import Network
from ssl_core.networks.batchnorm import zero_residuals
from ssl_core.networks.heads import mlp


class Config(TwoViews, MethodConfig):
    """Defaults: the code's heads for ResNets with solo-learn's temperature for CIFAR (docs/sources.md#moco-v3)."""

    name: Literal["moco_v3"] = "moco_v3"
    preset: Literal["small", "imagenet", "imagenet_300", "imagenet_1000", "vit"] = "small"
    temperature: PositiveFloat = 0.2
    projector_layers: PositiveInt = 2
    projector_hidden: PositiveInt = 4096
    predictor_hidden: PositiveInt = 4096
    predictor_final_batchnorm: bool = False
    embedding_dim: PositiveInt = 256
    teacher_momentum: Probability = 0.99
    final_teacher_momentum: Probability | None = 1.0  # at the end of a cosine; None: constant
    zero_initial_residual: bool = False  # residual blocks of ResNets are initialised as identities, as in the code
    freeze_patches: bool = False  # the patch projection of a vision transformer keeps its random weights


_RESNET = {
    "temperature": 1.0,
    "zero_initial_residual": True,
    **BYOL_VIEWS,
    "area": (0.2, 1.0),
    "interpolation": "linear",
}
_LARS = {
    "optimizer": "lars", "learning_rate": 0.3, "weight_decay": 1e-6, "batch_size": 4096, "warmup_epochs": 10,
    "decay_exclusion": "norm_bias",
}  # fmt: skip

PRESETS = {
    "small": Preset(
        method=SMALL_VIEWS, training={**_LARS, "batch_size": 256, "epochs": 200},
        source="chosen here: solo-learn's temperature and views, MoCo v3's optimisation (docs/sources.md#moco-v3)",
        networks="convolutional",
    ),
    "imagenet": Preset(
        method=_RESNET, training={**_LARS, "learning_rate": 0.45, "epochs": 100},
        source="MoCo v3's code, ResNet-50, 100 epochs (docs/sources.md#moco-v3)", networks="convolutional",
    ),
    "imagenet_300": Preset(
        method=_RESNET, training={**_LARS, "epochs": 300},
        source="MoCo v3's code, ResNet-50, 300 epochs (docs/sources.md#moco-v3)", networks="convolutional",
    ),
    "imagenet_1000": Preset(
        method={**_RESNET, "teacher_momentum": 0.996}, training={**_LARS, "weight_decay": 1.5e-6, "epochs": 1000},
        source="MoCo v3's code, ResNet-50, 1,000 epochs (docs/sources.md#moco-v3)", networks="convolutional",
    ),
    "vit": Preset(
        method={
            "projector_layers": 3, "predictor_final_batchnorm": True, "freeze_patches": True, **BYOL_VIEWS,
            "interpolation": "linear",
        },
        training={
            "optimizer": "adamw", "learning_rate": 1.5e-4, "weight_decay": 0.1, "batch_size": 4096, "epochs": 300,
            "warmup_epochs": 40,
        },
        source="MoCo v3's code, vision transformers (docs/sources.md#moco-v3)", networks="transformer",
    ),
}  # fmt: skip


class MoCoV3(Method):
    """Student with a predictor, and a momentum teacher without; the keys are those of the batch."""

    Config = Config
    fixed_views = ("first", "second")

    def __init__(self, config: Config, backbone: Network, *, num_images: int, batch_size: int, seed: int) -> None:
        super().__init__(config, backbone, num_images=num_images, batch_size=batch_size, seed=seed)
        self.config = config
        if config.zero_initial_residual:
            zero_residuals(backbone)
        patches = getattr(backbone, "patch_embed", None)
        if config.freeze_patches and isinstance(patches, nn.Module):
            patches.requires_grad_(False)
        hidden, dim = [config.projector_hidden] * (config.projector_layers - 1), config.embedding_dim
        self.projector = mlp(
            [backbone.num_features, *hidden, dim], bias=False, final_batch_norm=True, final_affine=False
        )
        self.predictor = mlp(
            [dim, config.predictor_hidden, dim],
            bias=False,
            final_bias=False,
            final_batch_norm=config.predictor_final_batchnorm,
            final_affine=False,
        )
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
        """Return 2 * temperature * InfoNCE of each view's query among the other views' keys, summed."""
        views = batch.views["first"][0], batch.views["second"][0]
        first, second = (self._query(view) for view in views)  # q: (batch, dim)
        first_keys, second_keys = (self._keys(view) for view in views)
        with full_precision(first):
            temperature = self.config.temperature
            there = batch_contrast(first, second_keys, temperature=temperature)
            back = batch_contrast(second, first_keys, temperature=temperature)
            total = 2 * temperature * (there + back)
            return Losses(total, {"contrast": (there + back).detach() / 2}, embedding=first.detach())

    def _query(self, view: Tensor) -> Tensor:
        return F.normalize(self.predictor(self.projector(self.backbone(view))).float(), dim=1)

    @torch.no_grad()
    def _keys(self, view: Tensor) -> Tensor:
        return distributed.gather(F.normalize(self.teacher(view).float(), dim=1))  # k: (processes * batch, dim)

    def after_step(self, progress: Progress, memories: Sequence[Memory]) -> None:
        """Move the teacher towards the updated student."""
        self.teacher.update(self.backbone, self.projector, fraction=progress.fraction)
