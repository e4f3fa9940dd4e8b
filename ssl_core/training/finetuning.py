"""The training of several classifiers on the same batches: the loop of pre-training with their steps and schedule."""

import math
import time
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from ssl_core.config import Training
from ssl_core.data.loader import Loader
from ssl_core.networks.backbones import find_infinite
from ssl_core.training.loop import LOG_STEPS, Trainer
from ssl_core.training.monitor import Alarm

REMEDY = "lower learning_rate and backbone_learning_rate of this evaluation"


class Learner(Protocol):
    """A network that takes a step of its own optimizer."""

    optimizer: torch.optim.Optimizer

    def step(self, images: Tensor, labels: Tensor, share: float) -> Tensor:
        """Take one step at a share of the learning rate; return the loss."""
        ...


class Optimizers:
    """The optimizers of several networks, whose states are saved together."""

    def __init__(self, optimizers: Mapping[str, torch.optim.Optimizer]) -> None:
        self._optimizers = optimizers

    def state_dict(self) -> dict[str, Any]:
        """Return the state of each optimizer."""
        return {name: optimizer.state_dict() for name, optimizer in self._optimizers.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the state of each optimizer."""
        for name, optimizer in self._optimizers.items():
            optimizer.load_state_dict(state[name])


class FinetuneTrainer(Trainer):
    """Trains networks side by side; `state`, `restore` and `run`, with their checkpoints, are those of `Trainer`."""

    def __init__(  # not that of `Trainer`, whose parts belong to a method
        self,
        networks: Mapping[str, Any],
        loader: Loader,
        shares: Sequence[float],
        training: Training,
        *,
        device: torch.device,
    ) -> None:
        """`networks` are modules and `Learner`s; `shares` has the share of the learning rate for each step."""
        self.task = "finetune"
        self.networks: Mapping[str, Learner] = networks
        self.shares = shares
        self.method = cast(Any, nn.ModuleDict(networks))
        self.optimizer = cast(Any, Optimizers({name: network.optimizer for name, network in networks.items()}))
        self.loader, self.training, self.device = loader, training, device
        self.total_steps = len(shares)
        self.steps_per_epoch = loader.steps_per_epoch
        self.log_steps = min(LOG_STEPS, self.steps_per_epoch)
        self.step = 0
        self.history: list[dict[str, float]] = []
        self.seconds = self.waited = 0.0
        self._alarm = Alarm()
        self._sums: dict[str, Tensor] = {}

    def _one_step(self) -> None:
        started = time.monotonic()
        batch = self.loader.next()
        self.waited += time.monotonic() - started
        ((images,),) = batch.views.values()
        labels = batch.labels.to(images.device)
        for name, network in self.networks.items():
            loss = network.step(images, labels, self.shares[self.step])
            addend = torch.stack([loss, torch.ones_like(loss)])
            self._sums[name] = self._sums[name] + addend if name in self._sums else addend

    def _row_is_due(self) -> bool:
        return self.step % self.log_steps == 0 or self.step == self.total_steps

    def _append_row(self) -> dict[str, float]:
        """Append the mean losses since the last row; raise `ValueError` if the run has diverged."""
        row: dict[str, float] = {"step": self.step, "epoch": round(self.step / self.steps_per_epoch, 4)}
        row |= {f"loss/{name}": (total / count).item() for name, (total, count) in self._sums.items()}
        row["loss/total"] = sum(value for name, value in row.items() if name.startswith("loss/"))
        self._sums = {}
        if not math.isfinite(row["loss/total"]):
            raise ValueError(f"training diverged: the loss is {row['loss/total']} at step {self.step}: {REMEDY}")
        self.history.append(row)
        return row

    def _check_weights(self) -> None:
        name = find_infinite(self.method.state_dict())
        if name is not None:
            raise ValueError(f"training diverged: '{name}' is not finite after step {self.step}: {REMEDY}")
