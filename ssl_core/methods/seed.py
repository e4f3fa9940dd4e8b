"""SEED: self-supervised distillation (Fang et al., 2021), https://arxiv.org/abs/2101.04731.

A small student learns a frozen, larger teacher's similarities of an image to itself and to a queue of other images.
Both see the same view. Shi et al. initialise their MoCo with the resulting backbone.
"""

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import PositiveFloat, PositiveInt
from torch import Tensor

from ssl_core.blocks import distributed
from ssl_core.blocks.frozen_teacher import Distilled, FrozenTeacher, Teacher, one_view
from ssl_core.blocks.queue import Queue
from ssl_core.data.batch import Batch
from ssl_core.data.views import POLICIES, Augmentation, Views
from ssl_core.methods.base import Losses, Memory, Method, MethodConfig, Preset, Progress, full_precision
from ssl_core.networks.backbones import Network
from ssl_core.networks.heads import mlp


class Config(MethodConfig):
    """Defaults: the paper's (docs/sources.md#seed)."""

    name: Literal["seed"] = "seed"
    preset: Literal["paper", "code"] = "paper"
    teacher: Teacher
    student_temperature: PositiveFloat = 0.2
    teacher_temperature: PositiveFloat = 0.01
    queue_size: PositiveInt = 65536
    area: tuple[float, float] = (0.2, 1.0)
    augmentation: Augmentation = POLICIES["contrastive"]


_TRAINING = {
    "optimizer": "sgd", "learning_rate": 0.03, "weight_decay": 1e-4, "batch_size": 256, "epochs": 200,
    "warmup_epochs": 5,
}  # fmt: skip
PRESETS = {
    "paper": Preset(
        method={},
        training=_TRAINING,
        source="SEED, paper (docs/sources.md#seed)",
    ),
    "code": Preset(
        method={"teacher_temperature": 1e-4},
        training=_TRAINING,
        source="SEED's code (docs/sources.md#seed)",
    ),  # an almost one-hot target
}


class SEED(Distilled, Method):
    """Student, frozen teacher, and a queue of the teacher's past embeddings."""

    Config = Config
    fixed_views = ("both",)

    def __init__(self, config: Config, backbone: Network, *, num_images: int, batch_size: int, seed: int) -> None:
        super().__init__(config, backbone, num_images=num_images, batch_size=batch_size, seed=seed)
        self.config = config
        self.teacher = FrozenTeacher(config.teacher)
        self.projector = mlp([backbone.num_features, backbone.num_features, self.teacher.dim], batch_norm=False)
        self.queue = Queue(config.queue_size, self.teacher.dim)

    @staticmethod
    def views(config: Config, image_size: int) -> Views:
        """Return a single view for both networks."""
        return one_view(image_size, config.area, config.augmentation)

    def forward(self, batch: Batch, progress: Progress) -> Losses:
        """Return the loss over the teacher's embedding of each image and the queue of earlier batches."""
        (view,) = batch.views["both"]
        student = F.normalize(self.projector(self.backbone(view)).float(), dim=1)  # (batch, dim)
        teacher = F.normalize(self.teacher(view), dim=1)
        with full_precision(student):
            loss = seed_loss(
                student,
                teacher,
                self.queue.rows,
                student_temperature=self.config.student_temperature,
                teacher_temperature=self.config.teacher_temperature,
            )
        return Losses(loss, {}, embedding=student.detach(), memory={"keys": teacher})

    @torch.no_grad()
    def after_step(self, progress: Progress, memories: Sequence[Memory]) -> None:
        """Put the teacher's embeddings of this step into the queue."""
        for memory in memories:
            self.queue.enqueue(distributed.gather(memory["keys"]))


def seed_loss(
    student: Tensor, teacher: Tensor, queue: Tensor, *, student_temperature: float, teacher_temperature: float
) -> Tensor:
    """Return the cross-entropy of the student's and the teacher's similarities (eq. 5), mean over the batch.

    The similarities are to the teacher's embedding of the same image, in column 0, and to the queue. `student` and
    `teacher` are (batch, dim), `queue` (size, dim), all with unit rows; no gradient reaches the teacher.
    """
    teacher = teacher.detach()
    own, learned = (teacher * teacher).sum(dim=1, keepdim=True), (student * teacher).sum(dim=1, keepdim=True)
    target = F.softmax(torch.cat([own, teacher @ queue.T], dim=1) / teacher_temperature, dim=1)  # (batch, 1 + size)
    prediction = F.log_softmax(torch.cat([learned, student @ queue.T], dim=1) / student_temperature, dim=1)
    return -(target * prediction).sum(dim=1).mean()
