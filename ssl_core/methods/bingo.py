"""BINGO: bags of instances for self-supervised distillation (Xu et al., 2022), https://arxiv.org/abs/2107.01691.

A frozen teacher groups each image with its nearest images in a bag. The student learns to find the teacher's embeddings
of the image and of one image of its bag, from either of the two and from their CutMix.
"""

from collections.abc import Sequence
from typing import Any, Literal, Self

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field, PositiveFloat, PositiveInt
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from ssl_core.blocks import distributed
from ssl_core.blocks.cutmix import cutmix_pairs
from ssl_core.blocks.frozen_teacher import Distilled, FrozenTeacher, Teacher
from ssl_core.blocks.losses import info_nce
from ssl_core.blocks.momentum import shuffled_embedding
from ssl_core.blocks.queue import Queue, check_queue_size
from ssl_core.data.batch import Batch
from ssl_core.data.views import POLICIES, Augmentation, View, Views
from ssl_core.methods.base import Losses, Memory, Method, MethodConfig, Preset, Progress, full_precision
from ssl_core.networks.backbones import Network
from ssl_core.networks.heads import mlp


class Config(MethodConfig):
    """Defaults: the code's (docs/sources.md#bingo)."""

    name: Literal["bingo"] = "bingo"
    preset: Literal["paper"] = "paper"
    teacher: Teacher
    bag_size: PositiveInt = 5  # nearest images of each image, without the image itself
    temperature: PositiveFloat = 0.2
    queue_size: PositiveInt = 65536
    # Share of the run in which the queries of an image have its own key alone: the epochs 0 to 10 of 200.
    own_keys: float = Field(default=0.055, ge=0, le=1)
    cutmix_alpha: PositiveFloat = 2.0
    # Mode of the teacher's BatchNorm; train: its embeddings depend on the batch, which is shuffled as in MoCo.
    teacher_mode: Literal["train", "eval"] = "train"
    projector_hidden: PositiveInt = 2048
    batchnorm_splits: PositiveInt = 8  # the code trains on eight GPUs without synchronisation
    area: tuple[float, float] = (0.2, 1.0)
    augmentation: Augmentation = POLICIES["contrastive"]


PRESETS = {
    "paper": Preset(
        method={},
        training={
            "optimizer": "sgd", "learning_rate": 0.03, "learning_rate_scaling": "none", "weight_decay": 1e-4,
            "batch_size": 256, "epochs": 200, "warmup_epochs": 0, "schedule_unit": "epoch",
        },
        source="BINGO, paper and code (docs/sources.md#bingo)",
    ),
}  # fmt: skip


class BINGO(Distilled, Method):
    """Student, frozen teacher, and a queue of the teacher's past embeddings of images, without those of neighbours."""

    Config = Config
    fixed_views = ("query", "key", "neighbour_query", "neighbour_key")

    def __init__(self, config: Config, backbone: Network, *, num_images: int, batch_size: int, seed: int) -> None:
        super().__init__(config, backbone, num_images=num_images, batch_size=batch_size, seed=seed)
        check_queue_size(config.queue_size, num_images)
        self.config = config
        teacher = FrozenTeacher(config.teacher)
        self.projector = mlp([backbone.num_features, config.projector_hidden, teacher.dim], batch_norm=False)
        if config.teacher_mode == "train":
            self.teacher = teacher  # before the split, which then includes its BatchNorm
        self.split_batchnorm(config.batchnorm_splits)
        self.teacher = teacher
        self.queue = Queue(config.queue_size, teacher.dim)
        self.train()

    @staticmethod
    def views(config: Config, image_size: int) -> Views:
        """Return a view for the query and one for the key, of the image and of its neighbour."""
        shared: Any = {"size": image_size, "area": config.area, "augmentation": config.augmentation}
        query, key = View(seen_by=("student",), **shared), View(seen_by=("teacher",), **shared)
        return {"query": query, "key": key, "neighbour_query": query, "neighbour_key": key}

    def train(self, mode: bool = True) -> Self:
        """Set the mode of the student and, with `teacher_mode: train`, of the teacher's BatchNorm."""
        super().train(mode)
        for layer in self.teacher.modules():
            if isinstance(layer, _BatchNorm):
                layer.train(mode and self.config.teacher_mode == "train")
        return self

    def forward(self, batch: Batch, progress: Progress) -> Losses:
        """Return the loss of finding the keys of an image and of its neighbour from their queries and their CutMix."""
        (image,), (neighbour,) = batch.views["query"], batch.views["neighbour_query"]
        generator = np.random.default_rng([self.seed, progress.step, progress.part])  # the same in all processes
        mixed, share = cutmix_pairs(image, neighbour, alpha=self.config.cutmix_alpha, generator=generator)
        queries = [self._query(view) for view in (image, neighbour, mixed)]
        keys = [self._key(batch.views[group][0], progress.step) for group in ("key", "neighbour_key")]
        across = 0.0 if progress.fraction < self.config.own_keys else 0.5
        with full_precision(queries[0]):
            bag, cut = bingo_loss(
                queries, keys, self.queue.rows, across=across, share=share, temperature=self.config.temperature
            )
        parts = {"bag": bag.detach(), "cutmix": cut.detach()}
        return Losses((bag + cut) / 3, parts, embedding=queries[0].detach(), memory={"keys": keys[0]})

    def _query(self, view: Tensor) -> Tensor:
        return F.normalize(self.projector(self.backbone(view)).float(), dim=1)  # q: (batch, dim)

    def _key(self, view: Tensor, step: int) -> Tensor:
        splits = self.config.batchnorm_splits if self.config.teacher_mode == "train" else 1
        return shuffled_embedding(self.teacher, view, splits=splits, seed=self.seed, step=step)  # k: (batch, dim)

    @torch.no_grad()
    def after_step(self, progress: Progress, memories: Sequence[Memory]) -> None:
        """Put the keys of this step's images into the queue."""
        for memory in memories:
            self.queue.enqueue(distributed.gather(memory["keys"]))


def bingo_loss(
    queries: Sequence[Tensor],
    keys: Sequence[Tensor],
    queue: Tensor,
    *,
    across: float,
    share: float,
    temperature: float,
) -> tuple[Tensor, Tensor]:
    """Return the sums of InfoNCE over the queries of image and neighbour, and of their CutMix, means over the batch.

    `queries` are those of image, neighbour and CutMix, `keys` those of image and neighbour, each (batch, dim), `queue`
    is (size, dim), all with unit rows. The weight of the other image's key is `across`, that of the own key 1 -
    `across`. The key of the image counts for CutMix as its `share` of the pixels.
    """

    def contrast(query: Tensor, weights: Sequence[float]) -> Tensor:
        terms = [
            weight * info_nce(query, key.detach(), queue, temperature=temperature)
            for key, weight in zip(keys, weights, strict=True)
            if weight > 0
        ]
        return torch.stack(terms).sum()

    image, neighbour, mixed = queries
    own = 1 - across
    bag = contrast(image, (own, across)) + contrast(neighbour, (across, own))
    return bag, contrast(mixed, (share, 1 - share))
