"""The disk, memory and time of a detection before it runs, from one training image of its largest size."""

import time
from typing import NamedTuple

import torch

from ssl_core.config import Backbone
from ssl_core.data.detection_loader import Batch
from ssl_core.evaluations.detection import Config
from ssl_core.networks.backbones import build_backbone
from ssl_core.networks.detectors import build_detector
from ssl_core.training.detection import Losses
from ssl_core.training.memory import LIBRARIES, count, saved_storages

CLASSES = 20
SAVED_COPIES = 2  # of a checkpoint: the last one and the one before
NUMBERS = 3  # per parameter in training: weight, gradient, momentum
OBJECTS = 8  # on the random image


class Forecast(NamedTuple):
    """Numbers of one network; bytes, and seconds on this processor."""

    parameters: int
    disk: float  # of its checkpoints
    memory: float  # of one process in training
    seconds: float  # of all training images
    size: tuple[int, int]  # of the measured image


def forecast(config: Config, backbone: Backbone, image_size: int) -> Forecast:
    """Train on one random image and count; evaluation is not counted."""
    network = build_backbone(backbone, image_size)
    options = {"mean": [0.5] * 3, "std": [0.25] * 3, "train_proposals": config.train_proposals}
    detector = build_detector(
        network, backbone.name, config.head, CLASSES, masks=config.masks, regions=config.regions, **options
    )
    model = Losses(detector).train()
    height = max(config.short_sides)
    width = min(config.longest, height * 4 // 3)
    batch = _random_batch(height, width, masks=config.masks)
    started = time.monotonic()
    with saved_storages(model) as kept:
        losses = model(batch)
    torch.stack(list(losses.values())).sum().backward()
    seconds = time.monotonic() - started
    activations = sum(storage.nbytes() for storage in kept.values())
    parameters = count(model)
    return Forecast(
        parameters,
        disk=4.0 * parameters * 2 * SAVED_COPIES,
        memory=LIBRARIES + 4.0 * parameters * NUMBERS + activations * config.batch_size / config.gpus,
        seconds=seconds * config.batch_size * config.iterations,
        size=(width, height),
    )


def _random_batch(height: int, width: int, *, masks: bool) -> Batch:
    """Return one random image with objects of a quarter of its sides."""
    corners = torch.rand(OBJECTS, 2) * torch.tensor([width, height]) * 3 / 4
    boxes = torch.cat([corners, corners + torch.tensor([width, height]) / 4], dim=1)
    target = {"boxes": boxes, "labels": torch.ones(OBJECTS, dtype=torch.int64)}
    if masks:
        target["masks"] = torch.ones(OBJECTS, height, width, dtype=torch.uint8)
    image = torch.randint(0, 256, (3, height, width), dtype=torch.uint8)
    return Batch([image], [target], [0], [0], [(height, width)])
