"""SCE: similarity contrastive estimation (Denize et al., 2023), https://arxiv.org/abs/2111.14585.

The student learns a mixture of two targets: the key of its own image, as in InfoNCE, and the momentum teacher's
similarities to a queue of other images, as in ReSSL.
"""

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import PositiveFloat, PositiveInt
from torch import Tensor, nn

from ssl_core.blocks import distributed
from ssl_core.blocks.momentum import MomentumTeacher, shuffled_embedding
from ssl_core.blocks.queue import Queue, check_queue_size
from ssl_core.blocks.two_views import TwoViews, two_views
from ssl_core.data.batch import Batch
from ssl_core.data.views import POLICIES, Augmentation, Probability, Views
from ssl_core.methods.base import Losses, Memory, Method, MethodConfig, Preset, Progress, full_precision
from ssl_core.networks.backbones import Network
from ssl_core.networks.heads import mlp


class Config(TwoViews, MethodConfig):
    """Defaults: the code's configuration for CIFAR-10 (docs/sources.md#sce). The teacher sees the first view."""

    name: Literal["sce"] = "sce"
    preset: Literal["small", "imagenet", "imagenet_100"] = "small"
    contrast_weight: Probability = 0.5  # lambda: the share of the own key in the target
    student_temperature: PositiveFloat = 0.1
    teacher_temperature: PositiveFloat = 0.05
    queue_size: PositiveInt = 4096
    symmetric: bool = False  # both views pass both networks; the mean of the two directions
    projector_layers: PositiveInt = 2
    projector_hidden: PositiveInt = 512
    projector_final_batchnorm: bool = False  # without scale and shift
    predictor_hidden: PositiveInt | None = None  # None: no predictor
    embedding_dim: PositiveInt = 128
    # Parts of the global batch with separate BatchNorm statistics, with the keys shuffled across them.
    batchnorm_splits: PositiveInt = 8
    teacher_momentum: Probability = 0.99
    final_teacher_momentum: Probability | None = None  # at the end of a cosine; None: constant
    first_augmentation: Augmentation = POLICIES["weak"]
    second_augmentation: Augmentation = POLICIES["contrastive"]


_IMAGENET = {
    "teacher_temperature": 0.07, "queue_size": 65536, "symmetric": True, "projector_layers": 3,
    "projector_hidden": 2048, "projector_final_batchnorm": True, "predictor_hidden": 4096, "embedding_dim": 256,
    "batchnorm_splits": 1, "final_teacher_momentum": 1.0, "first_augmentation": "byol_first",
    "second_augmentation": "byol_second",
}  # fmt: skip
_LARS = {"optimizer": "lars", "weight_decay": 1e-6, "batch_size": 4096, "warmup_epochs": 10}

PRESETS = {
    "small": Preset(
        method={},
        training={
            "optimizer": "sgd", "learning_rate": 0.06, "weight_decay": 5e-4, "batch_size": 256, "epochs": 200,
            "warmup_epochs": 5,
        },
        source="SCE's code, CIFAR-10 (docs/sources.md#sce)",
    ),
    "imagenet": Preset(
        method=_IMAGENET, training={**_LARS, "learning_rate": 0.3, "epochs": 200},
        source="SCE's code, ImageNet, 200 epochs (docs/sources.md#sce)", networks="convolutional",
    ),
    "imagenet_100": Preset(
        method=_IMAGENET, training={**_LARS, "learning_rate": 0.6, "epochs": 100},
        source="SCE's code, ImageNet, 100 epochs (docs/sources.md#sce)", networks="convolutional",
    ),
}  # fmt: skip


class SCE(Method):
    """Student, momentum teacher and a queue of the teacher's past embeddings."""

    Config = Config
    fixed_views = ("first", "second")

    def __init__(self, config: Config, backbone: Network, *, num_images: int, batch_size: int, seed: int) -> None:
        super().__init__(config, backbone, num_images=num_images, batch_size=batch_size, seed=seed)
        check_queue_size(config.queue_size, num_images)
        self.config = config
        hidden, dim = [config.projector_hidden] * (config.projector_layers - 1), config.embedding_dim
        self.projector = mlp(
            [backbone.num_features, *hidden, dim],
            bias=False,
            final_batch_norm=config.projector_final_batchnorm,
            final_affine=False,
        )
        self.predictor = nn.Identity()
        if config.predictor_hidden is not None:
            self.predictor = mlp([dim, config.predictor_hidden, dim], bias=False, final_bias=False)
        self.split_batchnorm(config.batchnorm_splits)
        self.teacher = MomentumTeacher(
            self.backbone,
            self.projector,
            momentum=config.teacher_momentum,
            final_momentum=config.final_teacher_momentum,
        )
        self.queue = Queue(config.queue_size, dim)

    @staticmethod
    def views(config: Config, image_size: int) -> Views:
        """Return one view for the teacher and one for the student, or two for both."""
        if config.symmetric:
            return two_views(config, image_size, first=("student", "teacher"), second=("student", "teacher"))
        return two_views(config, image_size, first=("teacher",))

    def forward(self, batch: Batch, progress: Progress) -> Losses:
        """Return the cross-entropy of the student's similarities and the mixed target, mean over directions."""
        (first,), (second,) = batch.views["first"], batch.views["second"]
        students, teachers = [self._learn(second)], [self._teach(first, progress.step)]
        if self.config.symmetric:
            students.append(self._learn(first))
            teachers.append(self._teach(second, progress.step))
        with full_precision(first):
            losses = [self._losses(*pair) for pair in zip(students, teachers, strict=True)]  # (directions, terms)
            contrast, relation = (torch.stack(terms).mean() for terms in zip(*losses, strict=True))
            share = self.config.contrast_weight
            total = share * contrast + (1 - share) * relation
        parts = {"contrast": contrast.detach(), "relation": relation.detach()}
        return Losses(total, parts, embedding=students[0].detach(), memory={"keys": torch.stack(teachers)})

    def _losses(self, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
        return sce_losses(
            student,
            teacher,
            self.queue.rows,
            student_temperature=self.config.student_temperature,
            teacher_temperature=self.config.teacher_temperature,
        )

    def _learn(self, view: Tensor) -> Tensor:
        embedding = self.predictor(self.projector(self.backbone(view)))
        return F.normalize(embedding.float(), dim=1)  # z1: (batch, dim)

    def _teach(self, view: Tensor, step: int) -> Tensor:
        splits = self.config.batchnorm_splits
        return shuffled_embedding(self.teacher, view, splits=splits, seed=self.seed, step=step)  # z2: (batch, dim)

    @torch.no_grad()
    def after_step(self, progress: Progress, memories: Sequence[Memory]) -> None:
        """Move the teacher towards the student and put the teacher's embeddings of this step into the queue."""
        self.teacher.update(self.backbone, self.projector, fraction=progress.fraction)
        for memory in memories:
            for keys in memory["keys"]:
                self.queue.enqueue(distributed.gather(keys))


def sce_losses(
    student: Tensor, teacher: Tensor, queue: Tensor, *, student_temperature: float, teacher_temperature: float
) -> tuple[Tensor, Tensor]:
    """Return InfoNCE and the cross-entropy with the teacher's similarities to the queue, batch means.

    The student's softmax of both is over its key and the queue. `student` and `teacher` are (batch, dim),
    `queue` (size, dim), all with unit rows; no gradient reaches the teacher.
    """
    teacher = teacher.detach()
    positive = (student * teacher).sum(dim=1, keepdim=True)
    logits = torch.cat([positive, student @ queue.T], dim=1) / student_temperature  # (batch, 1 + size)
    log_prediction = F.log_softmax(logits, dim=1)
    target = F.softmax(teacher @ queue.T / teacher_temperature, dim=1)  # (batch, size)
    return -log_prediction[:, 0].mean(), -(target * log_prediction[:, 1:]).sum(dim=1).mean()
