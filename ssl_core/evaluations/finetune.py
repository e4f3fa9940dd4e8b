"""Fine-tuning: a classifier and the backbone trained on all labels or, as in semi-supervised papers, on few of them.

ReSSL freezes the backbone at 1 % of the labels and fine-tunes it at 10 %. SSLight fine-tunes, with the classifier on
the second layer of the projector. The seed draws the labelled images: a share of each class, or a number per class. The
results list their indices. Source: docs/sources.md#semi-supervised.

The stage `finetune` runs it, keeps the network and continues after an interruption.
"""

import copy
import math
from collections.abc import Callable, Iterator
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt
from torch import Tensor, nn

from ssl_core.config import Dataset, Training
from ssl_core.data.loader import draw_subset
from ssl_core.data.shards import Manifest, read_labels
from ssl_core.data.views import View
from ssl_core.evaluations.base import ImageConfig, Log, Outcome, Subjects, find_test_split
from ssl_core.evaluations.parts.features import (
    accuracies,
    center_view,
    draw_by_class,
    forward,
    frozen,
    make_loader,
    num_classes,
    read_split,
    training_view,
)
from ssl_core.evaluations.parts.projection import with_projector
from ssl_core.experiments.needs import Contract, Needs
from ssl_core.training.finetuning import FinetuneTrainer

# What each variant changes in the defaults of `Config`, which are ReSSL's at 1 %. All but `full` are published; it is a
# choice made here, for networks from scratch and small data too (docs/evaluations.md).
_FINE_TUNED = {"fraction": 0.1, "backbone_learning_rate": 0.02, "learning_rate": 0.2, "epochs": 20}
_STEPS = {"schedule": "step", "milestones": (12 / 20, 16 / 20), "decay_factor": 0.2, "epochs": 20}
_SSLIGHT = {
    "backbone_learning_rate": 0.03,
    "learning_rate": 0.03,
    "learning_rate_scaling": "linear",
    "minimum_learning_rate": 1e-6,
    "nesterov": True,
    "schedule_unit": "epoch",
    "batch_size": 1024,
    "interpolation": "cubic",
    "resize": 256 / 224,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "full": {**_FINE_TUNED, "fraction": 1.0, "learning_rate": 0.02, "batch_size": 64},
    "ressl_1": {},
    "ressl_10": _FINE_TUNED,
    "swav_1": {**_STEPS, "backbone_learning_rate": 0.02, "learning_rate": 5.0},
    "swav_10": {**_STEPS, **_FINE_TUNED, "backbone_learning_rate": 0.01},
    "sslight_1": _SSLIGHT,
    "sslight_10": {**_SSLIGHT, "fraction": 0.1, "epochs": 30},
}
ON_PROJECTOR = ("sslight_1", "sslight_10")  # their networks end in the first two layers of the projector


class Config(ImageConfig):
    """Settings of the training. `variant` gives a paper's settings, which other keys replace.

    The seed draws the labelled images, the views and the first weights of the classifier.
    """

    contract: ClassVar = Contract(
        rule="finetune", needs_by_key={"variant": {name: Needs(projector=True) for name in ON_PROJECTOR}}
    )
    published: ClassVar = VARIANTS

    protocol: Literal["finetune"] = "finetune"
    variant: Literal[*VARIANTS] = "full"  # pyright: ignore
    fraction: float = Field(default=0.01, gt=0, le=1)  # of each class's images, at least one
    labels_per_class: PositiveInt | None = None  # replaces the fraction
    backbone_learning_rate: NonNegativeFloat = 0.0  # 0: frozen, in eval mode
    learning_rate: PositiveFloat = 0.1  # of the classifier
    learning_rate_scaling: Literal["linear", "none"] = "none"  # linear: times batch_size / 256, also the backbone's
    minimum_learning_rate: NonNegativeFloat = 0.0  # at the end of the cosine; absolute
    momentum: NonNegativeFloat = 0.9
    nesterov: bool = False
    weight_decay: NonNegativeFloat = 0.0
    schedule: Literal["cosine", "step"] = "cosine"
    schedule_unit: Literal["step", "epoch"] = "step"  # how often the cosine moves
    milestones: tuple[PositiveFloat, ...] = (0.6, 0.8)  # shares of the run
    decay_factor: PositiveFloat = 0.2
    epochs: PositiveInt = 60
    batch_size: PositiveInt = 256  # not given for ReSSL; at most the number of labelled images
    area: tuple[PositiveFloat, PositiveFloat] = (0.08, 1.0)
    interpolation: Literal["linear", "cubic"] = "linear"
    checkpoint_minutes: PositiveFloat = 2.0

    def protocol_name(self) -> str:
        """Return the protocol's name with its variant, and the number of labels if it differs from the variant's."""
        original = type(self)(dataset=self.dataset, variant=self.variant)
        labels = f"-{self.labels_per_class}_a_class" if self.labels_per_class else ""
        if not labels and self.fraction != original.fraction:
            labels = f"-{100 * self.fraction:g}_percent"
        return f"finetune-{self.variant}{labels}/v1"


State = dict[str, Any]
Save = Callable[[State], None]


def run(config: Config, subjects: Subjects, manifest: Manifest, log: Log) -> Outcome:
    """Train a copy of each network on the same views of the same labelled images, and score it on the test split."""
    models, _ = train(config, subjects, manifest, {}, log=log, save=lambda state: None)
    return measure(config, subjects, manifest, models)


def train(
    config: Config, subjects: Subjects, manifest: Manifest, state: State, *, log: Log, save: Save
) -> tuple[dict[str, "Model"], float]:
    """Train a copy of each network, from `state` on; return them and the seconds of all steps.

    `save` stores a state from which a later call continues.
    """
    images = draw_labelled(manifest, config)
    if config.needs().projector:
        subjects = with_projector(subjects)
    classes = num_classes(manifest, config.dataset.split)
    view = training_view(subjects.image_size, config.area, manifest.avoid, interpolation=config.interpolation)
    whole = Dataset(name=config.dataset.name, split=config.dataset.split)
    batch_size = min(config.batch_size, len(images))
    options: Any = {"shuffle": True, "batch_size": batch_size, "seed": config.seed, "only": images}
    scale = rate_scale(config, batch_size)
    models = {
        name: Model(subjects.networks[name], width, classes, config, scale=scale, device=subjects.device)
        for name, width in _widths(subjects).items()
    }
    with make_loader(subjects, manifest, whole, view, **options) as loader:
        plan = list(shares(config, config.epochs * loader.steps_per_epoch))
        training = Training(batch_size=batch_size, checkpoint_minutes=config.checkpoint_minutes)
        trainer = FinetuneTrainer(models, loader, plan, training, device=torch.device(subjects.device))
        if state:
            trainer.restore(state)
        trainer.run(
            save=lambda: save(trainer.state()),
            log=lambda row: log({name: value for name, value in row.items() if name != "step"}, int(row["step"])),
        )
    return models, trainer.seconds


def measure(config: Config, subjects: Subjects, manifest: Manifest, models: dict[str, "Model"]) -> Outcome:
    """Score the trained networks on the test split."""
    split = find_test_split(config, manifest)
    images = draw_labelled(manifest, config)
    batch_size = min(config.batch_size, len(images))
    scale = rate_scale(config, batch_size)
    view = evaluation_view(config, subjects)
    flip = training_view(subjects.image_size, config.area, manifest.avoid).augmentation.flip
    logits = read_split(subjects, manifest, split, view, "finetune", networks=models)
    metrics = {name: accuracies(rows, logits.labels) for name, rows in logits.by_network.items()}
    hyperparameters = config.settings(
        overridden=config.overridden(),
        how="fixed by the configuration",
        labelled_images=len(images),
        backbone="fine-tuned" if config.backbone_learning_rate else "frozen",
        classifier_on="the projector's second layer" if config.needs().projector else "the backbone",
        backbone_learning_rate=config.backbone_learning_rate * scale,
        learning_rate=config.learning_rate * scale,
        batch_size=batch_size,
        flip=flip,
        image_size=subjects.image_size,
    )
    details = {"labelled_images": " ".join(map(str, images))}
    counts = (len(images), len(logits.labels))
    return Outcome(config.protocol_name(), split, metrics, hyperparameters, *counts, details=details)


def rate_scale(config: Config, batch_size: int) -> float:
    """Return the factor of the learning rates for a batch."""
    return batch_size / 256 if config.learning_rate_scaling == "linear" else 1.0


def evaluation_view(config: Config, subjects: Subjects) -> View:
    """Return the view of test images."""
    return center_view(subjects.image_size, resize=config.resize, interpolation=config.interpolation)


def draw_labelled(manifest: Manifest, config: Config) -> list[int]:
    """Draw the labelled images: the same share or number of each class; sorted indices in the split."""
    split = config.dataset.split
    count, subset = manifest.split(split).images, config.dataset.subset
    candidates = range(count) if subset is None else draw_subset(count, subset, manifest.dataset).tolist()
    per_class = config.labels_per_class

    def number(available: int) -> int:
        if per_class is None:
            return max(1, round(config.fraction * available))
        if per_class > available:
            raise ValueError(f"labels_per_class {per_class}: a class of '{split}' has {available} images: lower it")
        return per_class

    return draw_by_class(read_labels(manifest, split), candidates, number, config.seed)


class Model(nn.Module):
    """A copy of a network followed by a new classifier: (batch, 3, h, w) -> (batch, classes)."""

    def __init__(
        self, network: nn.Module, dim: int, classes: int, config: Config, *, scale: float = 1.0, device: str
    ) -> None:
        """Draw the classifier's weights from N(0, .01) by the seed; `scale` multiplies the learning rates."""
        super().__init__()
        self.backbone = copy.deepcopy(network)
        self.tuned = config.backbone_learning_rate > 0 and any(True for _ in network.parameters())
        self.backbone.requires_grad_(self.tuned)
        self.classifier = nn.Linear(dim, classes)
        nn.init.normal_(self.classifier.weight, std=0.01, generator=torch.Generator().manual_seed(config.seed))
        nn.init.zeros_(self.classifier.bias)
        self.classifier.to(device)
        groups = [{"params": list(self.classifier.parameters()), "lr": scale * config.learning_rate}]
        if self.tuned:
            groups.append({"params": list(self.backbone.parameters()), "lr": scale * config.backbone_learning_rate})
        optimizer = {"momentum": config.momentum, "nesterov": config.nesterov, "weight_decay": config.weight_decay}
        self.optimizer = torch.optim.SGD(groups, **optimizer)
        self.rates = [group["lr"] for group in groups]
        self.lowest = config.minimum_learning_rate

    def forward(self, images: Tensor) -> Tensor:
        """Return logits."""
        return self.classifier(self.backbone(images))

    def step(self, images: Tensor, labels: Tensor, share: float) -> Tensor:
        """Take one step at the fraction `share` of the learning rates' range and return the loss.

        A frozen backbone stays in eval mode.
        """
        if self.tuned:
            self.train()
            features = self.backbone(images)
        else:
            with frozen({"backbone": self.backbone}):
                features = self.backbone(images)
        for group, rate in zip(self.optimizer.param_groups, self.rates):
            group["lr"] = self.lowest + share * (rate - self.lowest)
        self.optimizer.zero_grad()
        loss = F.cross_entropy(self.classifier(features), labels)
        loss.backward()
        self.optimizer.step()
        return loss.detach()


def shares(config: Config, steps: int) -> Iterator[float]:
    """Yield the share of the learning rate for each of `steps` steps, a whole number of epochs."""
    for step in range(steps):
        done = step / steps
        if config.schedule_unit == "epoch":
            done = math.floor(done * config.epochs + 1e-9) / config.epochs
        if config.schedule == "cosine":
            yield (1 + math.cos(math.pi * done)) / 2
        else:
            yield config.decay_factor ** sum(done >= milestone for milestone in config.milestones)


def _widths(subjects: Subjects) -> dict[str, int]:
    """Return the number of features of each network."""
    image = torch.zeros(1, 3, subjects.image_size, subjects.image_size, device=subjects.device)
    return {name: features.shape[1] for name, features in forward(subjects.networks, image).items()}
