"""The classifiers of a linear probe: their steps on frozen features, and the choice of a learning rate."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssl_core.blocks.schedules import learning_rate
from ssl_core.config import Training
from ssl_core.evaluations.parts.features import Features, accuracies, apply_in_chunks
from ssl_core.training.optimizers import build_optimizer


class Probe:
    """Linear classifiers on one network's features, one per learning rate, with equal first weights.

    With several learning rates each classifier has a twin that never trains on held-out images. The twins choose the
    learning rate; the others are scored on the test split.
    """

    def __init__(
        self,
        dim: int,
        classes: int,
        plans: Sequence[Training],
        *,
        seed: int,
        steps_per_epoch: int,
        normalize: bool = False,
        device: str = "cpu",
    ) -> None:
        """Start from N(0, .01) weights, drawn by the seed, and zero biases; one plan per learning rate."""
        self.heads = [_classifier(dim, classes, seed).to(device) for _ in plans]
        self.twins = [_classifier(dim, classes, seed).to(device) for _ in plans] if len(plans) > 1 else []
        trained = [*zip(self.heads, plans, strict=True), *zip(self.twins, plans, strict=False)]
        self.optimizers = [(build_optimizer(head, plan), plan) for head, plan in trained]
        self.rates = [learning_rate(0, training=plan, steps_per_epoch=steps_per_epoch) for plan in plans]
        self.steps_per_epoch = steps_per_epoch
        self.normalize = normalize
        self.steps = 0

    def step(self, features: Tensor, labels: Tensor, keep: Tensor) -> None:
        """Take one step of every classifier; the twins train on the rows `keep` (batch,) alone."""
        twins = self.twins if keep.any() else []
        logits = _apply([*self.heads, *twins], self._prepare(features))
        # Classifiers share no weights, so the sum of losses gives each the gradient of its own loss.
        loss = _sum_of_losses(logits[:, : len(self.heads)], labels)
        if twins:
            loss = loss + _sum_of_losses(logits[keep, len(self.heads) :], labels[keep])
        for optimizer, plan in self.optimizers:
            optimizer.zero_grad()
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(self.steps, training=plan, steps_per_epoch=self.steps_per_epoch)
        loss.backward()
        for optimizer, _ in self.optimizers:
            optimizer.step()
        self.steps += 1

    def scores(self, features: Tensor, labels: Tensor) -> list[dict[str, float]]:
        """Return the accuracies of the classifier of each learning rate, in percent."""
        return self._scores(self.heads, features, labels)

    def choose(self, train: Features, name: str, held_out: Tensor) -> int:
        """Return the position of the learning rate whose twin is best on held-out center crops; the first of equals."""
        rows = torch.isin(train.indices, held_out).nonzero()[:, 0]
        scores = [score["top1"] for score in self._scores(self.twins, train.by_network[name], train.labels, rows)]
        return scores.index(max(scores))

    @torch.no_grad()
    def _scores(
        self, heads: list[nn.Linear], features: Tensor, labels: Tensor, rows: Tensor | None = None
    ) -> list[dict[str, float]]:
        """Score `rows` (default: all) in chunks, because features may be in a file larger than the memory."""
        rows = torch.arange(len(labels)) if rows is None else rows
        classes = heads[0].out_features

        def apply(part: Tensor) -> Tensor:
            return _apply(heads, self._prepare(features[part].to(heads[0].weight.device))).flatten(1)

        logits = apply_in_chunks(apply, rows, width=len(heads) * classes, dtype=torch.float32)
        return [accuracies(part, labels[rows]) for part in logits.split(classes, dim=1)]

    def _prepare(self, features: Tensor) -> Tensor:
        return F.normalize(features, dim=1) if self.normalize else features


class LastBlocks(nn.Module):
    """A timm vision transformer whose features are the concatenated class tokens of its last blocks (DINO, SSLight)."""

    def __init__(self, transformer: Any, blocks: int) -> None:
        super().__init__()
        self.transformer, self.blocks = transformer, blocks

    def forward(self, images: Tensor) -> Tensor:
        """Return (batch, blocks * dim), the token of each block normalised by the final norm."""
        layers = self.transformer.get_intermediate_layers(images, n=self.blocks, return_prefix_tokens=True, norm=True)
        return torch.cat([prefix[:, 0] for _, prefix in layers], dim=1)


def read_out(network: nn.Module, last_blocks: int) -> nn.Module:
    """Return the network itself, or for `last_blocks` > 0 the `LastBlocks` of a vision transformer."""
    if not last_blocks or not list(network.parameters()):  # raw pixels have no blocks
        return network
    if not hasattr(network, "get_intermediate_layers"):
        raise ValueError(f"last_blocks: {last_blocks} needs a vision transformer: set `last_blocks: 0`")
    return LastBlocks(network, last_blocks)


def _apply(heads: Sequence[nn.Linear], features: Tensor) -> Tensor:
    """Return the logits (batch, heads, classes) of all heads by one matrix product, faster than one per head."""
    weight, bias = (torch.cat([getattr(head, name) for head in heads]) for name in ("weight", "bias"))
    return F.linear(features, weight, bias).unflatten(1, (len(heads), -1))


def _sum_of_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Sum the heads' mean cross-entropies of (batch, heads, classes)."""
    truth = labels.repeat_interleave(logits.shape[1])
    return F.cross_entropy(logits.flatten(0, 1), truth, reduction="sum") / len(labels)


def _classifier(dim: int, classes: int, seed: int) -> nn.Linear:
    head = nn.Linear(dim, classes)
    nn.init.normal_(head.weight, std=0.01, generator=torch.Generator().manual_seed(seed))
    nn.init.zeros_(head.bias)
    return head
