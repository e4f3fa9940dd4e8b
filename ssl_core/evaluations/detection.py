"""Detection and segmentation: fine-tune a detector with the backbone inside, and measure its average precision.

Sources: docs/sources.md#detection. The stage `detect` runs it, since it trains for hours and is continued after an
interruption. The same network from scratch, `untrained`, is trained by the same schedule on the same images. Both see
the training split once per network; the test split chooses nothing.
"""

import copy
import hashlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
import torch
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator
from torch import nn

from ssl_core.blocks import distributed
from ssl_core.config import Backbone, Dataset, Training
from ssl_core.data.detection_loader import DetectionLoader, Transform
from ssl_core.data.shards import Manifest
from ssl_core.evaluations.base import Log, Outcome, ProtocolConfig, Subjects, find_test_split
from ssl_core.evaluations.parts.average_precision import Detections, average_precision
from ssl_core.experiments.needs import Contract, Needs
from ssl_core.networks.batchnorm import synchronise_batchnorm
from ssl_core.networks.detectors import RESNETS, TAPS, build_detector
from ssl_core.progress import progress_bar
from ssl_core.training.detection import DetectionTrainer, Schedule, to_device
from ssl_core.training.precision import autocast_type

State = dict[str, Any]
SHORT_SIDES = tuple(range(480, 801, 32))
COCO_SIDES = tuple(range(640, 801, 32))
SHOWN_SCORE = 0.3  # pictures show detections from this score on

_C4 = {"head": "c4", "precise_batches": 200}
_VOC = {
    **_C4,
    "warmup_iterations": 100,
    "milestones": (3 / 4, 11 / 12),
    "short_sides": SHORT_SIDES,
    "masks": False,
}
_COCO = {"warmup_iterations": 1000, "milestones": (2 / 3, 8 / 9), "short_sides": COCO_SIDES, "masks": True}
_FULL = {"batch_size": 16, "learning_rate": 0.02, "regions": 512, "test_side": 800, "longest": 1333}
_FULL |= {"train_proposals": None, "test_proposals": None}
VARIANTS: dict[str, dict[str, Any]] = {
    "voc07_c4": {**_FULL, **_VOC, "iterations": 9_000},
    "voc0712_c4": {**_FULL, **_VOC, "iterations": 24_000},
    "coco_c4_1x": {**_FULL, **_COCO, **_C4, "iterations": 90_000},
    "coco_c4_2x": {**_FULL, **_COCO, **_C4, "iterations": 180_000},
    "coco_fpn_1x": {**_FULL, **_COCO, "iterations": 90_000},
    "coco_fpn_2x": {**_FULL, **_COCO, "iterations": 180_000},
    "short": {},
}
_BOXES = {"labels": "several", "boxes": True}
_FPN_NEEDS = Needs(**_BOXES, backbones=(*RESNETS, *TAPS))
_C4_NEEDS = Needs(**_BOXES, backbones=RESNETS)
_ANY_SPLIT = {"test_split": "any"}  # `short` may test on the images that train, to see whether a network fits them


class Config(ProtocolConfig):
    """Settings of the training. `variant` gives published settings, which other keys replace; the defaults are `short`.

    `short` is a schedule for a laptop, not a published one: 2,000 iterations of 4 images of at most 224 pixels. The
    seed draws the new layers, the order, sizes and flips of the images, and the proposals that train.
    """

    contract: ClassVar = Contract(
        rule="detect",
        needs=_FPN_NEEDS.model_copy(update=_ANY_SPLIT),
        needs_by_key={
            "variant": {
                name: _C4_NEEDS if settings.get("head") == "c4" else _FPN_NEEDS
                for name, settings in VARIANTS.items()
                if name != "short"
            },
            "head": {"c4": _C4_NEEDS.model_copy(update=_ANY_SPLIT)},
        },
    )
    published: ClassVar = VARIANTS

    protocol: Literal["detection"] = "detection"
    variant: Literal[*VARIANTS] = "short"  # pyright: ignore
    test_split: str | None = None  # default: test, else val
    head: Literal["c4", "fpn"] = "fpn"
    masks: bool = False
    iterations: PositiveInt = 2_000
    batch_size: PositiveInt = 4  # of all processes together
    learning_rate: PositiveFloat = 0.01  # not scaled by the batch size
    momentum: NonNegativeFloat = 0.9
    weight_decay: NonNegativeFloat = 1e-4  # norms have none
    warmup_iterations: NonNegativeInt = 100
    warmup_factor: float = Field(default=0.001, ge=0, le=1)
    milestones: tuple[PositiveFloat, ...] = (0.75, 0.9)  # shares of the run
    decay_factor: PositiveFloat = 0.1
    gradient_clip: PositiveFloat | None = None
    short_sides: tuple[PositiveInt, ...] = (160, 192, 224)  # pixels of the shorter side in training; one is drawn
    test_side: PositiveInt = 192
    longest: PositiveInt = 320  # pixels of the longer side at most
    flip: float = Field(default=0.5, ge=0, le=1)
    regions: PositiveInt = 128  # proposals per image that train the head
    # Proposals per image after non-maximum suppression; None: as published for the head.
    train_proposals: PositiveInt | None = 500
    test_proposals: PositiveInt | None = 200
    precise_batches: NonNegativeInt = 50  # after training, batch norm gets the mean statistics of so many batches
    untrained: bool = True  # whether the network from scratch is trained beside
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    gpus: PositiveInt = 1  # processes; batch norm is synchronised over them
    checkpoint_minutes: PositiveFloat = 2.0
    pictures: NonNegativeInt = 8  # test images that are drawn with their detections

    @model_validator(mode="after")
    def _divide(self) -> "Config":
        if self.batch_size % self.gpus:
            raise ValueError(f"batch_size {self.batch_size} is not a multiple of gpus {self.gpus}: change one of them")
        late = [milestone for milestone in self.milestones if milestone >= 1]
        if late:
            raise ValueError(f"milestones are shares of the run below 1, found {late[0]:g}")
        return self

    def protocol_name(self) -> str:
        """Return the protocol's name with its variant; `overridden` in the results lists changes to the variant."""
        return f"detection-{self.variant}/v1"

    def training(self) -> Training:
        """Return the settings of the loop."""
        keys = ("batch_size", "learning_rate", "momentum", "weight_decay", "gradient_clip", "precision", "gpus", "seed")
        shared = {key: getattr(self, key) for key in (*keys, "checkpoint_minutes")}
        return Training(**shared, learning_rate_scaling="none")

    def schedule(self) -> Schedule:
        """Return the learning rate per iteration."""
        keys = ("iterations", "learning_rate", "warmup_iterations", "warmup_factor", "milestones", "decay_factor")
        return Schedule(**{key: getattr(self, key) for key in keys})

    def networks(self) -> tuple[str, ...]:
        """Return the names of the networks to train."""
        return ("pretrained", "untrained") if self.untrained else ("pretrained",)


def train(
    config: Config, subjects: Subjects, manifest: Manifest, state: State, *, log: Log, save: Callable[[State], None]
) -> dict[str, State]:
    """Train the detector of each network, from `state` on; return their weights by network.

    `save` stores a state from which a later call continues; all processes call it.
    """
    finished: dict[str, State] = state.get("finished", {})
    for name in config.networks():
        if name in finished:
            continue
        with _loader(config, manifest, subjects) as loader:
            detector = build(config, subjects, manifest, name)
            if distributed.is_distributed():
                synchronise_batchnorm(detector, cuda=subjects.device == "cuda")
            device = torch.device(subjects.device)
            options: dict[str, Any] = {"task": f"detection, {name}", "device": device}
            trainer = DetectionTrainer(detector, loader, config.training(), config.schedule(), **options)
            if state.get("network") == name:
                trainer.restore(state["trainer"])
            interrupted = {"finished": finished, "network": name}
            trainer.run(save=_Saver(save, interrupted, trainer), log=_Logger(log, name))
            trainer.refine_norms(config.precise_batches)
        weights = {key: value.cpu() for key, value in detector.state_dict().items()}
        finished = {**finished, name: weights}
        save({"finished": finished})
    return finished


class _Saver(NamedTuple):
    """Saves the state of a trainer beside the networks that are finished."""

    save: Callable[[State], None]
    interrupted: State
    trainer: DetectionTrainer

    def __call__(self) -> None:
        self.save({**self.interrupted, "trainer": self.trainer.state()})


class _Logger(NamedTuple):
    """Logs the history of one network."""

    log: Log
    network: str

    def __call__(self, row: dict[str, float]) -> None:
        values = {f"{self.network} {name}": value for name, value in row.items() if name != "step"}
        self.log(values, int(row["step"]))


def measure(config: Config, subjects: Subjects, manifest: Manifest, weights: Mapping[str, State]) -> Outcome:
    """Score the trained detectors on the test split, in one process."""
    split = find_test_split(config, manifest)
    metrics, drawing = {}, {}
    with _loader(config, manifest, subjects) as loader:
        num_train = loader.num_images
    transform = Transform(short_sides=(config.test_side,), longest=config.longest)
    options: dict[str, Any] = {"batch_size": 1, "training": False, "masks": config.masks, "threads": subjects.threads}
    same = split == config.dataset.split  # then the subset that trains is tested, to see whether it is fitted
    dataset = config.dataset if same else Dataset(name=config.dataset.name, split=split)
    with DetectionLoader(manifest, dataset, transform, **options) as loader:
        for name, state in weights.items():
            detector = build(config, subjects, manifest, name).to(subjects.device).eval()
            detector.load_state_dict(state)
            pairs = _detect(config, detector, loader, subjects.device, name, drawing if name == "pretrained" else {})
            metrics[name] = average_precision(pairs, masks=config.masks)
        num_test = loader.num_images
    settings = config.settings(overridden=config.overridden(), how="fixed by the configuration")
    details = {"weights_sha256": {name: _digest(state) for name, state in weights.items()}}
    counts = (num_train, num_test)
    return Outcome(config.protocol_name(), split, metrics, settings, *counts, "ap", details=details, drawing=drawing)


def build(config: Config, subjects: Subjects, manifest: Manifest, name: str) -> nn.Module:
    """Build the detector around a copy of a network; the seed draws the new layers."""
    backbone = copy.deepcopy(subjects.networks[name]).to("cpu").requires_grad_(True)
    assert manifest.classes is not None
    torch.manual_seed(config.seed)
    return build_detector(
        backbone,
        Backbone.model_validate_json(subjects.header["backbone"]).name,
        config.head,
        len(manifest.classes),
        masks=config.masks,
        mean=subjects.mean,
        std=subjects.std,
        regions=config.regions,
        train_proposals=config.train_proposals,
        test_proposals=config.test_proposals,
    )


def _loader(config: Config, manifest: Manifest, subjects: Subjects) -> DetectionLoader:
    """Return the loader of the training images."""
    flip = 0.0 if "flip" in manifest.avoid else config.flip
    return DetectionLoader(
        manifest,
        config.dataset,
        Transform(short_sides=config.short_sides, longest=config.longest, flip=flip),
        batch_size=config.batch_size,
        training=True,
        masks=config.masks,
        seed=config.seed,
        rank=distributed.rank(),
        world_size=distributed.world_size(),
        threads=subjects.threads,
    )


@torch.no_grad()
def _detect(
    config: Config, detector: nn.Module, loader: DetectionLoader, device: str, name: str, drawing: dict[str, np.ndarray]
) -> Iterator[tuple[Detections, Detections]]:
    """Yield detections and target of each test image; add the first images and their detections to `drawing`."""
    transform: Any = detector.transform
    dtype = autocast_type(config.precision, torch.device(device))
    with progress_bar(loader.num_images, f"detection, {name}: test", unit="images") as bar:
        for number, batch in enumerate(loader.epoch()):
            transform.original_sizes = batch.original_sizes
            batch = to_device(batch, torch.device(device))
            with torch.autocast(device, dtype=dtype, enabled=dtype is not None):
                (detections,) = detector([image / 255 for image in batch.images])
            if number < config.pictures:
                shown = detections["scores"] >= SHOWN_SCORE
                scale = batch.images[0].shape[1] / batch.original_sizes[0][0]
                drawing[f"image_{number}"] = batch.images[0].cpu().numpy()
                drawing[f"boxes_{number}"] = (detections["boxes"][shown] * scale).float().cpu().numpy()
                for key in ("labels", "scores"):
                    drawing[f"{key}_{number}"] = detections[key][shown].float().cpu().numpy()
            yield detections, {key: value.cpu() for key, value in batch.targets[0].items()}
            bar.update()


def _digest(state: State) -> str:
    """Return the sha256 of all weights."""
    content = hashlib.sha256()
    for key, value in sorted(state.items()):
        content.update(key.encode() + value.contiguous().numpy().tobytes())
    return content.hexdigest()
