"""SEED: self-supervised distillation (Fang et al., 2021), https://arxiv.org/abs/2101.04731.

A small student learns a frozen, larger teacher's similarities of an image to itself and to a queue of other images.
Both see the same view. Shi et al. initialise their MoCo with the resulting backbone.
"""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, Self

import torch
import torch.nn.functional as F
from pydantic import PositiveFloat, PositiveInt
from torch import Tensor, nn

from ssl_core.blocks import distributed
from ssl_core.blocks.queue import Queue
from ssl_core.config import IMAGENET, Backbone, Normalisation, Strict
from ssl_core.data.batch import Batch, BatchSource
from ssl_core.data.views import POLICIES, Augmentation, View, Views
from ssl_core.methods.base import Losses, Memory, Method, MethodConfig, Preset, Progress, full_precision
from ssl_core.networks.backbones import Network, build_backbone, load_backbone, load_weights, read_tensors
from ssl_core.networks.heads import mlp


class Teacher(Strict):
    """The frozen network whose embeddings are distilled."""

    weights: str  # a backbone.safetensors of this project or, with `backbone`, a file of torchvision or timm
    backbone: Backbone | None = None  # the network, for a file without that entry in its header
    projector: str | None = None  # the model.safetensors of the same run; None: pooled features are the embeddings
    size: PositiveInt | None = None  # side of its input in pixels; None: the student's
    mean: tuple[float, float, float] | None = None  # normalisation; None: from the file's header, else ImageNet's
    std: tuple[PositiveFloat, PositiveFloat, PositiveFloat] | None = None


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


class SEED(Method):
    """Student, frozen teacher, and a queue of the teacher's past embeddings."""

    Config = Config
    fixed_views = ("both",)
    scale: Tensor
    shift: Tensor

    def __init__(self, config: Config, backbone: Network, *, num_images: int, batch_size: int, seed: int) -> None:
        super().__init__(config, backbone, num_images=num_images, batch_size=batch_size, seed=seed)
        self.config = config
        self.teacher, dim, self.normalisation = load_teacher(config.teacher)
        self.projector = mlp([backbone.num_features, backbone.num_features, dim], batch_norm=False)
        self.register_buffer("scale", torch.ones(3, 1, 1))  # from the data's normalisation to the teacher's
        self.register_buffer("shift", torch.zeros(3, 1, 1))
        self.queue = Queue(config.queue_size, dim)

    @staticmethod
    def views(config: Config, image_size: int) -> Views:
        """Return a single view for both networks."""
        seen_by = ("student", "teacher")
        view = View(size=image_size, area=config.area, augmentation=config.augmentation, seen_by=seen_by)
        return {"both": view}

    def prepare(self, loader: BatchSource, device: torch.device) -> None:
        """Compute the map from the data's normalisation to the teacher's."""

        def per_channel(values: Sequence[float]) -> Tensor:
            return torch.tensor(values, device=device).view(3, 1, 1)

        mean, std = map(per_channel, loader.normalisation)
        teacher_mean, teacher_std = per_channel(self.normalisation.mean), per_channel(self.normalisation.std)
        self.scale.copy_(std / teacher_std)
        self.shift.copy_((mean - teacher_mean) / teacher_std)

    def train(self, mode: bool = True) -> Self:
        """Set the student's mode; the teacher remains in evaluation mode."""
        super().train(mode)
        self.teacher.eval()
        return self

    def forward(self, batch: Batch, progress: Progress) -> Losses:
        """Return the loss over the teacher's embedding of each image and the queue of earlier batches."""
        (view,) = batch.views["both"]
        student = F.normalize(self.projector(self.backbone(view)).float(), dim=1)  # (batch, dim)
        teacher = self._teach(view)
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
    def _teach(self, view: Tensor) -> Tensor:
        size = self.config.teacher.size
        if size is not None and size != view.shape[-1]:
            view = F.interpolate(view, size=(size, size), mode="bilinear", antialias=True)
        return F.normalize(self.teacher(view * self.scale + self.shift).float(), dim=1)

    @torch.no_grad()
    def after_step(self, progress: Progress, memories: Sequence[Memory]) -> None:
        """Put the teacher's embeddings of this step into the queue."""
        for memory in memories:
            self.queue.enqueue(distributed.gather(memory["keys"]))


def load_teacher(config: Teacher) -> tuple[nn.Module, int, Normalisation]:
    """Load backbone and optional projector as one frozen network; return it, its width and its normalisation.

    Raises ValueError for a file that is missing or does not fit.
    """
    path, normalisation = Path(config.weights), dict(IMAGENET)
    if config.backbone is None:
        backbone, header = load_backbone(path)
        normalisation |= {name: json.loads(header[name]) for name in ("mean", "std") if name in header}
    else:
        backbone = build_backbone(config.backbone, config.size or 224)
        load_weights(backbone, path)
    normalisation |= config.model_dump(include={"mean", "std"}, exclude_none=True)
    projector, dim = nn.Identity(), backbone.num_features
    if config.projector is not None:
        projector, dim = load_projector(Path(config.projector), dim)
    teacher = nn.Sequential(backbone, projector).requires_grad_(False).eval()
    return teacher, dim, Normalisation.model_validate(normalisation)


def load_projector(path: Path, num_features: int) -> tuple[nn.Module, int]:
    """Rebuild the `projector` of a model.safetensors from its shapes: linear layers and BatchNorms, ReLU in between.

    Returns it with its output width. Raises ValueError if there is none, or none for `num_features` features.
    """
    tensors, _ = read_tensors(path)
    weights = {name.removeprefix("projector."): rows for name, rows in tensors.items() if name.startswith("projector.")}
    if any(re.fullmatch(r"\d+\.\w+", name) is None for name in weights) or not weights:
        raise ValueError(
            f"{path} has no projector of plain layers: leave out teacher.projector to distil pooled features"
        )
    layers: list[nn.Module] = []
    dim = num_features
    for index in range(1 + max(int(name.split(".")[0]) for name in weights)):
        weight, mean = weights.get(f"{index}.weight"), weights.get(f"{index}.running_mean")
        if mean is not None:
            layers.append(nn.BatchNorm1d(len(mean), affine=weight is not None))
        elif weight is None:
            layers.append(nn.ReLU())
        else:
            if weight.shape[1] != dim:
                raise ValueError(f"{path}: its projector takes {weight.shape[1]} features, its backbone gives {dim}")
            dim = len(weight)
            layers.append(nn.Linear(weight.shape[1], dim, bias=f"{index}.bias" in weights))
    projector = nn.Sequential(*layers)
    projector.load_state_dict(weights)
    return projector, dim


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
