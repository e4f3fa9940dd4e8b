"""SwAV: swapping assignments between views (Caron et al., 2020), https://arxiv.org/abs/2006.09882.

Each global view gets a soft assignment to prototypes, all used equally often; every other view of the image predicts
that assignment. Prototypes are learned with the network. For small batches a queue of embeddings joins the assignment.
With a frozen teacher, the assignments are those of its embeddings (docs/sources.md#frozen-teacher).
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor, nn

from ssl_core.blocks import distributed
from ssl_core.blocks.frozen_teacher import Distilled, FrozenTeacher, Teacher
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
from ssl_core.blocks.queue import Queue
from ssl_core.data.batch import Batch
from ssl_core.data.views import POLICIES, Augmentation, View, Views
from ssl_core.methods.base import Losses, Memory, Method, MethodConfig, Preset, Progress, full_precision
from ssl_core.networks.backbones import Network, read_tensors
from ssl_core.networks.heads import PROJECTOR, PROTOTYPES, mlp


class Config(MultiCrop, MethodConfig):
    """Defaults: the paper's head and loss on two small views (docs/sources.md#swav); durations: shares of the run."""

    name: Literal["swav"] = "swav"
    preset: Literal["small", "official", "large_batch", "sslight_baseline", "sslight"] = "small"
    # A frozen network whose embeddings of the global views are assigned instead of the student's. Prototypes in its
    # projector's file are kept, otherwise they are learned.
    teacher: Teacher | None = None
    temperature: PositiveFloat = 0.1
    epsilon: PositiveFloat = 0.05  # smoothness of the assignment
    sinkhorn_iterations: PositiveInt = 3
    num_prototypes: PositiveInt = 3000
    freeze: float = Field(default=0.005, ge=0, le=1)  # share of the run with frozen prototypes: 1 of 200 epochs
    queue_size: NonNegativeInt = 3840  # past embeddings of each of the two global views; 0: no queue
    queue_start: float = Field(default=0.075, ge=0, le=1)  # share of the run without the queue: 15 of 200 epochs
    projector_hidden: PositiveInt = 2048
    embedding_dim: PositiveInt = 128
    area: tuple[float, float] = (0.08, 1.0)  # solo-learn's on CIFAR (docs/sources.md#solo-learn)
    interpolation: Literal["linear", "cubic"] = "linear"
    augmentation: Augmentation = POLICIES["swav"]

    def ineffective(self) -> Mapping[str, str]:
        """Return the key that a frozen teacher replaces."""
        if self.teacher is None:
            return {}
        return {"embedding_dim": "with a frozen teacher it is the width of the teacher's embeddings"}


# SSLight's LARS equals the paper's SGD with LARC up to rounding; the latter decays all parameters.
_LARS = {"optimizer": "lars", "weight_decay": 1e-6}
# SSLight's code: a wider head, a queue of whole batches (3,072 instead of 3,840) and bicubic crops.
_HEAD = {"projector_hidden": 4096, "queue_size": 3072, "interpolation": "cubic"}
_SSLIGHT = {**SSLIGHT_TRAINING, "learning_rate": 0.3}

PRESETS = {
    # Not from a paper: views as in solo-learn on CIFAR, optimisation as in SSLight with a small batch.
    "small": Preset(
        method={}, training={**_SSLIGHT, "batch_size": 256},
        source="chosen here: solo-learn's views, SSLight's optimisation (docs/sources.md#swav)",
        networks="convolutional",
    ),
    "official": Preset(  # the repository's command for small batches
        method=SIX_LOCALS,
        training={
            **_LARS, "learning_rate": 0.6, "minimum_learning_rate": 0.0006, "batch_size": 256, "epochs": 200,
            "warmup_epochs": 0,
        },
        source="SwAV's code, command for small batches (docs/sources.md#swav)", networks="convolutional",
    ),
    "large_batch": Preset(  # the repository's main command
        method={**SIX_LOCALS, "queue_size": 0, "freeze": 1 / 800},
        training={
            **_LARS, "learning_rate": 0.3, "minimum_learning_rate": 0.0048, "batch_size": 4096, "epochs": 800,
            "warmup_epochs": 10,
        },
        source="SwAV's code, main command (docs/sources.md#swav)", networks="convolutional",
    ),
    "sslight_baseline": Preset(
        method={**SIX_LOCALS, **_HEAD}, training=_SSLIGHT,
        source="SSLight's code without its view sampling (docs/sources.md#sslight)", networks="convolutional",
    ),
    "sslight": Preset(
        method={**SSLIGHT, **_HEAD}, training=_SSLIGHT,
        source="SSLight's code (docs/sources.md#sslight)", networks="convolutional",
    ),
}  # fmt: skip


class SwAV(Distilled, Method):
    """A network, unit prototypes, a queue of past embeddings for each global view, and optionally a frozen teacher."""

    Config = Config
    fixed_views = ("global",)

    def __init__(self, config: Config, backbone: Network, *, num_images: int, batch_size: int, seed: int) -> None:
        super().__init__(config, backbone, num_images=num_images, batch_size=batch_size, seed=seed)
        self.config, self.batch_size = config, batch_size
        self.teacher = None if config.teacher is None else FrozenTeacher(config.teacher)
        dim = config.embedding_dim if self.teacher is None else self.teacher.dim
        self.projector = mlp([backbone.num_features, config.projector_hidden, dim])
        self.prototypes = nn.Parameter(F.normalize(torch.randn(config.num_prototypes, dim), dim=1))
        if config.teacher is not None and config.teacher.projector is not None:
            self._keep_prototypes(Path(config.teacher.projector))
        queues = 2 if config.queue_size else 0
        self.queues = nn.ModuleList(Queue(config.queue_size, dim) for _ in range(queues))

    def _keep_prototypes(self, path: Path) -> None:
        """Replace the prototypes by those of the teacher's file, if it has some, and do not train them."""
        prototypes = load_prototypes(path)
        if prototypes is None:
            return
        if prototypes.shape != self.prototypes.shape:
            count, dim = prototypes.shape
            raise ValueError(
                f"{path} has {count} prototypes of width {dim}, expected {len(self.prototypes)} of width "
                f"{self.prototypes.shape[1]}: set method.num_prototypes: {count}"
            )
        self.prototypes = nn.Parameter(F.normalize(prototypes.float(), dim=1), requires_grad=False)

    @staticmethod
    def views(config: Config, image_size: int) -> Views:
        """Return two global views and the local ones, all with the same augmentation."""
        networks = ("student",) if config.teacher is None else ("student", "teacher")
        global_views = View(
            count=2,
            size=image_size,
            area=config.area,
            interpolation=config.interpolation,
            augmentation=config.augmentation,
            seen_by=networks,
        )
        return {
            "global": global_views,
            **local_views(config, image_size, config.augmentation, interpolation=config.interpolation),
        }

    def forward(self, batch: Batch, progress: Progress) -> Losses:
        """Return the loss of predicting, from every view, the codes of the other global views."""
        views = [*batch.views["global"], *batch.views.get("local", [])]
        rows = F.normalize(self.projector(encode(self.backbone, views)).float(), dim=1)
        embeddings = rows.unflatten(0, (len(views), -1))  # z: (views, batch, dim)
        with full_precision(embeddings):
            scores = embeddings @ self.prototypes.T  # (views, batch, prototypes)
            assigned, to_assign = embeddings[:2], scores[:2]
            if self.teacher is not None:
                assigned = torch.stack([F.normalize(self.teacher(view), dim=1) for view in batch.views["global"]])
                to_assign = assigned @ self.prototypes.T
            codes = self._assign(to_assign, progress)
            pairs = swapped_prediction(scores, codes, temperature=self.config.temperature)
            total, parts = balance(pairs, self.config.alpha)
        memory = {"embeddings": assigned.detach()}
        return Losses(total, parts, embedding=embeddings[0].detach(), memory=memory)

    @torch.no_grad()
    def _assign(self, scores: Tensor, progress: Progress) -> Tensor:
        """Return the codes (2, batch, prototypes) of the global views, computed with the queues once these are full."""
        codes = []
        for view, view_scores in enumerate(scores):
            if self._queues_are_full(progress):
                # Each process has the whole queue and uses a part, so that every row counts once.
                rows = self.queues[view].get_buffer("rows")[distributed.rank() :: distributed.world_size()]
                view_scores = torch.cat([rows @ self.prototypes.T, view_scores])
            assigned = sinkhorn(view_scores, epsilon=self.config.epsilon, iterations=self.config.sinkhorn_iterations)
            codes.append(assigned[-scores.shape[1] :])
        return torch.stack(codes)

    def _queues_are_full(self, progress: Progress) -> bool:
        """Compute it from the step, because reading the queue's position would synchronise the device."""
        enqueued = (progress.step - self._first_enqueued_step(progress)) * self.batch_size
        return len(self.queues) > 0 and enqueued >= self.config.queue_size

    def _first_enqueued_step(self, progress: Progress) -> int:
        return round(self.config.queue_start * progress.total_steps)

    def _frozen(self, progress: Progress) -> bool:
        start = round(self.config.freeze * progress.total_steps)
        return progress.step < start or not self.prototypes.requires_grad

    def before_step(self, progress: Progress) -> None:
        """Freeze the prototypes for the first part of the run, including weight decay and momentum."""
        if self._frozen(progress):
            self.prototypes.grad = None

    @torch.no_grad()
    def after_step(self, progress: Progress, memories: Sequence[Memory]) -> None:
        """Normalise the prototypes and put the embeddings of this step into the queues."""
        if not self._frozen(progress):
            self.prototypes.copy_(F.normalize(self.prototypes, dim=1))
        if progress.step < self._first_enqueued_step(progress):
            return
        for view, queue in enumerate(self.queues):
            for memory in memories:
                queue.enqueue(distributed.gather(memory["embeddings"][view]))  # pyright: ignore[reportCallIssue]


def load_prototypes(path: Path) -> Tensor | None:
    """Return the prototypes (prototypes, dim) of a SwAV run's model.safetensors or a converted file; None without."""
    tensors, _ = read_tensors(path)
    return tensors.get(PROTOTYPES, tensors.get(f"{PROJECTOR}{PROTOTYPES}"))


@torch.no_grad()
def sinkhorn(scores: Tensor, *, epsilon: float, iterations: int) -> Tensor:
    """Return soft assignments (batch, prototypes) with rows of sum 1 and nearly equal use of all prototypes (eq. 3-5).

    `scores` are the cosines (batch, prototypes) of this process; the use of prototypes is equal over all processes. The
    paper's divisions by counts and by the total are omitted, because the next normalisation cancels them.
    """
    scores = scores.float() / epsilon
    largest = distributed.gather(scores.max()[None]).max()  # subtracted to keep exp finite
    codes = (scores - largest).exp()
    smallest = torch.finfo(codes.dtype).tiny
    for _ in range(iterations):
        codes = codes / distributed.gather(codes.sum(dim=0)[None]).sum(dim=0).clamp_min(smallest)
        codes = codes / codes.sum(dim=1, keepdim=True).clamp_min(smallest)
    return codes


def swapped_prediction(scores: Tensor, codes: Tensor, *, temperature: float) -> Tensor:
    """Return the cross-entropy (global views, views) of predicting each global view's codes from each view (eq. 2).

    `scores` are (views, batch, prototypes), `codes` (global views, batch, prototypes); no gradient reaches the codes.
    """
    return cross_entropies(codes, F.log_softmax(scores / temperature, dim=2))
