"""MoCo v2: momentum contrast (He et al., 2020; Chen et al., 2020), https://arxiv.org/abs/2003.04297.

The student's query must match the momentum teacher's key of the same image among the keys of a queue. Presets add
multi-crop with SSLight's view sampling (Tan et al., 2023, https://arxiv.org/abs/2210.02808) and the settings for small
networks of Shi et al. (2022, https://arxiv.org/abs/2107.14762). `smoothing` gives the loss of light-moco (Lin et al.,
2023, https://arxiv.org/abs/2212.07158).
"""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Self

import torch
import torch.nn.functional as F
from pydantic import Field, PositiveFloat, PositiveInt, model_validator
from torch import Tensor, nn

from ssl_core.blocks import distributed
from ssl_core.blocks.losses import info_nce
from ssl_core.blocks.momentum import MomentumTeacher, shuffled_embedding
from ssl_core.blocks.multicrop import SIX_LOCALS, SSLIGHT, SSLIGHT_TRAINING, MultiCrop, encode, local_views
from ssl_core.blocks.queue import Queue, check_queue_size
from ssl_core.data.batch import Batch
from ssl_core.data.views import POLICIES, Augmentation, Probability, View, Views
from ssl_core.methods.base import Losses, Memory, Method, MethodConfig, Preset, Progress, full_precision
from ssl_core.networks.backbones import Network, load_strictly, read_tensors
from ssl_core.networks.heads import PROJECTOR, mlp


class Config(MultiCrop, MethodConfig):
    """Defaults: the CIFAR baseline of SSQL and Cao & Wu (docs/sources.md#moco); local views are further queries."""

    name: Literal["moco"] = "moco"
    preset: Literal["small", "moco_v2", "notebook", "sslight_baseline", "sslight", "shi", "light"] = "small"
    temperature: PositiveFloat = 0.2
    # Share of the target that the keys of the queue nearest to the query get, and their number (light-moco).
    smoothing: float = Field(default=0.0, ge=0, lt=1)
    smoothing_neighbours: PositiveInt = 20
    queue_size: PositiveInt = 2048
    teacher_momentum: Probability = 0.999
    final_teacher_momentum: Probability | None = None  # at the end of a cosine; None: constant
    # Each view is query and key: the sum of both directions (MoCo's notebook) or their mean (solo-learn).
    symmetric: Literal["sum", "mean"] | None = None
    projector_layers: PositiveInt = 2
    projector_hidden: PositiveInt | Literal["d", "2d"] = 2048  # d: the width of the features
    projector_dropout: float = Field(default=0.0, ge=0, lt=1)  # in front of the last layer (ablation of Shi et al.)
    projector_weights: Literal["default", "truncated_normal"] = "default"  # the latter with zero biases (SSLight)
    embedding_dim: PositiveInt = 256
    # Parts of the global batch with separate BatchNorm statistics, with the keys shuffled across them.
    batchnorm_splits: PositiveInt = 4
    area: tuple[float, float] = (0.2, 1.0)
    interpolation: Literal["linear", "cubic"] = "linear"
    query_augmentation: Augmentation = POLICIES["contrastive_no_blur"]
    key_augmentation: Augmentation = POLICIES["contrastive_no_blur"]
    local_augmentation: Augmentation = POLICIES["contrastive_no_blur"]
    # A backbone.safetensors or model.safetensors with initial weights, e.g. distilled ones (Shi et al., section 3.4).
    initial: Path | None = None

    @model_validator(mode="after")
    def _queue_has_the_neighbours(self) -> Self:
        if self.smoothing and self.smoothing_neighbours > self.queue_size:
            raise ValueError(
                f"smoothing_neighbours {self.smoothing_neighbours} must not be above queue_size {self.queue_size}"
            )
        return self

    def ineffective(self) -> Mapping[str, str]:
        """Return the key that a target without smoothing does not use."""
        return {} if self.smoothing else {"smoothing_neighbours": "smoothing is 0; set it, for example to 0.2"}


_OFFICIAL = {
    "queue_size": 65536, "projector_hidden": "d", "embedding_dim": 128, "batchnorm_splits": 8,
    "query_augmentation": "contrastive", "key_augmentation": "contrastive",
}  # fmt: skip
_SSLIGHT = {
    "queue_size": 65536, "projector_weights": "truncated_normal", "embedding_dim": 128, "batchnorm_splits": 1,
    "interpolation": "cubic", "key_augmentation": "dino_global_first", "query_augmentation": "dino_global_second",
    "local_augmentation": "dino_local",  # DINO's colours, as in the code (docs/sources.md#sslight-moco-colours)
}  # fmt: skip
_SGD = {
    "optimizer": "sgd", "learning_rate_scaling": "none", "weight_decay": 1e-4, "warmup_epochs": 0,
    "schedule_unit": "epoch",
}  # fmt: skip
_LARS = {**SSLIGHT_TRAINING, "learning_rate": 0.48}

PRESETS = {
    "small": Preset(
        method={}, training={**_SGD, "learning_rate": 0.3, "batch_size": 256, "epochs": 400},
        source="SSQL's baseline on CIFAR, also Cao & Wu's (docs/sources.md#moco)",
    ),
    "moco_v2": Preset(
        method=_OFFICIAL, training={**_SGD, "learning_rate": 0.03, "batch_size": 256, "epochs": 200},
        source="MoCo v2, paper and code, ImageNet (docs/sources.md#moco)",
    ),
    "notebook": Preset(  # the authors' CIFAR-10 notebook: kNN 82.6 % after 200 epochs, 85.3 % with `symmetric: sum`
        method={
            "temperature": 0.1, "queue_size": 4096, "teacher_momentum": 0.99, "projector_layers": 1,
            "embedding_dim": 128, "batchnorm_splits": 8, "area": (0.08, 1.0),
        },
        training={**_SGD, "learning_rate": 0.06, "weight_decay": 5e-4, "batch_size": 512, "epochs": 200},
        source="MoCo's CIFAR-10 notebook (docs/sources.md#moco)",
    ),
    "sslight_baseline": Preset(
        method={**_SSLIGHT, **SIX_LOCALS}, training=_LARS,
        source="SSLight's code without its view sampling (docs/sources.md#moco-multicrop)", networks="convolutional",
    ),  # MoCo v2* in the paper
    "sslight": Preset(
        method={**_SSLIGHT, **SSLIGHT}, training=_LARS,
        source="SSLight's code (docs/sources.md#moco-multicrop)", networks="convolutional",
    ),
    "shi": Preset(
        method={
            **_OFFICIAL, "temperature": 0.1, "projector_hidden": "2d", "query_augmentation": "aug_plus",
            "key_augmentation": "aug_plus",
        },
        training={**_SGD, "learning_rate": 0.06, "batch_size": 512, "epochs": 800},
        source="Shi et al., improved, 800 epochs (docs/sources.md#shi)",
    ),
    "light": Preset(  # the code has the loss and these options, the paper's settings are not known here
        method={
            **_OFFICIAL, "temperature": 0.1, "projector_hidden": 2048, "symmetric": "sum", "smoothing": 0.2,
        },
        training={**_SGD, "learning_rate": 0.12, "batch_size": 512, "epochs": 200, "warmup_epochs": 3},
        source="chosen here: light-moco's loss with the options of its code (docs/sources.md#light-moco)",
    ),
}  # fmt: skip


class MoCo(Method):
    """Student, momentum teacher, and a queue of the teacher's past embeddings (keys)."""

    Config = Config
    fixed_views = ("query", "key")

    def __init__(self, config: Config, backbone: Network, *, num_images: int, batch_size: int, seed: int) -> None:
        super().__init__(config, backbone, num_images=num_images, batch_size=batch_size, seed=seed)
        check_queue_size(config.queue_size, num_images)
        self.config = config
        self.projector = _projector(config, backbone.num_features)
        if config.initial is not None:
            start_from(config.initial, self.backbone, self.projector)
        self.split_batchnorm(config.batchnorm_splits)
        self.teacher = MomentumTeacher(
            self.backbone,
            self.projector,
            momentum=config.teacher_momentum,
            final_momentum=config.final_teacher_momentum,
        )
        self.queue = Queue(config.queue_size, config.embedding_dim)

    @staticmethod
    def views(config: Config, image_size: int) -> Views:
        """Return one view for the query, one for the key and, with multi-crop, local views for further queries."""
        query_networks, key_networks = ("student",), ("teacher",)
        if config.symmetric:
            query_networks = key_networks = ("student", "teacher")
        shared: Any = {"size": image_size, "area": config.area, "interpolation": config.interpolation}
        return {
            "query": View(augmentation=config.query_augmentation, seen_by=query_networks, **shared),
            "key": View(augmentation=config.key_augmentation, seen_by=key_networks, **shared),
            **local_views(config, image_size, config.local_augmentation, interpolation=config.interpolation),
        }

    def forward(self, batch: Batch, progress: Progress) -> Losses:
        """Return the contrast of each global view with the key of the other, and of local views with every key."""
        (first,), (second,), small = batch.views["query"], batch.views["key"], batch.views.get("local", [])
        query, *locals_ = self._queries([first, *small])
        queries, keys = [query], [self._key(second, progress.step)]
        if self.config.symmetric:
            queries += self._queries([second])
            keys.append(self._key(first, progress.step))
        with full_precision(query):
            total, parts = self._losses(queries, locals_, keys)
        stacked = torch.stack(keys[::-1])  # (directions, batch, dim); the first view's first, as in MoCo's notebook
        return Losses(total, parts, embedding=query.detach(), memory={"keys": stacked})

    def _losses(
        self, queries: list[Tensor], locals_: list[Tensor], keys: list[Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        total = self._contrast(queries, keys)
        parts = {"global": total.detach()}
        if locals_:
            every = torch.cat(locals_)  # (num_locals * batch, dim)
            contrast = self._contrast([every] * len(keys), [key.repeat(len(locals_), 1) for key in keys])
            parts["local"] = contrast.detach()
            alpha = 1 / (1 + len(locals_)) if self.config.alpha is None else self.config.alpha
            total = alpha * total + (1 - alpha) * contrast  # SSLight eq. 3
        return total, parts

    def _contrast(self, queries: list[Tensor], keys: list[Tensor]) -> Tensor:
        """Return InfoNCE, smoothed if so set, against the queue of earlier batches, over the directions."""
        temperature, smoothing = self.config.temperature, self.config.smoothing
        losses = []
        for query, key in zip(queries, keys, strict=True):
            if smoothing:
                neighbours = self.config.smoothing_neighbours
                loss = smoothed_info_nce(
                    query, key, self.queue.rows, temperature=temperature, smoothing=smoothing, neighbours=neighbours
                )
            else:
                loss = info_nce(query, key, self.queue.rows, temperature=temperature)
            losses.append(loss)
        directions = torch.stack(losses)
        return directions.sum() if self.config.symmetric == "sum" else directions.mean()

    def _queries(self, views: list[Tensor]) -> list[Tensor]:
        embedding = self.projector(encode(self.backbone, views))
        return [*F.normalize(embedding.float(), dim=1).chunk(len(views))]  # q of each view: (batch, dim)

    def _key(self, view: Tensor, step: int) -> Tensor:
        splits = self.config.batchnorm_splits
        return shuffled_embedding(self.teacher, view, splits=splits, seed=self.seed, step=step)  # k: (batch, dim)

    @torch.no_grad()
    def after_step(self, progress: Progress, memories: Sequence[Memory]) -> None:
        """Move the teacher towards the student and put the keys of this step into the queue."""
        self.teacher.update(self.backbone, self.projector, fraction=progress.fraction)
        for memory in memories:
            for keys in memory["keys"]:
                self.queue.enqueue(distributed.gather(keys))


def smoothed_info_nce(
    query: Tensor, key: Tensor, queue: Tensor, *, temperature: float, smoothing: float, neighbours: int
) -> Tensor:
    """Return InfoNCE whose target is shared: 1 - smoothing for the key, the rest for the nearest keys of the queue.

    `query` and `key` are (batch, dim), `queue` (size, dim), all with unit rows. The `neighbours` keys of the queue that
    are most similar to the query get equal shares (docs/sources.md#light-moco).
    """
    positive = (query * key).sum(dim=1, keepdim=True)
    negatives = query @ queue.T
    log_prediction = F.log_softmax(torch.cat([positive, negatives], dim=1) / temperature, dim=1)  # (batch, 1 + size)
    nearest = negatives.topk(neighbours, dim=1).indices
    shared = log_prediction[:, 1:].gather(1, nearest).mean(dim=1)
    return -((1 - smoothing) * log_prediction[:, 0] + smoothing * shared).mean()


def start_from(path: Path, backbone: nn.Module, projector: nn.Module) -> None:
    """Load a backbone.safetensors, or a model.safetensors including its projector if the shapes agree.

    Raises `ValueError` for a backbone that does not fit; prints a warning if the projector is not loaded.
    """
    weights, header = read_tensors(path)
    if "backbone" in header:
        weights = {name if name.startswith(PROJECTOR) else f"backbone.{name}": rows for name, rows in weights.items()}
    parts: dict[str, dict[str, Tensor]] = {"backbone": {}, "projector": {}}
    for name, weight in weights.items():
        part, _, rest = name.partition(".")
        parts.setdefault(part, {})[rest] = weight
    load_strictly(backbone, parts["backbone"], path)
    shapes = {name: weight.shape for name, weight in parts["projector"].items()}
    if shapes == {name: weight.shape for name, weight in projector.state_dict().items()}:
        projector.load_state_dict(parts["projector"])
    elif distributed.rank() == 0:
        print(
            f"method.initial: {path} has no projector of these shapes, the projector's initial weights are random",
            file=sys.stderr,
        )


def _projector(config: Config, width: int) -> nn.Sequential:
    hidden = {"d": width, "2d": 2 * width}.get(str(config.projector_hidden), config.projector_hidden)
    hidden_widths = [int(hidden)] * (config.projector_layers - 1)
    projector = mlp([width, *hidden_widths, config.embedding_dim], batch_norm=False)
    if config.projector_dropout:
        projector.insert(len(projector) - 1, nn.Dropout(config.projector_dropout))
    if config.projector_weights == "truncated_normal":
        for layer in projector:
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)
    return projector
