"""DisCo: distilled contrastive learning (Gao et al., 2022), https://arxiv.org/abs/2104.09124.

MoCo v2 on the student, and its embedding of each view is also drawn to the frozen teacher's embedding of that view. The
student's head is as wide as the teacher's.
"""

from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import PositiveFloat, PositiveInt
from torch import Tensor

from ssl_core.blocks import distributed
from ssl_core.blocks.frozen_teacher import Distilled, FrozenTeacher, Teacher
from ssl_core.blocks.losses import info_nce
from ssl_core.blocks.momentum import MomentumTeacher, shuffled_embedding
from ssl_core.blocks.queue import Queue, check_queue_size
from ssl_core.data.batch import Batch
from ssl_core.data.views import POLICIES, Augmentation, Probability, View, Views
from ssl_core.methods.base import Losses, Memory, Method, MethodConfig, Preset, Progress, full_precision
from ssl_core.networks.backbones import Network
from ssl_core.networks.heads import mlp


class Config(MethodConfig):
    """Defaults: the paper's (docs/sources.md#disco)."""

    name: Literal["disco"] = "disco"
    preset: Literal["paper"] = "paper"
    teacher: Teacher
    temperature: PositiveFloat = 0.2
    queue_size: PositiveInt = 65536
    key_momentum: Probability = 0.999  # of the student's moving average, which makes the keys
    # The code sums squared distances over the images of a process, 256 / 8, and adds InfoNCE's mean.
    distillation_weight: PositiveFloat = 32.0
    projector_hidden: PositiveInt = 2048
    batchnorm_splits: PositiveInt = 8  # as in MoCo
    area: tuple[float, float] = (0.2, 1.0)
    augmentation: Augmentation = POLICIES["contrastive"]


PRESETS = {
    "paper": Preset(
        method={},
        training={
            "optimizer": "sgd", "learning_rate": 0.03, "learning_rate_scaling": "none", "weight_decay": 1e-4,
            "batch_size": 256, "epochs": 200, "warmup_epochs": 0, "schedule_unit": "epoch",
        },
        source="DisCo, paper and code (docs/sources.md#disco)",
    ),
}  # fmt: skip


class DisCo(Distilled, Method):
    """Student and its moving average, a queue of the average's past embeddings, and the frozen teacher."""

    Config = Config
    fixed_views = ("query", "key")

    def __init__(self, config: Config, backbone: Network, *, num_images: int, batch_size: int, seed: int) -> None:
        super().__init__(config, backbone, num_images=num_images, batch_size=batch_size, seed=seed)
        check_queue_size(config.queue_size, num_images)
        self.config = config
        teacher = FrozenTeacher(config.teacher)
        self.projector = mlp([backbone.num_features, config.projector_hidden, teacher.dim], batch_norm=False)
        self.split_batchnorm(config.batchnorm_splits)
        self.keys = MomentumTeacher(self.backbone, self.projector, momentum=config.key_momentum)
        self.teacher = teacher
        self.queue = Queue(config.queue_size, teacher.dim)

    @staticmethod
    def views(config: Config, image_size: int) -> Views:
        """Return one view for query and one for key; student and teacher see both."""
        shared: Any = {"size": image_size, "area": config.area, "augmentation": config.augmentation}
        return {
            "query": View(seen_by=("student", "teacher"), **shared),
            "key": View(seen_by=("student", "keys", "teacher"), **shared),
        }

    def forward(self, batch: Batch, progress: Progress) -> Losses:
        """Return InfoNCE of query and key, and the student's distances to the teacher for both views."""
        (first,), (second,) = batch.views["query"], batch.views["key"]
        query, other = self._students(first), self._students(second)
        key = self._key(second, progress.step)
        targets = [F.normalize(self.teacher(view), dim=1) for view in (first, second)]
        with full_precision(query):
            contrast = info_nce(query, key, self.queue.rows, temperature=self.config.temperature)
            distillation = squared_distance(query, targets[0]) + squared_distance(other, targets[1])
            total = contrast + self.config.distillation_weight * distillation
        parts = {"contrast": contrast.detach(), "distillation": distillation.detach()}
        return Losses(total, parts, embedding=query.detach(), memory={"keys": key})

    def _students(self, view: Tensor) -> Tensor:
        return F.normalize(self.projector(self.backbone(view)).float(), dim=1)  # (batch, dim)

    def _key(self, view: Tensor, step: int) -> Tensor:
        splits = self.config.batchnorm_splits
        return shuffled_embedding(self.keys, view, splits=splits, seed=self.seed, step=step)  # k: (batch, dim)

    @torch.no_grad()
    def after_step(self, progress: Progress, memories: Sequence[Memory]) -> None:
        """Move the average towards the student and put the keys of this step into the queue."""
        self.keys.update(self.backbone, self.projector, fraction=progress.fraction)
        for memory in memories:
            self.queue.enqueue(distributed.gather(memory["keys"]))


def squared_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the squared distance of rows (batch, dim), summed over dimensions, mean over the batch."""
    return (student - teacher.detach()).square().sum(dim=1).mean()
