"""The cost of an experiment before it runs: parameters, FLOP, memory, and the time of ten steps."""

import contextlib
import io
import math
import os
from collections.abc import Iterator, Sequence
from typing import Any, BinaryIO, NamedTuple, cast

import numpy as np
import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

from ssl_core.blocks.schedules import forward_batch_size
from ssl_core.config import Experiment, Training
from ssl_core.data.loader import Batch, Loader
from ssl_core.data.shards import Manifest, read_index
from ssl_core.data.views import Views
from ssl_core.methods import base
from ssl_core.methods.base import Method
from ssl_core.networks.backbones import Network
from ssl_core.training.loop import Trainer
from ssl_core.training.memory import device, measure_activations, random_batch
from ssl_core.training.optimizers import build_optimizer

STEPS, WARM_UP = 10, 2  # timed steps, and steps before them
SECONDS = 8.0  # after this time, fewer steps are timed
TIMED_FLOP = 5e11  # limit per processor core for all timed steps, about ten seconds
SAMPLED = 1000  # about as many images of a split give the sizes of decoded images
HEADER = 2**16  # bytes of a file that nearly always contain the size of the image
BATCHES = 1000  # random batches, of which the largest counts


class Walk(NamedTuple):
    """The cost of one image."""

    backbone: float  # FLOP of one pass of the largest view through the backbone
    step: float  # FLOP of all passes, forward and backward, over all its views
    activations: float  # bytes kept for the backward pass


class Timing(NamedTuple):
    """The time of ten steps on this machine."""

    steps: int
    seconds: float  # per step of `batch_size` images
    batch_size: int
    waited: float  # share of the time spent waiting for data
    dtype: str


def build(resolved: Experiment, image_size: int, views: Views, *, num_images: int) -> Method:
    """Build the method with the checks of pre-training; raise the same `ValueError`s."""
    method = base.build(resolved, image_size, views, num_images=num_images)
    build_optimizer(method, resolved.training, constant=method.constant_rate, undecayed=method.undecayed)
    return method


def forward_flop(backbone: Network, size: int) -> float:
    """Count the floating-point operations of one image; a multiply-add counts as two."""
    mode = backbone.training
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        backbone.eval()(torch.zeros(1, 3, size, size))
    backbone.train(mode)
    return float(counter.get_total_flops())


def walk(method: Method, views: Views, training: Training) -> Walk:
    """Count the cost of a forward and backward pass of a few random images on the processor."""
    size = max(view.size for view in views.values())
    backbone = forward_flop(method.backbone, size)
    images = int(min(16, training.batch_size, max(4, 1e11 / backbone)))
    with FlopCounterMode(
        display=False, custom_mapping={torch.ops.aten.convolution_backward: _backward_flop}
    ) as counter:
        activations = measure_activations(method, views, training, images)
    return Walk(backbone, counter.get_total_flops() / images, activations)


def decoded_pixels(manifest: Manifest, split: str) -> np.ndarray:
    """Return the numbers of pixels of some images of a split, evenly spread over its shards, from their headers."""
    stride = math.ceil(manifest.split(split).images / SAMPLED)
    pixels = []
    for path in manifest.tars(split):
        with open(path, "rb") as tar:
            pixels += [_num_pixels(tar, fields) for fields in read_index(path)[::stride]]
    return np.array(pixels)


def _num_pixels(tar: BinaryIO, fields: Sequence[str]) -> int:
    """Return the number of pixels of the image in a sample; `fields` is the sample's line of the index."""
    offset, size = int(fields[1]), int(fields[2])
    try:
        image = Image.open(io.BytesIO(os.pread(tar.fileno(), HEADER, offset)))
    except OSError:  # metadata of more than HEADER bytes come first
        image = Image.open(io.BytesIO(os.pread(tar.fileno(), size, offset)))
    return image.width * image.height


def largest_batch(pixels: np.ndarray, batch: int) -> int:
    """Return the pixels of the largest of many random batches: DALI decodes a whole batch before it crops."""
    generator = np.random.default_rng(0)
    return max(int(generator.choice(pixels, batch).sum()) for _ in range(BATCHES))


def time_steps(
    method: Method, resolved: Experiment, views: Views, manifest: Manifest | None, *, walked: Walk, threads: int
) -> Timing:
    """Time up to ten steps of the real loop in one process, with the real loader or, without shards, random images.

    On a processor the batch is smaller if ten steps would take minutes. The steps train `method`.
    """
    torch.set_num_threads(threads)
    place = device()
    training = resolved.training
    batch_size = forward_batch_size(training)
    if place.type == "cpu":
        affordable = TIMED_FLOP * threads / (walked.step * (STEPS + WARM_UP))
        batch_size = max(min(batch_size, 8), min(batch_size, int(affordable)))
    alone = {"batch_size": batch_size, "gpus": 1, "nodes": 1, "accumulation": 1, "compile": False}
    with _loader(resolved, views, manifest, batch_size, place, threads) as loader:
        trainer = Trainer(method, loader, training.model_copy(update=alone), device=place)
        with contextlib.redirect_stderr(io.StringIO()):  # without its progress line
            while trainer.step < WARM_UP and trainer.seconds < SECONDS / 4:
                _steps(trainer, 1)
            before, waited = trainer.seconds, trainer.waited
            steps = 0
            while steps < STEPS and trainer.seconds - before < SECONDS:
                _steps(trainer, 1)
                steps += 1
    seconds = trainer.seconds - before
    dtype = "bfloat16" if trainer.dtype is not None else "float32"
    return Timing(steps, seconds / steps, batch_size, (trainer.waited - waited) / seconds, dtype)


def _backward_flop(grad: Any, inputs: Any, weight: Any, *rest: Any, out_shape: Any = None) -> int:
    """Count a convolution's backward pass from shapes: one forward pass each for the inputs and the weights.

    torch counts a depthwise convolution as a full one.
    """
    needs_gradient = rest[-1]  # of inputs, weight, bias
    return sum(needs_gradient[:2]) * 2 * grad[0] * math.prod(grad[2:]) * math.prod(weight)


class _RandomLoader:
    """A loader of one random batch, for data sets without shards."""

    def __init__(self, views: Views, batch_size: int) -> None:
        self._batch = random_batch(views, batch_size)
        self.steps_per_epoch, self.num_images = STEPS, STEPS * batch_size

    def next(self) -> Batch:
        return self._batch


@contextlib.contextmanager
def _loader(
    resolved: Experiment, views: Views, manifest: Manifest | None, batch_size: int, place: torch.device, threads: int
) -> Iterator[Loader]:
    if manifest is None:
        yield cast(Loader, _RandomLoader(views, batch_size))
        return
    options: dict[str, Any] = {"batch_size": batch_size, "seed": resolved.training.seed, "device": place.type}
    with Loader(manifest, resolved.dataset, views, threads=threads, **options) as loader:
        yield loader


def _steps(trainer: Trainer, number: int) -> None:
    trainer.total_steps = trainer.step + number
    trainer.run(save=lambda: None, log=lambda row: None)
