"""PID: parametric instance discrimination (Exemplar-CNN, Dosovitskiy et al., 2014), https://arxiv.org/abs/1406.6909.

Classification with one class, and one trained class vector, per image. PIC (Cao et al., 2020,
https://arxiv.org/abs/2006.14618) adds a projector and uses cosines as logits.
"""

from typing import Literal, Self

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import PositiveFloat, PositiveInt, model_validator
from torch import Tensor, nn

from ssl_core.blocks.cutmix import Mixed, cutmix
from ssl_core.blocks.instance_softmax import instance_loss, instance_softmax
from ssl_core.data.batch import Batch
from ssl_core.data.views import POLICIES, Augmentation, View, Views
from ssl_core.methods.base import Losses, Method, MethodConfig, Preset, Progress, full_precision
from ssl_core.networks.backbones import Network
from ssl_core.networks.heads import mlp


class Config(MethodConfig):
    """Defaults: those of Cao & Wu's other baselines, since theirs for PID are not published (docs/sources.md#pid)."""

    name: Literal["pid"] = "pid"
    preset: Literal["pid", "pic"] = "pid"
    head: Literal["none", "linear", "mlp"] = "none"  # none: class vectors have the width of the backbone's features
    projector_hidden: PositiveInt = 2048  # of the mlp
    embedding_dim: PositiveInt = 128  # of linear and mlp (PIC)
    cosine: bool = False  # PIC: unit features and class vectors
    temperature: PositiveFloat = 1.0
    bias: bool = False  # one number per class, added to its logit
    weight_init: PositiveFloat | None = None  # standard deviation, 0.01 in PIC; None is nn.Linear's
    # Weight decay shrinks every class vector at every step, including those of images outside the batch.
    decay_weights: bool = True
    cutmix: PositiveFloat | None = None  # alpha; 0.5 in Cao's code for 2040 images
    area: tuple[float, float] = (0.2, 1.0)
    augmentation: Augmentation = POLICIES["contrastive_no_blur"]

    @model_validator(mode="after")
    def _cosine_has_no_bias(self) -> Self:
        if self.cosine and self.bias:
            raise ValueError("found cosine: true and bias: true, but a cosine has no bias: set one of them")
        return self


PRESETS = {
    "pid": Preset(
        method={},
        training={
            "optimizer": "sgd", "learning_rate": 0.1, "learning_rate_scaling": "none", "weight_decay": 1e-4,
            "batch_size": 512, "epochs": 400, "warmup_epochs": 0, "schedule_unit": "epoch",
        },
        source="chosen here: as Cao & Wu's other baselines (docs/sources.md#pid)",
    ),
    "pic": Preset(  # without its sliding window, an order of the data that repeats images soon (docs/sources.md#pid)
        method={
            "head": "mlp", "cosine": True, "temperature": 0.2, "weight_init": 0.01, "area": (0.08, 1.0),
            "augmentation": {"policy": "contrastive"},
        },
        training={
            "optimizer": "sgd", "learning_rate": 0.03, "weight_decay": 1e-4, "batch_size": 256, "epochs": 200,
            "warmup_epochs": 0,
        },
        source="PIC's code without its sliding window (docs/sources.md#pid)",
    ),
}  # fmt: skip


class PID(Method):
    """A network and one trained class vector per training image."""

    Config = Config

    def __init__(self, config: Config, backbone: Network, *, num_images: int, batch_size: int, seed: int) -> None:
        super().__init__(config, backbone, num_images=num_images, batch_size=batch_size, seed=seed)
        self.config = config
        hidden = [config.projector_hidden] if config.head == "mlp" else []
        dim = backbone.num_features if config.head == "none" else config.embedding_dim
        self.projector = (
            nn.Identity() if config.head == "none" else mlp([backbone.num_features, *hidden, dim], batch_norm=False)
        )
        weights = torch.empty(num_images, dim + config.bias)  # the bias is the weight of a constant feature 1
        if config.weight_init is None:
            nn.init.uniform_(weights, -(dim**-0.5), dim**-0.5)
        else:
            nn.init.normal_(weights, std=config.weight_init)
        self.weights = nn.Parameter(weights)
        self.undecayed = () if config.decay_weights else ("weights",)

    @staticmethod
    def views(config: Config, image_size: int) -> Views:
        """Return a single view; experiments may set a larger count."""
        return {"student": View(size=image_size, area=config.area, augmentation=config.augmentation)}

    def forward(self, batch: Batch, progress: Progress) -> Losses:
        """Return the cross-entropy over all images, averaged over the views."""
        generator = np.random.default_rng([self.seed, progress.step, progress.part])  # the same in all processes
        losses, embeddings, hits = [], [], []
        for images in batch.views["student"]:
            mixed = cutmix(images, alpha=self.config.cutmix, generator=generator)
            embedding = self.projector(self.backbone(mixed.images)).float()  # (batch, dim)
            with full_precision(embedding):
                loss, is_nearest = self._classify(embedding, batch.indices, mixed)
            losses.append(loss)
            hits.append(is_nearest)
            embeddings.append(embedding.detach())
        total = torch.stack(losses).mean()
        top1 = 100 * torch.cat(hits).mean()
        return Losses(total, {"instance": total.detach()}, embedding=embeddings[0], measures={"instance/top1": top1})

    def _classify(self, embedding: Tensor, indices: Tensor, mixed: Mixed) -> tuple[Tensor, Tensor]:
        """Return the cross-entropy, and 1 for each image whose own class is the most probable one (batch,)."""
        weights = self.weights
        if self.config.cosine:
            embedding, weights = F.normalize(embedding, dim=1), F.normalize(weights, dim=1)
        if self.config.bias:
            embedding = F.pad(embedding, (0, 1), value=1.0)
        temperature = self.config.temperature
        softmax = instance_softmax(embedding, weights, temperature=temperature, own=indices)
        loss = instance_loss(softmax, embedding, weights[indices], temperature=temperature, mixed=mixed)
        return loss, softmax.is_nearest
