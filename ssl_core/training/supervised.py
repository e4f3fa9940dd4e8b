"""The parts that trainings with labels share: the loop of pre-training without a method's monitor and epochs."""

import math
from collections.abc import Mapping
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from ssl_core.blocks import distributed
from ssl_core.config import Training
from ssl_core.networks.backbones import find_infinite
from ssl_core.training.loop import LOG_STEPS, Trainer
from ssl_core.training.monitor import Alarm


class SupervisedTrainer(Trainer):
    """Trains a module whose subclass takes the steps; `state`, `restore` and `run` are those of `Trainer`.

    `remedy` ends the message of a diverged run.
    """

    remedy: ClassVar[str]

    def __init__(  # not that of `Trainer`, whose parts belong to a method
        self,
        module: nn.Module,
        optimizer: Any,
        loader: Any,
        training: Training,
        *,
        task: str,
        device: torch.device,
        total_steps: int,
        steps_per_epoch: int,
        log_steps: int,
    ) -> None:
        self.task = task
        self.method = cast(Any, module)
        self.optimizer, self.loader = optimizer, loader
        self.training, self.device = training, device
        self.total_steps, self.steps_per_epoch = total_steps, steps_per_epoch
        self.log_steps = min(LOG_STEPS, log_steps)
        self.step = 0
        self.history: list[dict[str, float]] = []
        self.seconds = self.waited = 0.0
        self._alarm = Alarm()
        self._sums: dict[str, Tensor] = {}

    def _add_losses(self, losses: Mapping[str, Tensor]) -> None:
        """Add losses by name, among them `total`, to the sums since the last row."""
        for name, value in losses.items():
            addend = torch.stack([value.detach().float(), torch.ones((), device=value.device)])
            self._sums[name] = self._sums[name] + addend if name in self._sums else addend

    def _row_is_due(self) -> bool:
        return self.step % self.log_steps == 0 or self.step == self.total_steps

    def _append_row(self) -> dict[str, float]:
        """Append means over processes and steps to the history; raise `ValueError` if the run has diverged."""
        means = torch.stack([total / count for total, count in self._sums.values()])
        values = distributed.average(means).tolist()
        row: dict[str, float] = {"step": self.step, "epoch": round(self.step / self.steps_per_epoch, 4)}
        row |= {f"loss/{name}": value for name, value in zip(self._sums, values, strict=True)}
        self._sums = {}
        if not math.isfinite(row["loss/total"]):
            raise ValueError(f"training diverged: the loss is {row['loss/total']} at step {self.step}: {self.remedy}")
        self.history.append(row)
        return row

    def _check_weights(self) -> None:
        name = find_infinite(self.method.state_dict())
        if name is not None:
            raise ValueError(f"training diverged: '{name}' is not finite after step {self.step}: {self.remedy}")
