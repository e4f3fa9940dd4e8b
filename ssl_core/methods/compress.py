"""CompRess: a teacher's similarities to a queue (Koohpayegani et al., 2020), https://arxiv.org/abs/2010.14713.

The similarities of an image to the images of a queue are distributed alike for the frozen teacher and the student, each
in its own features. The student's queue holds features of its moving average. There is no projector.
"""

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import PositiveFloat, PositiveInt
from torch import Tensor

from ssl_core.blocks import distributed
from ssl_core.blocks.frozen_teacher import Distilled, FrozenTeacher, Teacher, one_view
from ssl_core.blocks.momentum import MomentumTeacher
from ssl_core.blocks.queue import Queue
from ssl_core.data.batch import Batch
from ssl_core.data.views import POLICIES, Augmentation, Probability, Views
from ssl_core.methods.base import Losses, Memory, Method, MethodConfig, Preset, Progress, full_precision
from ssl_core.networks.backbones import Network


class Config(MethodConfig):
    """Defaults: the paper's (docs/sources.md#compress)."""

    name: Literal["compress"] = "compress"
    preset: Literal["paper"] = "paper"
    teacher: Teacher
    student_temperature: PositiveFloat = 0.04
    teacher_temperature: PositiveFloat = 0.04
    queue_size: PositiveInt = 128000
    key_momentum: Probability = 0.999  # of the student's moving average, which makes the keys
    area: tuple[float, float] = (0.08, 1.0)
    augmentation: Augmentation = POLICIES["weak"]


PRESETS = {
    "paper": Preset(
        method={},
        training={
            "optimizer": "sgd", "learning_rate": 0.01, "learning_rate_scaling": "none", "weight_decay": 1e-4,
            "batch_size": 256, "epochs": 130, "warmup_epochs": 0, "schedule": "step", "milestones": (90, 120),
            "decay_factor": 0.2,
        },
        source="CompRess, paper and code (docs/sources.md#compress)",
    ),
}  # fmt: skip


class CompRess(Distilled, Method):
    """Student and its moving average, frozen teacher, and two queues with features of the same images."""

    Config = Config
    fixed_views = ("both",)

    def __init__(self, config: Config, backbone: Network, *, num_images: int, batch_size: int, seed: int) -> None:
        super().__init__(config, backbone, num_images=num_images, batch_size=batch_size, seed=seed)
        self.config = config
        self.teacher = FrozenTeacher(config.teacher)
        self.keys = MomentumTeacher(self.backbone, momentum=config.key_momentum)
        self.queue = Queue(config.queue_size, backbone.num_features)
        self.teacher_queue = Queue(config.queue_size, self.teacher.dim)

    @staticmethod
    def views(config: Config, image_size: int) -> Views:
        """Return a single view for all networks."""
        return one_view(image_size, config.area, config.augmentation, seen_by=("student", "keys", "teacher"))

    def forward(self, batch: Batch, progress: Progress) -> Losses:
        """Return the divergence of the student's similarities to the queue from the teacher's."""
        (view,) = batch.views["both"]
        student = F.normalize(self.backbone(view).float(), dim=1)  # (batch, d)
        teacher = F.normalize(self.teacher(view), dim=1)  # (batch, dim)
        with torch.no_grad():
            keys = F.normalize(self.keys(view).float(), dim=1)
        with full_precision(student):
            loss = compress_loss(
                student @ self.queue.rows.T / self.config.student_temperature,
                teacher @ self.teacher_queue.rows.T / self.config.teacher_temperature,
            )
        return Losses(loss, {}, embedding=student.detach(), memory={"keys": keys, "teacher": teacher})

    @torch.no_grad()
    def after_step(self, progress: Progress, memories: Sequence[Memory]) -> None:
        """Put the features of this step into both queues, then move the average towards the student."""
        for memory in memories:
            self.queue.enqueue(distributed.gather(memory["keys"]))
            self.teacher_queue.enqueue(distributed.gather(memory["teacher"]))
        self.keys.update(self.backbone, fraction=progress.fraction)


def compress_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Return KL(softmax(teacher) || softmax(student)) of logits (batch, size), mean over the batch (eq. 1 and 2)."""
    target = F.log_softmax(teacher.detach(), dim=1)
    return F.kl_div(F.log_softmax(student, dim=1), target, reduction="batchmean", log_target=True)
