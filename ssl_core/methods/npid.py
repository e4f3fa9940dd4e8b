"""NPID: non-parametric instance discrimination (Wu et al., 2018), https://arxiv.org/abs/1805.01978.

Every image is a class of its own, and its class vector is its embedding of earlier epochs, kept in a bank: one view,
one backward pass. Cao & Wu (2024, https://arxiv.org/abs/2404.19289) start the bank from the untrained network's
features, move it along the gradient and add SqrtKL, which holds the softmax against its own square root.
"""

from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor

from ssl_core.blocks import distributed
from ssl_core.blocks.cutmix import Mixed, cutmix
from ssl_core.blocks.instance_softmax import InstanceSoftmax, instance_softmax
from ssl_core.data.loader import Batch, Loader
from ssl_core.data.views import POLICIES, Augmentation, View, Views
from ssl_core.methods.base import Losses, Method, MethodConfig, Preset, Progress, full_precision
from ssl_core.networks.backbones import Network
from ssl_core.networks.batchnorm import split_batchnorm
from ssl_core.networks.heads import mlp

Term = Literal["l1", "l2"]


class Config(MethodConfig):
    """Defaults are NPID's own for CIFAR (recipes M1); `paper` and `code` are Cao & Wu's, which differ (recipes M3)."""

    name: Literal["npid"] = "npid"
    preset: Literal["npid", "imagenet", "paper", "code"] = "npid"
    head: Literal["linear", "mlp"] = "linear"  # mlp: three layers with two batch norms (Cao & Wu's code)
    projector_hidden: PositiveInt = 2048  # of the mlp (code)
    embedding_dim: PositiveInt = 128  # 2048 in Cao & Wu's code; their paper does not say
    temperature: PositiveFloat = 0.1  # 0.07 on ImageNet; 0.2 in Cao & Wu's code, their paper has none (recipes A1)
    bank_momentum: float = Field(default=0.5, ge=0, le=1)  # NPID's code and Cao & Wu (best: 0.5-0.7, Fig. 4)
    update: Literal["moving_average", "gradient"] = "moving_average"  # gradient: Cao & Wu eq. 5-6, not in their code
    # Rows compared with beside the batch's own, which are always there; None is all N, 0 the batch alone (recipes A4).
    negatives: NonNegativeInt | None = None
    proximal_weight: NonNegativeFloat = 0.0  # NPID's paper has 30, its code no such term (recipes M1)
    calibrate: bool = False  # start the bank from the untrained network's features (Cao & Wu, section 3.2)
    calibration_mode: Literal["train", "eval"] = "train"  # of batch norm; eval gives a nearly collinear bank (A7)
    sqrtkl_weight: NonNegativeFloat = 0.0  # Cao & Wu: 20
    sqrtkl_temperature: PositiveFloat | None = 1.0  # code; None: that of the cross-entropy, read literally (recipes A2)
    sqrtkl_terms: tuple[Term, ...] = Field(default=("l1", "l2"), min_length=1)  # the ablation of their Table 8
    cutmix: PositiveFloat | None = None  # alpha; 0.5 in Cao & Wu's code, not in their paper (recipes A5)
    batchnorm_splits: PositiveInt = 1  # Cao & Wu's code trains on four GPUs without synchronisation
    area: tuple[float, float] = (0.2, 1.0)
    augmentation: Augmentation = POLICIES["npid"]


CAO_WU = {
    "head": "mlp", "temperature": 0.2, "calibrate": True, "sqrtkl_weight": 20.0,
    "augmentation": {"policy": "contrastive_no_blur"},
}  # fmt: skip

PRESETS = {
    "npid": Preset(
        method={},
        training={
            "optimizer": "sgd", "learning_rate": 0.03, "learning_rate_scaling": "none", "weight_decay": 5e-4,
            "batch_size": 128, "epochs": 200, "warmup_epochs": 0, "schedule": "step", "milestones": (80, 120, 160),
        },
    ),
    "imagenet": Preset(  # the later release: a softmax over sampled negatives instead of NCE
        method={"temperature": 0.07, "negatives": 65536, "augmentation": {"policy": "npid", "flip": 0.5}},
        training={
            "optimizer": "sgd", "learning_rate": 0.03, "learning_rate_scaling": "none", "weight_decay": 1e-4,
            "batch_size": 256, "epochs": 200, "warmup_epochs": 0, "schedule": "step", "milestones": (120, 160),
        },
    ),
    "paper": Preset(
        method={**CAO_WU, "update": "gradient", "sqrtkl_temperature": None},
        training={
            "optimizer": "sgd", "learning_rate": 0.1, "learning_rate_scaling": "none", "weight_decay": 1e-4,
            "batch_size": 512, "epochs": 400, "warmup_epochs": 0, "schedule_unit": "epoch",
        },
    ),
    "code": Preset(
        method={**CAO_WU, "embedding_dim": 2048, "negatives": 10_000, "cutmix": 0.5, "batchnorm_splits": 4},
        training={
            "optimizer": "sgd", "learning_rate": 1.0, "learning_rate_scaling": "none", "weight_decay": 1e-4,
            "batch_size": 512, "epochs": 200, "warmup_epochs": 0, "schedule_unit": "epoch",
        },
    ),
}  # fmt: skip


class NPID(Method):
    """A network, and the bank of what it last said of every image."""

    Config = Config
    fixed_views = ("student",)
    bank: Tensor

    def __init__(self, config: Config, backbone: Network, *, num_images: int, batch_size: int, seed: int) -> None:
        super().__init__(config, backbone, num_images=num_images, batch_size=batch_size, seed=seed)
        self.config = config
        self.seed = seed
        hidden = [config.projector_hidden] * (2 if config.head == "mlp" else 0)
        self.backbone: Network = backbone
        self.projector = mlp([backbone.num_features, *hidden, config.embedding_dim])
        if config.batchnorm_splits > 1:
            split_batchnorm(self, max(1, config.batchnorm_splits // distributed.world_size()))
        # NPID's start: rows of about unit length, in no direction.
        bound = (3 / config.embedding_dim) ** 0.5
        self.register_buffer("bank", torch.empty(num_images, config.embedding_dim).uniform_(-bound, bound))
        self.moves: list[tuple[Tensor, Tensor]] = []  # this step's: images, and where their rows go after it

    @staticmethod
    def views(config: Config, image_size: int) -> Views:
        """One view, of which there is no second."""
        return {"student": View(size=image_size, area=config.area, augmentation=config.augmentation)}

    @torch.no_grad()
    def prepare(self, loader: Loader, device: torch.device) -> None:
        """Fill the bank with the untrained network's embeddings, epoch after epoch until no image is left out.

        An epoch drops its last incomplete batch; the images in it would start from rows that mean nothing. The batch
        norms' running statistics stay those of the untrained network.
        """
        if not self.config.calibrate:
            return
        before = {name: buffer.clone() for name, buffer in self.named_buffers() if name != "bank"}
        training = self.training
        self.train(self.config.calibration_mode == "train")
        missing = torch.ones(len(self.bank), dtype=torch.bool, device=device)
        while missing.any():
            for batch in loader.epoch():
                indices = distributed.gather(batch.indices.to(device))
                if missing[indices].any():
                    embedding = self._embed(batch.views["student"][0].to(device))
                    self.bank.index_copy_(0, indices, distributed.gather(embedding))
                    missing[indices] = False
        self.train(training)
        for name, buffer in self.named_buffers():
            if name in before:
                buffer.copy_(before[name])

    def forward(self, batch: Batch, progress: Progress) -> Losses:
        """Return L = cross-entropy + sqrtkl_weight * SqrtKL (Cao & Wu, eq. 7) + NPID's proximal term."""
        (images,) = batch.views["student"]
        generator = np.random.default_rng([self.seed, progress.step, len(self.moves)])  # the same on all processes
        mixed = cutmix(images, alpha=self.config.cutmix, generator=generator)
        embedding = self._embed(mixed.images)
        with full_precision(embedding):
            return self._losses(embedding, batch.indices, mixed, generator)

    def _embed(self, images: Tensor) -> Tensor:
        return F.normalize(self.projector(self.backbone(images)).float(), dim=1)  # z: (batch, dim)

    def _losses(self, embedding: Tensor, indices: Tensor, mixed: Mixed, generator: np.random.Generator) -> Losses:
        config = self.config
        everyone = distributed.gather(indices)  # images of the batches of all processes
        place = torch.arange(len(indices), device=indices.device) + distributed.rank() * len(indices)
        bank = self.bank
        if config.negatives is not None:
            bank = self.bank[torch.cat([everyone, self._sample(everyone, generator)])]
        own = self.bank[everyone]  # (batch of all processes, dim)
        softmax = instance_softmax(
            embedding,
            bank,
            temperature=config.temperature,
            entropy_temperature=(config.sqrtkl_temperature or config.temperature) if config.sqrtkl_weight else None,
        )
        total = instance = _cross_entropy(embedding, own[place], softmax, config.temperature, mixed)
        parts = {"instance": instance.detach()}
        if config.sqrtkl_weight:
            divergence = _sqrt_kl(softmax, config.sqrtkl_terms)
            parts["sqrt_kl"] = divergence.detach()
            total = total + config.sqrtkl_weight * divergence
        if config.proximal_weight:
            proximal = (embedding - own[place]).square().sum(dim=1).mean()
            parts["proximal"] = proximal.detach()
            total = total + config.proximal_weight * proximal
        self._note(embedding.detach(), everyone, own, place, softmax.log_normalizer.detach(), mixed)
        return Losses(total, parts, embedding=embedding.detach())

    def _sample(self, everyone: Tensor, generator: np.random.Generator) -> Tensor:
        """Draw images outside the batch, each at most once; all there are if they are fewer than `negatives`."""
        others = len(self.bank) - len(everyone)
        count = min(self.config.negatives or 0, others)
        drawn = torch.from_numpy(generator.choice(others, count, replace=False, shuffle=False))
        drawn = drawn.to(everyone.device, non_blocking=True)
        # Number r outside the batch is image r plus as many as the batch has up to there.
        skipped = everyone.sort().values - torch.arange(len(everyone), device=everyone.device)
        return drawn + torch.searchsorted(skipped, drawn, right=True)

    @torch.no_grad()
    def _note(
        self, embedding: Tensor, everyone: Tensor, own: Tensor, place: Tensor, log_normalizer: Tensor, mixed: Mixed
    ) -> None:
        """Keep for after the step where the rows of the batch are to move."""
        target = everyone_embedding = distributed.gather(embedding)
        if self.config.update == "gradient":
            probability = (embedding @ own.T / self.config.temperature - log_normalizer[:, None]).exp()
            label = torch.zeros_like(probability)
            label[torch.arange(len(place)), place] = mixed.share
            label[torch.arange(len(place)), place[mixed.partner]] += 1 - mixed.share
            target = gradient_update(
                everyone_embedding, distributed.gather(probability), label=distributed.gather(label)
            )
        self.moves.append((everyone, target))

    @torch.no_grad()
    def after_step(self, progress: Progress) -> None:
        """Move the rows of this step's images, and only those, towards their targets (Cao & Wu, eq. 6)."""
        momentum = self.config.bank_momentum
        for images, target in self.moves:
            moved = momentum * self.bank[images] + (1 - momentum) * target
            self.bank.index_copy_(0, images, F.normalize(moved, dim=1))
        self.moves.clear()


def instance_loss(
    embedding: Tensor,
    bank: Tensor,
    target: Tensor,
    *,
    temperature: float,
    mixed: Mixed | None = None,
    chunk: int | None = None,
) -> Tensor:
    """Cross-entropy that picks row target[i] of `bank` (N, dim) for embedding[i] (batch, dim), mean over the batch.

    Equals F.cross_entropy(embedding @ bank.T / temperature, target) in memory O(batch x chunk); of images that CutMix
    has `mixed`, the mean of this and of their partners' by the shares.
    """
    softmax = instance_softmax(embedding, bank, temperature=temperature, chunk=chunk)
    return _cross_entropy(embedding, bank[target], softmax, temperature, mixed)


def sqrt_kl(
    embedding: Tensor,
    bank: Tensor,
    *,
    temperature: float,
    terms: tuple[Term, ...] = ("l1", "l2"),
    chunk: int | None = None,
) -> Tensor:
    """KL divergence of p, softmax over the bank, from u ~ sqrt(p), mean over the batch (Cao & Wu, eq. 7-9).

    No gradient reaches u, or its sign would flip. l1 is sum of p log p, l2 is -sum of p log u (Table 8).
    """
    softmax = instance_softmax(embedding, bank, temperature=temperature, entropy_temperature=temperature, chunk=chunk)
    return _sqrt_kl(softmax, terms)


def gradient_update(embedding: Tensor, probability: Tensor, *, label: Tensor | None = None) -> Tensor:
    """Where the class vectors of a batch go on the gradient of its cross-entropy, temperature left out (eq. 5).

    probability[b, i] is the share of image i's class in the softmax of image b, both of the batch (batch, batch): the
    p_j of the paper's sum over j is of class i under image j (recipes M3). `label` (batch, batch) is what it should be:
    1 on the diagonal, or the shares of CutMix.
    """
    if label is None:
        return embedding - probability.T @ embedding
    return (label - probability).T @ embedding


def _cross_entropy(
    embedding: Tensor, own: Tensor, softmax: InstanceSoftmax, temperature: float, mixed: Mixed | None
) -> Tensor:
    """Cross-entropy to the images' `own` rows (batch, dim), or by the shares to theirs and their partners'."""
    if mixed is not None and mixed.share < 1:
        own = mixed.share * own + (1 - mixed.share) * own[mixed.partner]
    return (softmax.log_normalizer - (embedding * own).sum(dim=1) / temperature).mean()


def _sqrt_kl(softmax: InstanceSoftmax, terms: tuple[Term, ...]) -> Tensor:
    """Add the terms up; as log u is half of log p plus a constant, l2's gradient is -1/2 of l1's."""
    l1 = softmax.negative_entropy
    values = {"l1": l1, "l2": softmax.to_square_root - 0.5 * (l1 - l1.detach())}
    return torch.stack([values[term] for term in terms]).sum(dim=0).mean()
