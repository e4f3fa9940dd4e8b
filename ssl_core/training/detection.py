"""The training of a detector: the loop of pre-training with the losses, the schedule and the loader of detection."""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import update_bn
from torchvision.ops._utils import split_normalization_params

from ssl_core.blocks import distributed
from ssl_core.config import Training
from ssl_core.data.detection_loader import Batch, DetectionLoader
from ssl_core.networks.detectors import seed_sampling
from ssl_core.training.optimizers import set_learning_rate
from ssl_core.training.precision import autocast_type
from ssl_core.training.supervised import SupervisedTrainer


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Learning rate per iteration: a linear warm-up from `warmup_factor`, then steps at shares of the run."""

    iterations: int
    learning_rate: float
    warmup_iterations: int
    warmup_factor: float
    milestones: tuple[float, ...]
    decay_factor: float

    def rate(self, step: int) -> float:
        """Return the learning rate of a step, which counts from 0."""
        rate = self.learning_rate * self.decay_factor ** sum(
            step >= round(milestone * self.iterations) for milestone in self.milestones
        )
        if step >= self.warmup_iterations:
            return rate
        done = step / self.warmup_iterations
        return rate * (self.warmup_factor * (1 - done) + done)


# Losses that are means over the regions of a batch -> the layer of torchvision's heads that sees these regions.
_MEANS_OVER_REGIONS = {
    "loss_classifier": "box_predictor",
    "loss_box_reg": "box_predictor",
    "loss_mask": "mask_predictor",
}


class Losses(nn.Module):
    """A detector whose forward pass returns its losses by name.

    With several processes their mean is the loss of one process on the concatenated batch, although the processes
    have different numbers of regions: only those with an object have a mask.
    """

    def __init__(self, detector: Any) -> None:
        super().__init__()
        self.detector = detector
        self._regions: dict[str, int] = {}
        for name in set(_MEANS_OVER_REGIONS.values()):
            if (layer := getattr(detector.roi_heads, name)) is not None:
                layer.register_forward_pre_hook(partial(self._count_regions, name))

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Compute the losses; the seeds of the batch draw the proposals."""
        seed_sampling(self.detector, batch.seeds)
        losses = self.detector([image / 255 for image in batch.images], batch.targets)
        shares = {layer: _share(number) for layer, number in self._regions.items()}
        for name, layer in _MEANS_OVER_REGIONS.items():
            if name in losses:
                losses[name] = losses[name] * shares[layer]
        return losses

    def _count_regions(self, name: str, _: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self._regions[name] = len(inputs[0])


def _share(number: int) -> float:
    """Return a number of regions over its mean over processes; exchanged on the CPU, so no device waits."""
    mean = distributed.average(torch.tensor(float(number), dtype=torch.float64)).item()
    return number / mean if mean else 1.0


class DetectionTrainer(SupervisedTrainer):
    """Trains a detector; `state`, `restore` and `run`, with checkpoints and signals, are those of `Trainer`."""

    remedy = "lower learning_rate, or increase warmup_iterations, of this evaluation"

    def __init__(
        self,
        detector: nn.Module,
        loader: DetectionLoader,
        training: Training,
        schedule: Schedule,
        *,
        task: str,
        device: torch.device,
    ) -> None:
        module: Any = Losses(detector)
        module.to(device=device, memory_format=torch.channels_last)
        self.schedule = schedule
        norms, others = split_normalization_params(module)
        groups = [
            {"params": norms, "weight_decay": 0.0, "constant": False},
            {"params": others, "weight_decay": training.weight_decay, "constant": False},
        ]
        super().__init__(
            module,
            torch.optim.SGD(groups, lr=training.learning_rate, momentum=training.momentum, fused=True),
            loader,
            training,
            task=task,
            device=device,
            total_steps=schedule.iterations,
            steps_per_epoch=max(1, loader.num_images // loader.batch_size),
            log_steps=schedule.iterations,
        )
        self.dtype = autocast_type(training.precision, device)
        self._module = self.method
        if distributed.is_distributed():
            self._module = DistributedDataParallel(self.method, forward_sync_buffers=False)

    def refine_norms(self, batches: int) -> None:
        """Replace the running statistics of batch norm by means over this many further batches (precise BN)."""
        if batches:
            with self._autocast():
                update_bn(self._batches(batches), self.method)

    def _batches(self, number: int) -> Iterator[Any]:
        for _ in range(number):
            yield (self._next(),)  # `update_bn` takes the first element

    def _next(self) -> Batch:
        started = time.monotonic()
        batch: Any = self.loader.next()
        self.waited += time.monotonic() - started
        return to_device(batch, self.device)

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype is not None)

    def _one_step(self) -> None:
        set_learning_rate(self.optimizer, self.schedule.rate(self.step))
        batch = self._next()
        with self._autocast():
            losses: dict[str, Tensor] = self._module(batch)
            total = torch.stack(list(losses.values())).sum()
        total.backward()
        if self.training.gradient_clip is not None:
            nn.utils.clip_grad_norm_(self.method.parameters(), self.training.gradient_clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self._add_losses({"total": total, **{name.removeprefix("loss_"): loss for name, loss in losses.items()}})

    def _append_row(self) -> dict[str, float]:
        row = super()._append_row()
        row["schedule/learning_rate"] = self.optimizer.param_groups[0]["lr"]
        return row


def to_device(batch: Batch, device: torch.device) -> Batch:
    """Move images and targets."""
    if device.type == "cpu":
        return batch
    images = [image.to(device, non_blocking=True) for image in batch.images]
    targets = [{key: value.to(device, non_blocking=True) for key, value in target.items()} for target in batch.targets]
    return batch._replace(images=images, targets=targets)
