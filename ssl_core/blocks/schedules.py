"""Learning rates and momenta as pure functions of the step: nothing is kept, so a resumed run cannot be off by one."""

import math

from ssl_core.config import Training


def effective_learning_rate(training: Training) -> float:
    """Return the peak learning rate: with linear scaling times batch_size / 256, which counts every process and part.

    `batch_size` is the global batch of one optimizer step, so neither `gpus` nor `accumulation` enters again.
    """
    return training.learning_rate * (training.batch_size / 256 if training.learning_rate_scaling == "linear" else 1.0)


def forward_batch_size(training: Training) -> int:
    """Return how many images one process takes through the network at once.

    Raises ValueError when the global batch cannot be dealt out evenly.
    """
    parts = training.gpus * training.accumulation
    if training.batch_size % parts:
        raise ValueError(
            f"training.batch_size {training.batch_size} is the global batch and must be a multiple of gpus x "
            f"accumulation ({training.gpus} x {training.accumulation}): choose "
            f"{max(1, training.batch_size // parts) * parts}"
        )
    return training.batch_size // parts


def learning_rate(step: int, *, training: Training, steps_per_epoch: int) -> float:
    """Return the learning rate of optimizer step `step` (from 0): linear warm-up from 0, then the schedule.

    The warm-up moves every step and reaches the peak at its end; cosine time counts only what follows it (recipes 0.4)
    and moves every step or every epoch (`schedule_unit`). Milestones count epochs from the start of training.
    Raises ValueError for a warm-up as long as the training and for a minimum above the peak.
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
    return _cosine(peak, lowest, done)


def cosine_momentum(step: int, total: int, base: float, final: float = 1.0) -> float:
    """Return the teacher's momentum, from `base` at step 0 to `final` at step `total`, over all steps (recipes 0.4)."""
    return _cosine(base, final, step / total)


def _cosine(start: float, end: float, fraction: float) -> float:
    """Go from `start` to `end` on half a cosine, exact at both."""
    weight = 0.5 * (1 + math.cos(math.pi * min(fraction, 1.0)))
    return start * weight + end * (1 - weight)
