"""LeJEPA with SIGReg (Balestriero & LeCun, 2025), https://arxiv.org/abs/2511.08544.

All views of an image move towards the mean of its global views. Sketched isotropic Gaussian regularization (SIGReg)
prevents collapse: on random directions the embeddings of a batch must have the distribution of a standard Gaussian,
measured by their characteristic function. There are no negatives, no memory and no teacher.
"""

from collections.abc import Mapping
from typing import Literal

import torch
from pydantic import Field, PositiveFloat, PositiveInt
from torch import Tensor

from ssl_core.blocks import distributed
from ssl_core.blocks.multicrop import MultiCrop, encode, local_views
from ssl_core.data.batch import Batch
from ssl_core.data.views import Augmentation, View, Views
from ssl_core.methods.base import Losses, Method, MethodConfig, Preset, Progress, full_precision
from ssl_core.networks.backbones import Network
from ssl_core.networks.heads import mlp


class Config(MultiCrop, MethodConfig):
    """Defaults: the README's loss on the two global views alone (docs/sources.md#lejepa)."""

    name: Literal["lejepa"] = "lejepa"
    preset: Literal["small", "resnet", "vit", "minimal"] = "small"
    gaussian_weight: float = Field(default=0.05, gt=0, lt=1)  # lambda: the share of SIGReg in the loss
    num_directions: PositiveInt = 1024
    num_points: int = Field(default=17, ge=2)  # of the integral over frequencies from 0 to max_frequency
    max_frequency: PositiveFloat = 3.0
    num_globals: PositiveInt = 2
    projector_layers: PositiveInt = 3
    projector_hidden: PositiveInt = 2048
    embedding_dim: PositiveInt = 64
    area: tuple[float, float] = (0.3, 1.0)
    augmentation: Augmentation = Augmentation.model_validate({"policy": "byol_first", "blur": 0.5, "solarize": 0.2})

    def ineffective(self) -> Mapping[str, str]:
        """Return `alpha` of other methods with local views."""
        return {"alpha": "every view has the same weight; leave it out"}


_SIX_LOCALS = {"num_locals": 6, "local_area": (0.05, 0.3)}
_ADAMW = {
    "optimizer": "adamw", "learning_rate": 5e-4, "learning_rate_scaling": "none", "minimum_learning_rate": 5e-7,
    "warmup_epochs": 1,
}  # fmt: skip

PRESETS = {
    "small": Preset(
        method={"area": (0.08, 1.0), "augmentation": {"policy": "byol_first", "blur": 0.0, "solarize": 0.2}},
        training={**_ADAMW, "weight_decay": 5e-4, "batch_size": 256, "epochs": 200},
        source="chosen here: solo-learn's views, LeJEPA's optimisation for ResNets (docs/sources.md#lejepa)",
        networks="convolutional",
    ),
    "resnet": Preset(
        method={**_SIX_LOCALS, "local_size": 98},
        training={**_ADAMW, "weight_decay": 5e-4, "batch_size": 256, "epochs": 100},
        source="LeJEPA, README, ResNets (docs/sources.md#lejepa)", networks="convolutional",
    ),
    "vit": Preset(
        method={**_SIX_LOCALS, "local_size": 96},  # the README's 98 pixels are for patches of 14
        training={**_ADAMW, "weight_decay": 0.05, "batch_size": 256, "epochs": 100},
        source="LeJEPA, README, vision transformers (docs/sources.md#lejepa)", networks="transformer",
    ),
    "minimal": Preset(  # 90.7 % linear accuracy on Imagenette with ViT-S/8 at 128 px, according to its page
        method={
            "gaussian_weight": 0.02, "num_directions": 256, "num_globals": 4, "embedding_dim": 16, "area": (0.08, 1.0),
            "augmentation": {"policy": "simclr", "solarize": 0.2},
        },
        training={
            **_ADAMW, "learning_rate": 2e-3, "minimum_learning_rate": 1e-3, "weight_decay": 0.05, "batch_size": 256,
            "epochs": 800,
        },
        source="LeJEPA, minimal example on Imagenette (docs/sources.md#lejepa)", networks="transformer", drop_path=0.1,
    ),
}  # fmt: skip


class LeJEPA(Method):
    """A backbone and a projector; global and local views of each image."""

    Config = Config
    fixed_views = ("global",)

    def __init__(self, config: Config, backbone: Network, *, num_images: int, batch_size: int, seed: int) -> None:
        super().__init__(config, backbone, num_images=num_images, batch_size=batch_size, seed=seed)
        if config.num_globals + config.num_locals < 2:
            raise ValueError("method.num_globals 1 leaves nothing to compare: set it, or num_locals, higher")
        self.config = config
        hidden = [config.projector_hidden] * (config.projector_layers - 1)
        self.projector = mlp([backbone.num_features, *hidden, config.embedding_dim])

    @staticmethod
    def views(config: Config, image_size: int) -> Views:
        """Return the global views and the local ones, all with the same augmentation."""
        global_views = View(
            count=config.num_globals, size=image_size, area=config.area, augmentation=config.augmentation
        )
        return {"global": global_views, **local_views(config, image_size, config.augmentation)}

    def forward(self, batch: Batch, progress: Progress) -> Losses:
        """Return lambda * SIGReg + (1 - lambda) * invariance, SIGReg over the batches of all processes."""
        views = [*batch.views["global"], *batch.views.get("local", [])]
        features = self.projector(encode(self.backbone, views)).float()
        embeddings = features.unflatten(0, (len(views), -1))  # (views, batch, dim)
        with full_precision(features):
            centre = embeddings[: len(batch.views["global"])].mean(dim=0)
            invariance = (embeddings - centre).square().mean()
            gaussian = self._sigreg(embeddings, progress.step)
            share = self.config.gaussian_weight
            total = share * gaussian + (1 - share) * invariance
            parts = {"gaussian": gaussian.detach(), "invariance": invariance.detach()}
            return Losses(total, parts, embedding=embeddings[0].detach())

    def _sigreg(self, embeddings: Tensor, step: int) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + step)
        directions = torch.randn(self.config.embedding_dim, self.config.num_directions, generator=generator)
        directions = (directions / directions.norm(dim=0)).to(embeddings.device, non_blocking=True)
        frequencies = torch.linspace(0, self.config.max_frequency, self.config.num_points, device=embeddings.device)
        return sigreg(embeddings, directions, frequencies)


def sigreg(embeddings: Tensor, directions: Tensor, frequencies: Tensor) -> Tensor:
    """Return the Epps-Pulley statistic of the embeddings on each of the directions, mean over views and directions.

    It is N times the integral of |characteristic function - that of N(0, 1)|^2 * exp(-t^2 / 2) over -T..T, by the
    trapezoidal rule. `embeddings` are (views, batch, dim), `directions` (dim, directions) with unit columns,
    `frequencies` (points,) equally spaced from 0 to T. N counts the batches of all processes.
    """
    angles = (embeddings @ directions)[..., None] * frequencies  # (views, batch, directions, points)
    function = torch.stack([angles.cos().mean(dim=1), angles.sin().mean(dim=1)])  # real and imaginary part
    function = distributed.gather_with_gradient(function[None]).mean(dim=0)  # (2, views, directions, points)
    gaussian = (-frequencies.square() / 2).exp()
    distance = (function[0] - gaussian).square() + function[1].square()
    total = embeddings.shape[1] * distributed.world_size()
    return 2 * total * torch.trapezoid(distance * gaussian, frequencies).mean()  # 2: the integrand is even
