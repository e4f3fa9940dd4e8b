"""Learning rates and momenta as pure functions of the step, so that a resumed run needs no state of a schedule."""

import math

from ssl_core.config import Training


def effective_learning_rate(training: Training) -> float:
    """Return the peak learning rate, multiplied by batch_size / 256 under linear scaling.

    `batch_size` is the global batch of one optimizer step: it includes all processes and accumulation parts.
    """
    scale = training.batch_size / 256 if training.learning_rate_scaling == "linear" else 1.0
    return training.learning_rate * scale


def forward_batch_size(training: Training) -> int:
    """Return the number of images per forward pass of one process.

    Raises ValueError if the global batch is not a multiple of processes x accumulation parts.
    """
    parts = training.processes * training.accumulation
    if training.batch_size % parts:
        processes = "gpus" if training.nodes == 1 else "gpus x nodes"
        raise ValueError(
            f"training.batch_size {training.batch_size} is the global batch and must be a multiple of "
            f"{processes} x accumulation ({training.processes} x {training.accumulation}): choose "
            f"{max(1, training.batch_size // parts) * parts}"
        )
    return training.batch_size // parts


def learning_rate(step: int, *, training: Training, steps_per_epoch: int) -> float:
    """Return the learning rate of optimizer step `step` (from 0): linear warm-up from 0, then the schedule.

    The warm-up rises every step and reaches the peak at its end. The cosine covers the rest of the run and changes
    every step or every epoch (`schedule_unit`; docs/sources.md#schedules). Milestones count epochs from the start of
    training. Raises ValueError for a warm-up as long as the training and for a minimum above the peak.
    """
    peak, lowest = effective_learning_rate(training), training.minimum_learning_rate
    if training.warmup_epochs >= training.epochs:
        raise ValueError(
            f"training.warmup_epochs {training.warmup_epochs:g} must be below training.epochs {training.epochs}: "
            "the learning rate would never come down"
        )
    if lowest > peak:
        raise ValueError(f"training.minimum_learning_rate {lowest:g} is above the peak learning rate {peak:g}")
    warmup = round(training.warmup_epochs * steps_per_epoch)
    if step < warmup:
        return peak * step / warmup
    if training.schedule == "constant":
        return peak
    epoch = step // steps_per_epoch
    if training.schedule == "step":
        return peak * training.decay_factor ** sum(epoch >= milestone for milestone in training.milestones)
    if training.schedule_unit == "epoch":
        done = max(0.0, epoch - training.warmup_epochs) / (training.epochs - training.warmup_epochs)
    else:
        done = (step - warmup) / (training.epochs * steps_per_epoch - warmup)
    return cosine(peak, lowest, done)


def weight_decay(fraction: float, *, training: Training) -> float:
    """Return the weight decay at `fraction` of the run, on a cosine without warm-up to `final_weight_decay` (DINO)."""
    if training.final_weight_decay is None:
        return training.weight_decay
    return cosine(training.weight_decay, training.final_weight_decay, fraction)


def cosine(start: float, end: float, fraction: float) -> float:
    """Return the value at `fraction` of half a cosine from `start` to `end`, exact at both ends."""
    weight = 0.5 * (1 + math.cos(math.pi * min(fraction, 1.0)))
    return start * weight + end * (1 - weight)
