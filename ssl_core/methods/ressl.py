"""ReSSL: relational self-supervised learning (Zheng et al., 2021), https://arxiv.org/abs/2107.09282.

The student, on a strongly augmented view, learns the momentum teacher's similarities of a weak view to a queue of other
images. Unlike with a contrastive loss, similar images are not pushed apart. A frozen network can replace the momentum
teacher (docs/sources.md#frozen-teacher).
"""

import sys
from collections.abc import Mapping, Sequence
from typing import Literal, Self

import torch
import torch.nn.functional as F
from pydantic import Field, PositiveFloat, PositiveInt, model_validator
from torch import Tensor, nn

from ssl_core.blocks import distributed
from ssl_core.blocks.frozen_teacher import Distilled, FrozenTeacher, Teacher
from ssl_core.blocks.losses import info_nce
from ssl_core.blocks.momentum import MomentumTeacher, shuffled_embedding
from ssl_core.blocks.queue import Queue, check_queue_size
from ssl_core.data.batch import Batch
from ssl_core.data.views import POLICIES, Augmentation, View, Views
from ssl_core.methods.base import Losses, Memory, Method, MethodConfig, Preset, Progress, full_precision
from ssl_core.networks.backbones import Network
from ssl_core.networks.heads import mlp


class Config(MethodConfig):
    """Defaults: the journal version's for small images (docs/sources.md#ressl)."""

    name: Literal["ressl"] = "ressl"
    preset: Literal["small", "imagenet", "neurips"] = "small"
    teacher: Teacher | None = None  # a frozen network instead of the moving average of the student
    crops: Literal["one", "two", "multi"] = "one"
    # As in the released code: CLSA's RandAugment, jitter of strength 1, areas from 0.08 (docs/sources.md#ressl-strong).
    strong: bool = False
    student_temperature: PositiveFloat = 0.1
    teacher_temperature: PositiveFloat = 0.04  # must be sharper than the student's (Table 1)
    queue_size: PositiveInt = 4096
    projector_hidden: PositiveInt = 4096
    projector_batchnorm: bool = True
    embedding_dim: PositiveInt = 256
    predictor: bool = True
    # None: 1 with a predictor or a frozen teacher, else 8 as in MoCo's CIFAR notebook, so that statistics do not reveal
    # the positive pair.
    batchnorm_splits: PositiveInt | None = None
    teacher_momentum: float = Field(default=0.99, ge=0, le=1)
    final_teacher_momentum: float | None = Field(default=None, ge=0, le=1)  # at the end of a cosine; None: constant
    # Share of the run over which InfoNCE fades out (eq. 7), and its temperature: MoCo v2's, as the paper has none
    # (docs/sources.md#ressl-warmup).
    warmup: float = Field(default=0.1, ge=0, le=1)
    warmup_temperature: PositiveFloat = 0.2
    student_area: tuple[float, float] = (0.2, 1.0)  # of one or two crops
    student_augmentation: Augmentation = POLICIES["contrastive"]
    # Smallest areas of the five views of `crops: multi`, which do not use `student_area`.
    multi_smallest: tuple[float, ...] = Field(default=(0.14, 0.117, 0.095, 0.073, 0.05), min_length=5, max_length=5)

    @model_validator(mode="after")
    def _teacher_is_sharper(self) -> Self:
        if self.teacher_temperature > self.student_temperature:
            raise ValueError(
                f"teacher_temperature {self.teacher_temperature} must not be above student_temperature "
                f"{self.student_temperature}: the target must be the sharper one (0.04 and 0.1 in the paper)"
            )
        return self

    def ineffective(self) -> Mapping[str, str]:
        """Return the areas that the number of crops or `strong` replaces, and the keys that a frozen teacher does."""
        replaced = {}
        if self.teacher is not None:
            replaced = {
                "embedding_dim": "with a frozen teacher it is the width of the teacher's embeddings",
                "teacher_momentum": "a frozen teacher does not move",
                "final_teacher_momentum": "a frozen teacher does not move",
            }
        if self.strong:
            reason = f"strong: true has areas from {STRONG_SMALLEST}; change them under views"
            return {**replaced, "student_area": reason, "multi_smallest": reason}
        if self.crops == "multi":
            return {**replaced, "student_area": "crops: multi has the areas of multi_smallest; set that key"}
        return {**replaced, "multi_smallest": f"crops: {self.crops} has the area of student_area; set that key"}


PRESETS = {
    "small": Preset(
        method={},
        training={
            "optimizer": "sgd", "learning_rate": 0.06, "weight_decay": 5e-4, "batch_size": 256, "epochs": 200,
            "warmup_epochs": 10,
        },
        source="Zheng et al., journal version, small images (docs/sources.md#ressl)",
    ),
    "imagenet": Preset(
        method={
            "teacher_temperature": 0.03, "queue_size": 65536, "teacher_momentum": 0.996, "final_teacher_momentum": 1.0,
            "student_area": (0.14, 1.0), "student_augmentation": {"policy": "byol_first", "blur": 0.5, "solarize": 0.1},
        },
        training={
            "optimizer": "lars", "learning_rate": 0.6, "weight_decay": 1e-6, "batch_size": 1024, "epochs": 200,
            "warmup_epochs": 10, "decay_exclusion": "norm_bias",
        },
        source="Zheng et al., journal version, ImageNet (docs/sources.md#ressl)",
    ),
    "neurips": Preset(  # the released code, which differs from the journal version (docs/sources.md#ressl)
        method={
            "predictor": False, "warmup": 0.0, "projector_batchnorm": False, "embedding_dim": 512, "queue_size": 131072,
            "teacher_momentum": 0.999, "multi_smallest": (0.2, 0.172, 0.143, 0.114, 0.086),
        },
        training={
            "optimizer": "sgd", "learning_rate": 0.05, "learning_rate_scaling": "none", "weight_decay": 1e-4,
            "batch_size": 256, "epochs": 200, "warmup_epochs": 5, "decay_exclusion": "named",
        },
        source="Zheng et al., released code of the NeurIPS version (docs/sources.md#ressl)",
    ),
}  # fmt: skip

STRONG = {"randaugment": 5, "brightness": 0.8, "contrast": 0.8, "saturation": 0.8, "hue": 0.2}  # CLSA's operations
STRONG_SMALLEST = 0.08  # area

# Side (as a share of the teacher's view) and largest area of the five student views (journal, section 4.3).
MULTI_CROP = [(224 / 224, 1.0), (192 / 224, 0.86), (160 / 224, 0.715), (128 / 224, 0.571), (96 / 224, 0.429)]


class ReSSL(Distilled, Method):
    """Student, momentum or frozen teacher, and a queue of the teacher's past embeddings."""

    Config = Config
    fixed_views = ("teacher",)

    def __init__(self, config: Config, backbone: Network, *, num_images: int, batch_size: int, seed: int) -> None:
        super().__init__(config, backbone, num_images=num_images, batch_size=batch_size, seed=seed)
        check_queue_size(config.queue_size, num_images)
        if config.teacher_temperature == config.student_temperature and distributed.rank() == 0:
            print(
                f"warning: method.teacher_temperature equals student_temperature, {config.student_temperature}: the "
                "target is no sharper than the prediction and training may collapse (0.04 and 0.1 in the paper)",
                file=sys.stderr,
            )
        self.config = config
        frozen = None if config.teacher is None else FrozenTeacher(config.teacher)
        dim = config.embedding_dim if frozen is None else frozen.dim
        hidden, norm = config.projector_hidden, config.projector_batchnorm
        self.projector = mlp([backbone.num_features, hidden, dim], batch_norm=norm)
        self.predictor = mlp([dim, hidden, dim], batch_norm=norm) if config.predictor else nn.Identity()
        self.splits = config.batchnorm_splits or (1 if config.predictor or frozen else 8)
        self.split_batchnorm(self.splits)
        self.teacher = frozen or MomentumTeacher(
            self.backbone,
            self.projector,
            momentum=config.teacher_momentum,
            final_momentum=config.final_teacher_momentum,
        )
        self.queue = Queue(config.queue_size, dim)

    @staticmethod
    def views(config: Config, image_size: int) -> Views:
        """Return one weak view for the teacher, and one, two or five strong views for the student."""
        augmentation, smallest_areas = config.student_augmentation, config.multi_smallest
        if config.strong:
            augmentation = augmentation.model_copy(update=STRONG)
            smallest_areas = (STRONG_SMALLEST,) * len(MULTI_CROP)
        teacher = View(size=image_size, area=(0.2, 1.0), augmentation=POLICIES["weak"], seen_by=("teacher",))
        if config.crops != "multi":
            count = {"one": 1, "two": 2}[config.crops]
            area = (STRONG_SMALLEST, 1.0) if config.strong else config.student_area
            student = View(count=count, size=image_size, area=area, augmentation=augmentation)
            return {"student": student, "teacher": teacher}
        students = {
            f"student_{round(share * image_size)}": View(
                size=round(share * image_size), area=(smallest, largest), augmentation=augmentation
            )
            for (share, largest), smallest in zip(MULTI_CROP, smallest_areas, strict=True)
        }
        return {**students, "teacher": teacher}

    def forward(self, batch: Batch, progress: Progress) -> Losses:
        """Return L = alpha * L_relation + (1 - alpha) * L_InfoNCE (eq. 7), averaged over the student's views."""
        teacher = self._teach(batch.views["teacher"][0], progress.step)
        students = [self._learn(view) for group in batch.views if group != "teacher" for view in batch.views[group]]
        with full_precision(teacher):
            total, parts = self._losses(students, teacher, progress)
        return Losses(total, parts, embedding=students[0].detach(), memory={"keys": teacher})

    def _losses(self, students: list[Tensor], teacher: Tensor, progress: Progress) -> tuple[Tensor, dict[str, Tensor]]:
        queue = self.queue.rows
        alpha = min(1.0, progress.fraction / self.config.warmup) if self.config.warmup else 1.0
        temperatures = {
            "student_temperature": self.config.student_temperature,
            "teacher_temperature": self.config.teacher_temperature,
        }
        relations = [relation_loss(student, teacher, queue, **temperatures) for student in students]
        relation = torch.stack(relations).mean()
        parts = {"relation": relation.detach()}
        total = alpha * relation
        if alpha < 1:
            temperature = self.config.warmup_temperature
            contrasts = [info_nce(student, teacher, queue, temperature=temperature) for student in students]
            contrast = torch.stack(contrasts).mean()
            parts["contrast"] = contrast.detach()
            total = total + (1 - alpha) * contrast
        return total, parts

    def _learn(self, view: Tensor) -> Tensor:
        embedding = self.predictor(self.projector(self.backbone(view)))
        return F.normalize(embedding.float(), dim=1)  # z1: (batch, dim)

    def _teach(self, view: Tensor, step: int) -> Tensor:
        return shuffled_embedding(self.teacher, view, splits=self.splits, seed=self.seed, step=step)  # z2: (batch, dim)

    @torch.no_grad()
    def after_step(self, progress: Progress, memories: Sequence[Memory]) -> None:
        """Move a momentum teacher towards the student and put the teacher's embeddings of this step into the queue."""
        if isinstance(self.teacher, MomentumTeacher):
            self.teacher.update(self.backbone, self.projector, fraction=progress.fraction)
        for memory in memories:
            self.queue.enqueue(distributed.gather(memory["keys"]))


def relation_loss(
    student: Tensor, teacher: Tensor, queue: Tensor, *, student_temperature: float, teacher_temperature: float
) -> Tensor:
    """Return the cross-entropy of the student's and the teacher's similarities to the queue (eq. 5), batch mean.

    `student` and `teacher` are (batch, dim), `queue` (size, dim), all with unit rows; no gradient reaches the teacher.
    """
    target = F.softmax(teacher.detach() @ queue.T / teacher_temperature, dim=1)  # (batch, size)
    return -(target * F.log_softmax(student @ queue.T / student_temperature, dim=1)).sum(dim=1).mean()
