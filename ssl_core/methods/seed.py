"""SEED: self-supervised distillation (Fang et al., 2021), https://arxiv.org/abs/2101.04731.

A frozen, larger teacher says how similar an image is to itself and to a queue of others; a small student that sees the
same picture learns to say the same. Its backbone is also what the improved MoCo of Shi et al. starts from.
"""

import json
import re
from pathlib import Path
from typing import Literal, NamedTuple, Self

import torch
import torch.nn.functional as F
from pydantic import PositiveFloat, PositiveInt
from torch import Tensor, nn

from ssl_core.blocks import distributed
from ssl_core.blocks.queue import Queue
from ssl_core.config import Backbone, Strict
from ssl_core.data.loader import Batch, Loader
from ssl_core.data.views import POLICIES, Augmentation, View, Views
from ssl_core.methods.base import Losses, Method, MethodConfig, Preset, Progress, full_precision
from ssl_core.networks.backbones import Network, build_backbone, load_backbone, load_weights, read_tensors
from ssl_core.networks.heads import mlp


class Teacher(Strict):
    """Whose embeddings are learned."""

    weights: str  # a backbone.safetensors of ours or, with `backbone`, one of torchvision's or timm's
    backbone: Backbone | None = None  # the network in a file that does not say; ours do
    projector: str | None = None  # the model.safetensors of the same run; None: pooled features are the embeddings
    size: PositiveInt | None = None  # the pixels it sees; None: as many as the student
    mean: tuple[float, float, float] | None = None  # of its normalisation; None: what its file says, else ImageNet's
    std: tuple[PositiveFloat, PositiveFloat, PositiveFloat] | None = None


class Config(MethodConfig):
    """Defaults are the paper's (recipes M15)."""

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
    "paper": Preset(method={}, training=_TRAINING),
    "code": Preset(method={"teacher_temperature": 1e-4}, training=_TRAINING),  # the target is all but one-hot
}


IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}


class SEED(Method):
    """Student, frozen teacher and a queue of the teacher's past embeddings."""

    Config = Config
    fixed_views = ("both",)
    scale: Tensor
    shift: Tensor

    def __init__(self, config: Config, backbone: Network, *, num_images: int, batch_size: int, seed: int) -> None:
        super().__init__(config, backbone, num_images=num_images, batch_size=batch_size, seed=seed)
        self.config = config
        self.backbone: Network = backbone
        self.teacher, dim, self.normalisation = load_teacher(config.teacher)
        self.projector = mlp([backbone.num_features, backbone.num_features, dim], batch_norm=False)
        self.register_buffer("scale", torch.ones(3, 1, 1))  # from the data's normalisation to the teacher's
        self.register_buffer("shift", torch.zeros(3, 1, 1))
        self.queue = Queue(config.queue_size, dim)
        self.keys: list[Tensor] = []  # this step's, enqueued after it

    @staticmethod
    def views(config: Config, image_size: int) -> Views:
        """One view, which both networks see."""
        seen_by = ("student", "teacher")
        view = View(size=image_size, area=config.area, augmentation=config.augmentation, seen_by=seen_by)
        return {"both": view}

    def prepare(self, loader: Loader, device: torch.device) -> None:
        """Find out how the teacher's normalisation, in which it must see the pictures, differs from the data's."""
        mean, std, own_mean, own_std = (
            torch.tensor(values, device=device).view(3, 1, 1)
            for values in (*loader.normalisation, self.normalisation.mean, self.normalisation.std)
        )
        self.scale.copy_(std / own_std)
        self.shift.copy_((mean - own_mean) / own_std)

    def train(self, mode: bool = True) -> Self:
        """Set the student's mode; the teacher stays in evaluation mode."""
        super().train(mode)
        self.teacher.eval()
        return self

    def forward(self, batch: Batch, progress: Progress) -> Losses:
        """Return the loss over the teacher's embedding of each image and the queue as it stood before this batch."""
        (view,) = batch.views["both"]
        student = F.normalize(self.projector(self.backbone(view)).float(), dim=1)  # (batch, dim)
        teacher = self._teach(view)
        self.keys.append(teacher)
        with full_precision(student):
            loss = seed_loss(
                student,
                teacher,
                self.queue.rows.clone(),
                student_temperature=self.config.student_temperature,
                teacher_temperature=self.config.teacher_temperature,
            )
        return Losses(loss, {}, embedding=student.detach())

    @torch.no_grad()
    def _teach(self, view: Tensor) -> Tensor:
        size = self.config.teacher.size
        if size is not None and size != view.shape[-1]:
            view = F.interpolate(view, size=(size, size), mode="bilinear", antialias=True)
        return F.normalize(self.teacher(view * self.scale + self.shift).float(), dim=1)

    @torch.no_grad()
    def after_step(self, progress: Progress) -> None:
        """Put this step's teacher embeddings into the queue."""
        for keys in self.keys:
            self.queue.enqueue(distributed.gather(keys))
        self.keys.clear()


class Normalisation(NamedTuple):
    """By channel, of pixels in 0..1."""

    mean: tuple[float, ...]
    std: tuple[float, ...]


def load_teacher(config: Teacher) -> tuple[nn.Module, int, Normalisation]:
    """Load backbone and, if asked, projector as one frozen network; return it, its width and its normalisation.

    Raises ValueError for a file that is missing or does not fit.
    """
    path, said = Path(config.weights), {}
    if config.backbone is None:
        backbone, header = load_backbone(path)
        said = {name: json.loads(header[name]) for name in ("mean", "std") if name in header}
    else:
        backbone = build_backbone(config.backbone, config.size or 224)
        load_weights(backbone, path)
    said = {**IMAGENET, **said, **config.model_dump(include={"mean", "std"}, exclude_none=True)}
    projector, dim = nn.Identity(), backbone.num_features
    if config.projector is not None:
        projector, dim = load_projector(Path(config.projector), dim)
    teacher = nn.Sequential(backbone, projector).requires_grad_(False).eval()
    return teacher, dim, Normalisation(tuple(said["mean"]), tuple(said["std"]))


def load_projector(path: Path, num_features: int) -> tuple[nn.Module, int]:
    """Rebuild the `projector` of a model.safetensors of ours from its shapes: linear layers, batch norms, ReLU between.

    Returns it with the width of its output. Raises ValueError where there is none behind `num_features` features.
    """
    tensors, _ = read_tensors(path)
    weights = {name.removeprefix("projector."): rows for name, rows in tensors.items() if name.startswith("projector.")}
    if any(re.fullmatch(r"\d+\.\w+", name) is None for name in weights) or not weights:
        raise ValueError(
            f"{path} holds no projector of plain layers: leave out teacher.projector to distil pooled features"
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
    """Cross-entropy from the teacher's similarities to the student's (eq. 5), mean over the batch.

    They are compared over the teacher's own embedding of the image, first, and the queue. `student` and `teacher` are
    (batch, dim), `queue` (size, dim), all with unit rows; no gradient reaches the teacher.
    """
    teacher = teacher.detach()
    own, learned = (teacher * teacher).sum(dim=1, keepdim=True), (student * teacher).sum(dim=1, keepdim=True)
    target = F.softmax(torch.cat([own, teacher @ queue.T], dim=1) / teacher_temperature, dim=1)  # (batch, 1 + size)
    prediction = F.log_softmax(torch.cat([learned, student @ queue.T], dim=1) / student_temperature, dim=1)
    return -(target * prediction).sum(dim=1).mean()
