"""Linear probe: softmax regression on the frozen, pooled features of a backbone.

See docs/sources.md#linear-probe and, for transfer, docs/sources.md#transfer-probe. Backbones stay in eval mode. The
pre-trained network, the untrained network and raw pixels get the same views in one pass, and several learning rates
train side by side on one forward pass. A learning rate is chosen on held-out training images. The test split chooses
nothing but the secondary metric `best_epoch_top1`.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt
from torch import Tensor, nn

from ssl_core.config import Training
from ssl_core.data.loader import Loader
from ssl_core.data.shards import Manifest
from ssl_core.data.views import View
from ssl_core.evaluations.base import FrozenConfig, Log, Outcome, Precision, Subjects, find_test_split
from ssl_core.evaluations.parts.features import (
    Features,
    center_view,
    count_images,
    forward,
    hold_out,
    make_loader,
    num_classes,
    read_split,
    training_view,
)
from ssl_core.evaluations.parts.probe import Probe, read_out
from ssl_core.progress import progress_bar


class Epochs(NamedTuple):
    """Training batches: `batches()` is one epoch of (features by network, labels, indices)."""

    batches: Callable[[], Iterator[tuple[Mapping[str, Tensor], Tensor, Tensor]]]
    num_images: int
    batch_size: int
    steps: int


# Settings of each published probe that differ from the defaults of `Config`, which are ReSSL's on small data. SimCLR's
# are from its appendix B.6. Milestones are shares of the run, so that a shorter run decays in proportion.
_IMAGENET = {"resize": 256 / 224}
_COSINE = {**_IMAGENET, "learning_rate_scaling": "linear", "schedule": "cosine"}
_BY_STEP = {**_COSINE, "learning_rate": 0.1, "nesterov": True, "schedule_unit": "step", "epochs": 90}
_LARGE_BATCH = {**_COSINE, "batch_size": 4096, "interpolation": "cubic"}
VARIANTS: dict[str, dict[str, Any]] = {
    "ressl_small": {},  # as its author describes it; learning rate 1 with a cosine is slightly better
    "ressl_imagenet": _BY_STEP,
    "ressl_imagenet_code": {**_IMAGENET, "learning_rate": 0.3, "schedule": "cosine", "schedule_unit": "step"},
    "moco": {**_IMAGENET, "learning_rate": 30.0},
    "disco": {**_IMAGENET, "learning_rate": 3.0},
    "jigclu": _IMAGENET,
    "simclr": {**_BY_STEP, "batch_size": 4096, "interpolation": "cubic"},
    "simsiam": {**_COSINE, "optimizer": "larc", "learning_rate": 0.1, "epochs": 90, "batch_size": 4096},
    "sslight": {**_LARGE_BATCH, "optimizer": "lars", "learning_rate": 0.05, "minimum_learning_rate": 1e-6},
    "sslight_vit": {
        **_LARGE_BATCH,
        "learning_rate": 0.01,
        "minimum_learning_rate": 1e-5,  # the paper; the code has 1e-6 and batches of 1,024
        "last_blocks": 4,
    },
    "dino": {**_COSINE, "learning_rate": 0.001, "batch_size": 1024},
    "dino_vit": {**_COSINE, "learning_rate": 0.001, "batch_size": 1024, "last_blocks": 4},
    "cao_wu": {
        "learning_rate": 30.0,
        "batch_size": 512,
        "area": (0.8, 1.0),
        "interpolation": "cubic",
        "resize": 36 / 32,
    },
    "ssql": {**_IMAGENET, "optimizer": "larc", "learning_rate": 0.8, "schedule": "cosine", "epochs": 60},
    "shi_transfer": {  # at 224 pixels: set `image_size: 224` for a backbone pre-trained on smaller images
        **_IMAGENET,
        "learning_rate": 1.5,
        "milestones": (40 / 60,),
        "epochs": 60,
        "area": (0.6, 1.0),
        "interpolation": "cubic",
        "normalize": True,
    },
    "features": {
        "cached": True,
        "learning_rate": (30.0, 10.0, 3.0, 1.0, 0.3, 0.1),
    },  # no augmentation: another protocol
}


class Config(FrozenConfig):
    """Settings of a probe. `variant` gives a paper's settings, which other keys replace.

    The seed draws the views, the first weights of the classifier and the held-out images.
    """

    published: ClassVar = VARIANTS

    protocol: Literal["linear"] = "linear"
    variant: Literal[*VARIANTS] = "ressl_small"  # pyright: ignore
    # Several learning rates: one is chosen on held-out training images.
    learning_rate: PositiveFloat | tuple[PositiveFloat, ...] = 10.0
    learning_rate_scaling: Literal["linear", "none"] = "none"
    minimum_learning_rate: NonNegativeFloat = 0.0
    optimizer: Literal["sgd", "lars", "larc"] = "sgd"
    momentum: NonNegativeFloat = 0.9
    nesterov: bool = False
    weight_decay: NonNegativeFloat = 0.0
    schedule: Literal["cosine", "step"] = "step"
    schedule_unit: Literal["step", "epoch"] = "epoch"
    milestones: tuple[PositiveFloat, ...] = (0.6, 0.8)  # shares of the run
    decay_factor: PositiveFloat = 0.1
    epochs: PositiveInt = 100
    batch_size: PositiveInt = 256  # at most the number of training images
    holdout: float = Field(default=0.1, gt=0, lt=1)  # share of the training images that chooses the learning rate
    cached: bool = False  # train on features of center crops, extracted once, instead of augmented images
    area: tuple[PositiveFloat, PositiveFloat] = (0.08, 1.0)
    flip: float | None = Field(default=None, ge=0, le=1)  # default: .5, or 0 where the data set's card avoids it
    interpolation: Literal["linear", "cubic"] = "linear"
    normalize: bool = False  # L2-normalise features before the classifier
    last_blocks: int = Field(
        default=0, ge=0
    )  # vision transformers: features are the class tokens of this many last blocks

    def protocol_name(self) -> str:
        """Return the protocol's name with its variant; `overridden` in the results lists changes to the variant."""
        variant = self.variant if self.variant == "features" or not self.cached else f"{self.variant}-features"
        return "linear/v1" if variant == "ressl_small" else f"linear-{variant}/v1"

    def rates(self) -> tuple[float, ...]:
        """Return the learning rates that train side by side, before scaling."""
        return self.learning_rate if isinstance(self.learning_rate, tuple) else (self.learning_rate,)

    def chooses_rate(self) -> bool:
        """Return whether there are several learning rates to choose from."""
        return len(self.rates()) > 1


def run(config: Config, subjects: Subjects, manifest: Manifest, log: Log) -> Outcome:
    """Train the probe on each network's features and score it on the test split."""
    split = find_test_split(config, manifest)
    networks = {name: read_out(network, config.last_blocks) for name, network in subjects.networks.items()}
    center = center_view(subjects.image_size, resize=config.resize, interpolation=config.interpolation)
    options: Any = {"networks": networks, "precision": config.precision}
    test = read_split(subjects, manifest, split, center, "linear", **options)
    train, held_out = None, None
    if config.cached or config.chooses_rate():
        train = read_split(subjects, manifest, config.dataset, center, "linear", **options)
    if train is not None and config.chooses_rate():
        held_out = hold_out(train.indices, config.holdout, config.seed)

    view = training_view(
        subjects.image_size, config.area, manifest.avoid, interpolation=config.interpolation, flip=config.flip
    )
    with _epochs(networks, subjects, manifest, config, view, train) as epochs:
        classes = num_classes(manifest, config.dataset.split)
        plans = [plan(config, rate, epochs.batch_size) for rate in config.rates()]
        options = {"seed": config.seed, "steps_per_epoch": epochs.steps, "normalize": config.normalize}
        probes = {
            name: Probe(rows.shape[1], classes, plans, **options, device=subjects.device)
            for name, rows in test.by_network.items()
        }
        curves = _train(probes, epochs, test, held_out, config, log)
    metrics, rates = {}, {}
    for name, probe in probes.items():
        chosen = probe.choose(train, name, held_out) if train is not None and held_out is not None else 0
        best_epoch = max(scores[chosen]["top1"] for scores in curves[name])
        metrics[name] = {**curves[name][-1][chosen], "best_epoch_top1": best_epoch}
        rates[name] = probe.rates[chosen]
    settings = _settings(config, view, epochs.batch_size, rates)
    return Outcome(config.protocol_name(), split, metrics, settings, epochs.num_images, len(test.labels))


def _settings(config: Config, view: View, batch_size: int, rates: Mapping[str, float]) -> dict[str, Any]:
    """Return the hyper-parameters as they were used, and how the learning rates were chosen."""
    overridden = config.overridden()
    how = "fixed by the configuration" if "learning_rate" in overridden else "fixed by the protocol"
    if config.chooses_rate():
        candidates = ", ".join(f"{rate:g}" for rate in config.rates())
        how = f"of {candidates} the best on {100 * config.holdout:g} % of the training images, held out by the seed"
    settings = config.settings(
        image_size=view.size,
        batch_size=batch_size,
        learning_rate=dict(rates),
        flip=view.augmentation.flip,
        how=how,
        overridden=overridden,
    )
    if config.cached:  # nothing was augmented
        del settings["area"], settings["flip"]
    return settings


def plan(config: Config, rate: float, batch_size: int) -> Training:
    """Return the probe's optimisation as settings of the training loop, whose optimizers and schedules it shares."""
    return Training(
        epochs=config.epochs,
        batch_size=batch_size,
        optimizer="sgd" if config.optimizer == "sgd" else "lars",
        # LARC in SwAV and SimSiam is LARS that also scales the bias; SSLight's LARS leaves the bias out.
        decay_exclusion="norm_bias" if config.optimizer == "lars" else "none",
        learning_rate=rate,
        learning_rate_scaling=config.learning_rate_scaling,
        minimum_learning_rate=config.minimum_learning_rate,
        momentum=config.momentum,
        nesterov=config.nesterov,
        weight_decay=config.weight_decay,
        schedule=config.schedule,
        schedule_unit=config.schedule_unit,
        milestones=tuple(max(1, round(share * config.epochs)) for share in config.milestones),
        decay_factor=config.decay_factor,
        warmup_epochs=0,
    )


def _train(
    probes: Mapping[str, Probe], epochs: Epochs, test: Features, held_out: Tensor | None, config: Config, log: Log
) -> dict[str, list[list[dict[str, float]]]]:
    """Run all epochs; return the test accuracies by network, epoch and learning rate."""
    curves: dict[str, list[list[dict[str, float]]]] = {name: [] for name in probes}
    nothing = torch.empty(0, dtype=torch.int64)
    with progress_bar(config.epochs, "linear", unit="epochs") as progress:
        for epoch in range(config.epochs):
            for features, labels, indices in epochs.batches():
                keep = ~torch.isin(indices, nothing if held_out is None else held_out).to(labels.device)
                for name, probe in probes.items():
                    probe.step(features[name], labels, keep)
            for name, probe in probes.items():
                curves[name].append(probe.scores(test.by_network[name], test.labels))
            if held_out is None:  # else the learning rate is chosen after the last epoch
                now = {name: scores[-1][0]["top1"] for name, scores in curves.items()}
                progress.set_postfix({name: f"{value:.1f}" for name, value in now.items()})
                log({f"{config.protocol_name()}/{name}_top1": value for name, value in now.items()}, epoch)
            progress.update()
    return curves


@contextmanager
def _epochs(
    networks: Mapping[str, nn.Module],
    subjects: Subjects,
    manifest: Manifest,
    config: Config,
    view: View,
    train: Features | None,
) -> Iterator[Epochs]:
    """Yield the training batches: shuffled cached features, or features of newly augmented images per epoch."""
    batch_size = min(config.batch_size, count_images(manifest, config.dataset))
    if train is not None and config.cached:
        yield _cached(train, batch_size, config.seed, subjects.device)
        return
    options: Any = {"shuffle": True, "batch_size": batch_size, "seed": config.seed}
    with make_loader(subjects, manifest, config.dataset, view, **options) as loader:
        yield _augmented(networks, loader, batch_size, subjects.device, config.precision)


def _augmented(
    networks: Mapping[str, nn.Module], loader: Loader, batch_size: int, device: str, precision: Precision
) -> Epochs:
    """Return batches whose features all networks compute from the same augmented views."""

    def batches() -> Iterator[tuple[Mapping[str, Tensor], Tensor, Tensor]]:
        for batch in loader.epoch():
            ((images,),) = batch.views.values()
            yield forward(networks, images, precision), batch.labels.to(device), batch.indices.cpu()

    return Epochs(batches, loader.num_images, batch_size, loader.steps_per_epoch)


def _cached(train: Features, batch_size: int, seed: int, device: str) -> Epochs:
    """Return shuffled batches of cached features; the last batch of an epoch may be smaller."""
    num_images = len(train.labels)
    generator = torch.Generator().manual_seed(seed)

    def batches() -> Iterator[tuple[Mapping[str, Tensor], Tensor, Tensor]]:
        for rows in torch.randperm(num_images, generator=generator).split(batch_size):
            features = {name: features[rows].to(device) for name, features in train.by_network.items()}
            yield features, train.labels[rows].to(device), train.indices[rows]

    return Epochs(batches, num_images, batch_size, -(-num_images // batch_size))
