"""The training of several classifiers on the same batches: the loop of pre-training with their steps and schedule."""

import time
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ssl_core.config import Training
from ssl_core.data.loader import Loader
from ssl_core.training.supervised import SupervisedTrainer


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


class FinetuneTrainer(SupervisedTrainer):
    """Trains networks side by side; `state`, `restore` and `run`, with their checkpoints, are those of `Trainer`."""

    remedy = "lower learning_rate and backbone_learning_rate of this evaluation"

    def __init__(
        self,
        networks: Mapping[str, Any],
        loader: Loader,
        shares: Sequence[float],
        training: Training,
        *,
        device: torch.device,
    ) -> None:
        """`networks` are modules and `Learner`s; `shares` has the share of the learning rate for each step."""
        self.networks: Mapping[str, Learner] = networks
        self.shares = shares
        super().__init__(
            nn.ModuleDict(networks),
            Optimizers({name: network.optimizer for name, network in networks.items()}),
            loader,
            training,
            task="finetune",
            device=device,
            total_steps=len(shares),
            steps_per_epoch=loader.steps_per_epoch,
            log_steps=loader.steps_per_epoch,
        )

    def _one_step(self) -> None:
        started = time.monotonic()
        batch = self.loader.next()
        self.waited += time.monotonic() - started
        ((images,),) = batch.views.values()
        labels = batch.labels.to(images.device)
        share = self.shares[self.step]
        losses = {name: network.step(images, labels, share) for name, network in self.networks.items()}
        self._add_losses({**losses, "total": torch.stack([*losses.values()]).sum()})
