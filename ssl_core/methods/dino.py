"""DINO: self-distillation with no labels (Caron et al., 2021), https://arxiv.org/abs/2104.14294.

The student learns, from every view of an image, the momentum teacher's distribution over learned outputs for the global
views. Centring the teacher's outputs prevents a single output from dominating; sharpening prevents a uniform output.
A frozen DINO network with its head can replace the momentum teacher (docs/sources.md#frozen-teacher).
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Self

import torch
import torch.nn.functional as F
from pydantic import Field, PositiveFloat, PositiveInt, model_validator
from torch import Tensor, nn

from ssl_core.blocks import distributed
from ssl_core.blocks.frozen_teacher import Distilled, FrozenTeacher, Teacher
from ssl_core.blocks.momentum import MomentumTeacher
from ssl_core.blocks.multicrop import (
    SIX_LOCALS,
    SSLIGHT,
    SSLIGHT_TRAINING,
    MultiCrop,
    balance,
    cross_entropies,
    encode,
    local_views,
)
from ssl_core.data.batch import Batch
from ssl_core.data.views import POLICIES, Augmentation, View, Views
from ssl_core.methods.base import Losses, Memory, Method, MethodConfig, Preset, Progress, full_precision
from ssl_core.networks.backbones import Network, read_tensors
from ssl_core.networks.heads import PROJECTOR, mlp, select


class Config(MultiCrop, MethodConfig):
    """Defaults: SSLight's for convolutional networks, with the two small views of solo-learn.

    See docs/sources.md#dino and docs/sources.md#solo-learn.
    """

    name: Literal["dino"] = "dino"
    preset: Literal["small", "official", "sslight_baseline", "sslight", "sslight_vit_baseline", "sslight_vit"] = "small"
    # A frozen network with DINO's head instead of the moving average of the student; `projector` is the head's file.
    teacher: Teacher | None = None
    student_temperature: PositiveFloat = 0.1
    teacher_temperature: PositiveFloat = 0.07
    initial_teacher_temperature: PositiveFloat = 0.04
    temperature_warmup: float = Field(default=0.25, ge=0, le=1)  # share of the run; SSLight: 50 of 200 epochs
    centre_momentum: float = Field(default=0.9, ge=0, le=1)
    teacher_momentum: float = Field(default=0.9995, ge=0, le=1)  # rises to 1 on a cosine
    num_outputs: PositiveInt = 4096
    head_hidden: PositiveInt = 2048
    head_batchnorm: bool = True  # set false for transformers
    bottleneck_dim: PositiveInt = 256
    norm_last_layer: bool = True  # logits are cosines; False: a learned scale per output
    freeze: float = Field(default=0.005, ge=0, le=1)  # share of the run with a frozen last layer: 1 of 200 epochs
    area: tuple[float, float] = (0.08, 1.0)  # solo-learn's on CIFAR
    first_augmentation: Augmentation = POLICIES["dino_global_first"].model_copy(update={"blur": 0.0})
    second_augmentation: Augmentation = POLICIES["dino_global_second"].model_copy(update={"blur": 0.0})
    local_augmentation: Augmentation = POLICIES["dino_local"].model_copy(update={"blur": 0.0})

    @model_validator(mode="after")
    def _teacher_is_sharper(self) -> Self:
        highest = max(self.teacher_temperature, self.initial_teacher_temperature)
        if highest >= self.student_temperature:
            raise ValueError(
                f"the teacher's temperatures, up to {highest}, must be below student_temperature "
                f"{self.student_temperature}: a target as flat as the prediction ends in a uniform output"
            )
        return self

    @model_validator(mode="after")
    def _teacher_has_a_head(self) -> Self:
        if self.teacher is not None and self.teacher.projector is None:
            raise ValueError(
                "teacher.projector is missing: DINO learns the outputs of the teacher's head; give the "
                "model.safetensors of its DINO run or its converted checkpoint, or use ressl, seed or simreg"
            )
        return self

    def ineffective(self) -> Mapping[str, str]:
        """Return the key that a frozen teacher replaces."""
        if self.teacher is None:
            return {}
        return dict(teacher_momentum="a frozen teacher does not move")  # noqa: C408, a text would select an entry of _LARGE


_LARGE = {
    "first_augmentation": "dino_global_first", "second_augmentation": "dino_global_second",
    "local_augmentation": "dino_local", "teacher_momentum": 0.996,
}  # fmt: skip
_SSLIGHT = {**SSLIGHT_TRAINING, "learning_rate": 0.48}
# Vision transformers: 30 of 200 epochs of temperature warm-up; sizes of local views are those of 224 px.
_VIT = {
    **_LARGE, "num_outputs": 65536, "head_batchnorm": False, "temperature_warmup": 0.15, "num_locals": 10,
    "local_multiple": 32,
}  # fmt: skip
_VIT_TRAINING = {
    "optimizer": "adamw", "learning_rate": 5e-4, "minimum_learning_rate": 1e-5, "weight_decay": 0.04,
    "final_weight_decay": 0.4, "batch_size": 1024, "epochs": 200, "warmup_epochs": 10, "decay_exclusion": "norm_bias",
}  # fmt: skip
_VIT_BASELINE = {"area": (0.25, 1.0), "local_area": (0.05, 0.25), "local_size": 96, "alpha": 1 / 11}
_VIT_SSLIGHT = {"area": (0.3, 1.0), "local_area": (0.05, 0.3), "local_size": 128, "alpha": 0.4}

PRESETS = {
    # Not from a paper: views and momentum as in solo-learn on CIFAR, the rest as in SSLight with a small batch.
    "small": Preset(
        method={}, training={**_SSLIGHT, "batch_size": 256},
        source="chosen here: solo-learn's views and momentum, SSLight's optimisation (docs/sources.md#dino)",
        networks="convolutional",
    ),
    "official": Preset(  # the repository's ResNet-50 command, completed by its defaults
        method={
            **_LARGE, **SIX_LOCALS, "num_locals": 8, "num_outputs": 65536, "head_batchnorm": False, "freeze": 0.01,
            "teacher_temperature": 0.04, "temperature_warmup": 0.0,
        },
        training={
            "optimizer": "sgd", "learning_rate": 0.03, "minimum_learning_rate": 1e-6, "weight_decay": 1e-4,
            "batch_size": 512, "epochs": 100, "warmup_epochs": 10, "decay_exclusion": "norm_bias",
        },
        source="DINO's code, command for ResNet-50 (docs/sources.md#dino)", networks="convolutional",
    ),
    "sslight_baseline": Preset(
        method={**_LARGE, **SIX_LOCALS}, training=_SSLIGHT,
        source="SSLight's code without its view sampling, convolutional networks (docs/sources.md#sslight)",
        networks="convolutional",
    ),
    "sslight": Preset(
        method={**_LARGE, **SSLIGHT}, training=_SSLIGHT,
        source="SSLight's code, convolutional networks (docs/sources.md#sslight)", networks="convolutional",
    ),
    "sslight_vit_baseline": Preset(
        method={**_VIT, **_VIT_BASELINE}, training=_VIT_TRAINING, networks="transformer", drop_path=0.1,
        source="SSLight, paper and code, transformers without its view sampling (docs/sources.md#sslight-vit)",
    ),
    "sslight_vit": Preset(
        method={**_VIT, **_VIT_SSLIGHT}, training=_VIT_TRAINING, networks="transformer", drop_path=0.1,
        source="SSLight, paper and code, transformers (docs/sources.md#sslight-vit)",
    ),
}  # fmt: skip


class Head(nn.Module):
    """Three layers to a bottleneck of unit rows, then the cosine with one learned direction per output."""

    def __init__(self, num_features: int, config: Config) -> None:
        super().__init__()
        dims = [num_features, config.head_hidden, config.head_hidden, config.bottleneck_dim]
        self.layers = mlp(dims, batch_norm=config.head_batchnorm, activation=nn.GELU)
        for layer in self.layers:
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)
        bound = config.bottleneck_dim**-0.5  # as nn.Linear draws its weight
        self.direction = nn.Parameter(torch.empty(config.num_outputs, config.bottleneck_dim).uniform_(-bound, bound))
        self.length = nn.Parameter(torch.ones(config.num_outputs, 1), requires_grad=not config.norm_last_layer)

    def embed(self, features: Tensor) -> Tensor:
        """Return unit rows (rows, bottleneck)."""
        return F.normalize(self.layers(features).float(), dim=1)

    def classify(self, embedding: Tensor) -> Tensor:
        """Return logits (rows, outputs) of unit rows, in float32 because they are divided by small temperatures."""
        with full_precision(embedding):
            return F.linear(embedding, self.length * F.normalize(self.direction, dim=1))

    def forward(self, features: Tensor) -> Tensor:
        return self.classify(self.embed(features))


class DINO(Distilled, Method):
    """Student, momentum or frozen teacher, and the centre of the teacher's outputs."""

    Config = Config
    fixed_views = ("global_first", "global_second")
    centre: Tensor

    def __init__(self, config: Config, backbone: Network, *, num_images: int, batch_size: int, seed: int) -> None:
        super().__init__(config, backbone, num_images=num_images, batch_size=batch_size, seed=seed)
        self.config = config
        self.head = Head(backbone.num_features, config)
        if config.teacher is None:
            momentum = config.teacher_momentum
            self.teacher = MomentumTeacher(self.backbone, self.head, momentum=momentum, final_momentum=1.0)
        else:
            self.teacher = FrozenTeacher(config.teacher, load_head)
            if self.teacher.dim != config.num_outputs:
                raise ValueError(
                    f"method.num_outputs: the head in {config.teacher.projector} has {self.teacher.dim} outputs, found "
                    f"{config.num_outputs}: set num_outputs: {self.teacher.dim}"
                )
        self.register_buffer("centre", torch.zeros(config.num_outputs))

    @staticmethod
    def views(config: Config, image_size: int) -> Views:
        """Return two global views with different augmentations for both networks, and local views for the student."""
        shared: Any = {"size": image_size, "area": config.area, "interpolation": "cubic"}
        shared["seen_by"] = ("student", "teacher")
        return {
            "global_first": View(augmentation=config.first_augmentation, **shared),
            "global_second": View(augmentation=config.second_augmentation, **shared),
            **local_views(config, image_size, config.local_augmentation, interpolation="cubic"),
        }

    def forward(self, batch: Batch, progress: Progress) -> Losses:
        """Return the loss of predicting, from every view, the teacher's outputs for the other global views."""
        both = [view for group in batch.views if group != "local" for view in batch.views[group]]
        views = [*both, *batch.views.get("local", [])]
        embedding = self.head.embed(encode(self.backbone, views))
        student = self.head.classify(embedding).unflatten(0, (len(views), -1))  # (views, batch, outputs)
        teacher = self._teach(both)
        with full_precision(student):
            pairs = distillation_loss(
                student,
                teacher,
                self.centre,
                student_temperature=self.config.student_temperature,
                teacher_temperature=self._teacher_temperature(progress),
            )
            total, parts = balance(pairs, self.config.alpha)
        first_view = embedding[: student.shape[1]].detach()
        return Losses(total, parts, embedding=first_view, memory={"mean": teacher.mean(dim=(0, 1))})

    @torch.no_grad()
    def _teach(self, views: list[Tensor]) -> Tensor:
        if isinstance(self.teacher, FrozenTeacher):
            return torch.stack([self.teacher(view) for view in views])
        backbone, head = self.teacher
        return head(encode(backbone, views)).unflatten(0, (len(views), -1))  # (global views, batch, outputs)

    def _teacher_temperature(self, progress: Progress) -> float:
        """Return the temperature of a linear warm-up by step (the official code's is by epoch)."""
        start, end = self.config.initial_teacher_temperature, self.config.teacher_temperature
        warmup = self.config.temperature_warmup
        if warmup == 0:
            return end
        return start + (end - start) * min(1.0, progress.fraction / warmup)

    def before_step(self, progress: Progress) -> None:
        """Freeze the student's last layer for the first part of the run."""
        if progress.step < round(self.config.freeze * progress.total_steps):
            self.head.direction.grad = self.head.length.grad = None

    @torch.no_grad()
    def after_step(self, progress: Progress, memories: Sequence[Memory]) -> None:
        """Move the centre towards the mean of the teacher's outputs, and a momentum teacher towards the student."""
        means = torch.stack([memory["mean"] for memory in memories])
        self.centre.lerp_(distributed.gather(means).mean(dim=0), 1 - self.config.centre_momentum)
        if isinstance(self.teacher, MomentumTeacher):
            self.teacher.update(self.backbone, self.head, fraction=progress.fraction)


def load_head(path: Path, num_features: int) -> tuple[Head, int]:
    """Rebuild the head of a DINO run's model.safetensors or of a converted file; return it with its number of outputs.

    Raises ValueError if there is none, or none for `num_features` features.
    """
    tensors, _ = read_tensors(path)
    weights = select(tensors, "head.") or select(tensors, PROJECTOR)
    if not {"direction", "length", "layers.0.weight"} <= weights.keys():
        raise ValueError(
            f"{path} has no head of DINO, expected the model.safetensors of a DINO run or a checkpoint converted with "
            "its head"
        )
    hidden, width = weights["layers.0.weight"].shape
    if width != num_features:
        raise ValueError(f"{path}: its head takes {width} features, the teacher's backbone gives {num_features}")
    num_outputs, bottleneck = weights["direction"].shape
    config = Config(
        head_hidden=hidden,
        head_batchnorm="layers.1.running_mean" in weights,
        bottleneck_dim=bottleneck,
        num_outputs=num_outputs,
    )
    head = Head(num_features, config)
    try:
        head.load_state_dict(weights)
    except RuntimeError:
        raise ValueError(f"{path}: its head does not have the three layers of DINO's") from None
    return head, num_outputs


def distillation_loss(
    student: Tensor, teacher: Tensor, centre: Tensor, *, student_temperature: float, teacher_temperature: float
) -> Tensor:
    """Return the cross-entropy (teacher views, student views) to the centred, sharpened teacher (eq. 2-3).

    `student` holds logits (views, batch, outputs), `teacher` logits (global views, batch, outputs), `centre` is
    (outputs,). No gradient reaches the teacher. `balance` then leaves out the pairs of a view with itself.
    """
    target = F.softmax((teacher.detach() - centre) / teacher_temperature, dim=2)
    return cross_entropies(target, F.log_softmax(student / student_temperature, dim=2))
