"""SimCLR: contrast within the batch (Chen et al., 2020), https://arxiv.org/abs/2002.05709.

Each view must match the other view of its image among all views of the batch. There is no memory and no teacher, so the
batch must be large; negatives come from all processes, with gradient.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import PositiveFloat, PositiveInt
from torch import Tensor

from ssl_core.blocks import distributed
from ssl_core.data.batch import Batch
from ssl_core.data.views import POLICIES, Augmentation, View, Views
from ssl_core.methods.base import Losses, Method, MethodConfig, Preset, Progress, full_precision
from ssl_core.networks.backbones import Network
from ssl_core.networks.heads import mlp


class Config(MethodConfig):
    """Defaults: the official command for CIFAR-10 (docs/sources.md#simclr)."""

    name: Literal["simclr"] = "simclr"
    preset: Literal["cifar", "imagenet", "cao_wu"] = "cifar"
    temperature: PositiveFloat = 0.5
    # Anchors are the first and the second views. The official code sums their two mean losses, others average them.
    directions: Literal["sum", "mean"] = "sum"
    # Parts of the global batch without negatives from each other, as on several processes without a gather.
    negative_groups: PositiveInt = 1
    projector_hidden: PositiveInt = 2048
    projector_batchnorm: bool = True  # after both layers, as in the code; not given in the paper
    embedding_dim: PositiveInt = 128
    batchnorm_splits: PositiveInt = 1  # parts of the global batch with separate BatchNorm statistics
    area: tuple[float, float] = (0.08, 1.0)
    augmentation: Augmentation = POLICIES["simclr_small"]


PRESETS = {
    "cifar": Preset(  # about 91 % linear accuracy after 1,000 epochs of ResNet-18, according to its README
        method={},
        training={
            "optimizer": "lars", "learning_rate": 1.0, "weight_decay": 1e-4, "batch_size": 512, "epochs": 1000,
            "warmup_epochs": 10, "decay_exclusion": "norm_bias",
        },
        source="SimCLR's code, command for CIFAR-10 (docs/sources.md#simclr)",
    ),
    "imagenet": Preset(
        method={"temperature": 0.1, "augmentation": "simclr"},
        training={
            "optimizer": "lars", "learning_rate": 0.3, "weight_decay": 1e-6, "batch_size": 4096, "epochs": 1000,
            "warmup_epochs": 10, "decay_exclusion": "norm_bias",
        },
        source="SimCLR, paper and code, ImageNet (docs/sources.md#simclr)",
    ),
    "cao_wu": Preset(  # SSQL's code on four GPUs, used by Cao & Wu: negatives and statistics of 128 images
        method={
            "directions": "mean", "negative_groups": 4, "batchnorm_splits": 4, "projector_batchnorm": False,
            "embedding_dim": 256, "area": (0.2, 1.0), "augmentation": "contrastive_no_blur",
        },
        training={
            "optimizer": "sgd", "learning_rate": 0.5, "learning_rate_scaling": "none", "weight_decay": 1e-4,
            "batch_size": 512, "epochs": 400, "warmup_epochs": 0, "schedule_unit": "epoch",
        },
        source="SSQL's code, also Cao & Wu's baseline (docs/sources.md#simclr)",
    ),
}  # fmt: skip


class SimCLR(Method):
    """A backbone and a projector; two views of each image."""

    Config = Config
    fixed_views = ("student",)

    def __init__(self, config: Config, backbone: Network, *, num_images: int, batch_size: int, seed: int) -> None:
        super().__init__(config, backbone, num_images=num_images, batch_size=batch_size, seed=seed)
        groups, processes = config.negative_groups, distributed.world_size()
        if groups > 1 and groups % processes:
            raise ValueError(f"method.negative_groups {groups} must be 1 or a multiple of the processes, {processes}")
        if batch_size // groups < 2:
            raise ValueError(
                f"training.batch_size {batch_size} leaves the {groups} method.negative_groups without negatives: "
                f"choose {2 * groups} or more"
            )
        self.config = config
        self.groups = max(1, groups // processes)  # in this process
        norm = config.projector_batchnorm
        dims = [backbone.num_features, config.projector_hidden, config.embedding_dim]
        self.projector = mlp(dims, batch_norm=norm, final_batch_norm=norm)
        self.split_batchnorm(config.batchnorm_splits)

    @staticmethod
    def views(config: Config, image_size: int) -> Views:
        """Return two views with the same augmentation."""
        return {"student": View(count=2, size=image_size, area=config.area, augmentation=config.augmentation)}

    def forward(self, batch: Batch, progress: Progress) -> Losses:
        """Return the NT-Xent loss with the negatives of all processes, or of groups within this process."""
        first, second = (self._embed(view) for view in batch.views["student"])
        with full_precision(first):
            loss = self._contrast(first, second)
            total = 2 * loss if self.config.directions == "sum" else loss
            return Losses(total, {"contrast": loss.detach()}, embedding=first.detach())

    def _contrast(self, first: Tensor, second: Tensor) -> Tensor:
        temperature = self.config.temperature
        if self.config.negative_groups == 1:
            everyone = distributed.gather_with_gradient(first), distributed.gather_with_gradient(second)
            start = distributed.rank() * len(first)
            return nt_xent(first, second, temperature=temperature, everyone=everyone, start=start)
        groups = zip(first.chunk(self.groups), second.chunk(self.groups), strict=True)
        return torch.stack([nt_xent(*group, temperature=temperature) for group in groups]).mean()

    def _embed(self, view: Tensor) -> Tensor:
        return F.normalize(self.projector(self.backbone(view)).float(), dim=1)  # z: (batch, dim)


def nt_xent(
    first: Tensor,
    second: Tensor,
    *,
    temperature: float,
    everyone: tuple[Tensor, Tensor] | None = None,
    start: int = 0,
) -> Tensor:
    """Return the cross-entropy of finding each view's partner among all other views (eq. 1), mean over 2 * batch.

    `first` and `second` are (batch, dim) with unit rows. `everyone` has the views of all processes, which are then the
    candidates; `first` and `second` are its rows from `start` on.
    """
    all_first, all_second = everyone or (first, second)
    total = len(all_first)
    logits = torch.cat([first, second]) @ torch.cat([all_first, all_second]).T / temperature  # (2 batch, 2 total)
    place = start + torch.arange(len(first), device=first.device)
    itself, partner = torch.cat([place, place + total]), torch.cat([place + total, place])
    return F.cross_entropy(logits.scatter(1, itself[:, None], -torch.inf), partner)
