"""JigClu: jigsaw clustering with a single batch (Chen et al., 2021), https://arxiv.org/abs/2104.00323.

The patches of a batch are shuffled into montages of four, so that one forward pass covers four patches of each image.
The network clusters the patches of the same image and classifies the corner of each patch.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field, PositiveFloat, PositiveInt
from torch import Tensor, nn

from ssl_core.blocks import distributed
from ssl_core.data.batch import Batch
from ssl_core.data.views import POLICIES, Augmentation, View, Views
from ssl_core.methods.base import Losses, Method, MethodConfig, Preset, Progress, full_precision
from ssl_core.networks.backbones import Network
from ssl_core.networks.families import feature_map, pooled_features
from ssl_core.networks.heads import mlp, quadrants

CORNERS = ("top_left", "top_right", "bottom_left", "bottom_right")


class Config(MethodConfig):
    """Defaults: the paper's, with the temperature of the repository's README (docs/sources.md#jigclu)."""

    name: Literal["jigclu"] = "jigclu"
    preset: Literal["small", "official"] = "small"
    temperature: PositiveFloat = 0.3  # the code's default is 0.07
    base_temperature: PositiveFloat = 0.07  # the clustering loss is multiplied by temperature / base_temperature
    cluster_weight: float = Field(default=1.0, ge=0)
    location_weight: float = Field(default=1.0, ge=0)
    overlap: float = Field(default=0.3, ge=0, le=0.5)  # of a patch beyond the middle, share of the side
    embedding_dim: PositiveInt = 128
    area: tuple[float, float] = (0.2, 1.0)  # of a patch
    augmentation: Augmentation = POLICIES["contrastive"]


_TRAINING = {
    "optimizer": "sgd", "learning_rate": 0.03, "weight_decay": 1e-4, "batch_size": 256, "warmup_epochs": 0,
    "schedule_unit": "epoch",
}  # fmt: skip
PRESETS = {
    # Cao & Wu report 400 epochs on CIFAR and no other setting; their other methods use no blur there.
    "small": Preset(
        method={"augmentation": "contrastive_no_blur"},
        training={**_TRAINING, "epochs": 400},
        source="chosen here: JigClu's code without blur, Cao & Wu's 400 epochs (docs/sources.md#jigclu)",
    ),
    "official": Preset(
        method={},
        training={**_TRAINING, "epochs": 200},
        source="JigClu, paper and README (docs/sources.md#jigclu)",
    ),
}


class JigClu(Method):
    """A backbone on montages, with a head for clusters and one for locations."""

    Config = Config
    fixed_views = CORNERS
    order_matters = True  # the order decides which patches share a montage

    def __init__(self, config: Config, backbone: Network, *, num_images: int, batch_size: int, seed: int) -> None:
        super().__init__(config, backbone, num_images=num_images, batch_size=batch_size, seed=seed)
        self.config = config
        width = backbone.num_features
        self.projector = mlp([width, width, config.embedding_dim], batch_norm=False)
        self.locator = nn.Linear(width, len(CORNERS))

    @staticmethod
    def views(config: Config, image_size: int) -> Views:
        """Return the four overlapping corners of the image, each at half its size and with a separate augmentation."""
        first, last = (0.0, 0.5 + config.overlap), (0.5 - config.overlap, 1.0)
        spans = [(first, first), (last, first), (first, last), (last, last)]  # (left and right, top and bottom)
        return {
            corner: View(
                size=image_size // 2,
                region=(left, top, right, bottom),
                area=config.area,
                augmentation=config.augmentation,
            )
            for corner, ((left, right), (top, bottom)) in zip(CORNERS, spans)
        }

    def forward(self, batch: Batch, progress: Progress) -> Losses:
        """Return the clustering and the location loss over the montages of this process."""
        patches = [batch.views[corner][0] for corner in CORNERS]
        total = len(patches[0]) * distributed.world_size()
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + progress.step)
        order = torch.randperm(4 * total, generator=generator).view(4, -1)  # slot, montage
        order = order.to(patches[0].device, non_blocking=True)
        own = slice(distributed.rank() * len(patches[0]), (distributed.rank() + 1) * len(patches[0]))
        cells = quadrants(feature_map(self.backbone, montage(patches, order[:, own])))
        features = pooled_features(self.backbone, cells)  # (4 * batch, width), slot by slot
        embedding = F.normalize(self.projector(features).float(), dim=1)
        images = distributed.gather((order[:, own] % total).flatten())
        location = self.locator(features).float()
        with full_precision(embedding):
            cluster = clustering_loss(
                distributed.gather_with_gradient(embedding),
                images,
                temperature=self.config.temperature,
                base_temperature=self.config.base_temperature,
            )
            locate = F.cross_entropy(location, (order[:, own] // total).flatten())
            loss = self.config.cluster_weight * cluster + self.config.location_weight * locate
        return Losses(loss, {"cluster": cluster.detach(), "location": locate.detach()}, embedding.detach())


@torch.no_grad()
def montage(patches: list[Tensor], order: Tensor) -> Tensor:
    """Return montages (batch, 3, 2 * size, 2 * size) of four patches each.

    `patches` has one tensor (batch, 3, size, size) per corner. `order` (4, batch) has, for each slot of each montage,
    the position of a patch among the patches of all processes, corner by corner.
    """
    everyone = torch.cat([distributed.gather(corner) for corner in patches])
    top_left, top_right, bottom_left, bottom_right = (everyone[slot] for slot in order)
    top, bottom = torch.cat([top_left, top_right], dim=3), torch.cat([bottom_left, bottom_right], dim=3)
    return torch.cat([top, bottom], dim=2).contiguous(memory_format=torch.channels_last)


def clustering_loss(embedding: Tensor, images: Tensor, *, temperature: float, base_temperature: float = 0.07) -> Tensor:
    """Return the supervised contrastive loss with the image as the class (eq. 2), mean over patches.

    `embedding` is (patches, dim) with unit rows, `images` (patches,) the index of each patch's image. A patch is not
    its own candidate. As in the code of supervised contrastive learning, the loss is scaled by
    temperature / base_temperature.
    """
    itself = torch.eye(len(embedding), dtype=torch.bool, device=embedding.device)
    logits = (embedding @ embedding.T / temperature).masked_fill(itself, -torch.inf)
    positive = (images[:, None] == images[None, :]) & ~itself
    likelihood = F.log_softmax(logits, dim=1).masked_fill(~positive, 0).sum(dim=1) / positive.sum(dim=1)
    return -temperature / base_temperature * likelihood.mean()
