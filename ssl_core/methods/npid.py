"""NPID: non-parametric instance discrimination (Wu et al., 2018), https://arxiv.org/abs/1805.01978.

Every image is its own class. Its class vector is its embedding from earlier epochs, stored in a bank. Cao & Wu (2024,
https://arxiv.org/abs/2404.19289) initialise the bank with the untrained network's features, update it along the
gradient and add SqrtKL, the divergence of the softmax from its own square root.
"""

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor

from ssl_core.blocks import distributed
from ssl_core.blocks.cutmix import Mixed, cutmix
from ssl_core.blocks.instance_softmax import InstanceSoftmax, instance_loss, instance_softmax
from ssl_core.data.batch import Batch, BatchSource
from ssl_core.data.views import POLICIES, Augmentation, View, Views
from ssl_core.methods.base import Losses, Memory, Method, MethodConfig, Preset, Progress, full_precision
from ssl_core.networks.backbones import Network
from ssl_core.networks.heads import mlp

Term = Literal["l1", "l2"]


class Config(MethodConfig):
    """Defaults: NPID on CIFAR (docs/sources.md#npid); `paper` and `code` are Cao & Wu's (docs/sources.md#cao-wu)."""

    name: Literal["npid"] = "npid"
    preset: Literal["npid", "imagenet", "paper", "code"] = "npid"
    head: Literal["linear", "mlp"] = "linear"  # mlp: three layers with two BatchNorms (Cao & Wu's code)
    projector_hidden: PositiveInt = 2048  # of the mlp (Cao & Wu's code)
    embedding_dim: PositiveInt = 128  # 2048 in Cao & Wu's code, not given in their paper
    # 0.07 on ImageNet; 0.2 in Cao & Wu's code, not given in their paper (docs/sources.md#cao-wu-temperature).
    temperature: PositiveFloat = 0.1
    bank_momentum: float = Field(default=0.5, ge=0, le=1)  # NPID's code and Cao & Wu (best: 0.5-0.7, Fig. 4)
    # gradient: eq. 5-6 of Cao & Wu's paper, not in their code (docs/sources.md#cao-wu-bank-update).
    update: Literal["moving_average", "gradient"] = "moving_average"
    # Rows of other images in the softmax; None: all, 0: the batch only (docs/sources.md#cao-wu-candidates).
    negatives: NonNegativeInt | None = None
    proximal_weight: NonNegativeFloat = 0.0  # 30 in NPID's paper, absent from its code (docs/sources.md#npid)
    calibrate: bool = False  # initialise the bank with the untrained network's features (Cao & Wu, section 3.2)
    # Mode of BatchNorm; eval gives nearly collinear rows (docs/sources.md#cao-wu-calibration).
    calibration_mode: Literal["train", "eval"] = "train"
    sqrtkl_weight: NonNegativeFloat = 0.0  # 20 in Cao & Wu
    # 1 in the code; None: `temperature`, as in the paper (docs/sources.md#cao-wu-sqrtkl-temperature).
    sqrtkl_temperature: PositiveFloat | None = 1.0
    sqrtkl_terms: tuple[Term, ...] = Field(default=("l1", "l2"), min_length=1)  # ablation of Cao & Wu, Table 8
    # alpha; 0.5 in Cao & Wu's code, absent from their paper (docs/sources.md#cao-wu-cutmix).
    cutmix: PositiveFloat | None = None
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
        source="NPID's code, CIFAR (docs/sources.md#npid)",
    ),
    "imagenet": Preset(  # the authors' later release, with a softmax over sampled negatives instead of NCE
        method={"temperature": 0.07, "negatives": 65536, "augmentation": {"policy": "npid", "flip": 0.5}},
        training={
            "optimizer": "sgd", "learning_rate": 0.03, "learning_rate_scaling": "none", "weight_decay": 1e-4,
            "batch_size": 256, "epochs": 200, "warmup_epochs": 0, "schedule": "step", "milestones": (120, 160),
        },
        source="NPID's later code, ImageNet (docs/sources.md#npid)",
    ),
    "paper": Preset(
        method={**CAO_WU, "update": "gradient", "sqrtkl_temperature": None},
        training={
            "optimizer": "sgd", "learning_rate": 0.1, "learning_rate_scaling": "none", "weight_decay": 1e-4,
            "batch_size": 512, "epochs": 400, "warmup_epochs": 0, "schedule_unit": "epoch",
        },
        source="Cao & Wu's paper, completed by their code (docs/sources.md#cao-wu)",
    ),
    "code": Preset(
        method={**CAO_WU, "embedding_dim": 2048, "negatives": 10_000, "cutmix": 0.5, "batchnorm_splits": 4},
        training={
            "optimizer": "sgd", "learning_rate": 1.0, "learning_rate_scaling": "none", "weight_decay": 1e-4,
            "batch_size": 512, "epochs": 200, "warmup_epochs": 0, "schedule_unit": "epoch",
        },
        source="Cao & Wu's code (docs/sources.md#cao-wu)",
    ),
}  # fmt: skip


class NPID(Method):
    """A network, and a bank of its embeddings of all images."""

    Config = Config
    fixed_views = ("student",)
    bank: Tensor

    def __init__(self, config: Config, backbone: Network, *, num_images: int, batch_size: int, seed: int) -> None:
        super().__init__(config, backbone, num_images=num_images, batch_size=batch_size, seed=seed)
        self.config = config
        hidden = [config.projector_hidden] * (2 if config.head == "mlp" else 0)
        self.projector = mlp([backbone.num_features, *hidden, config.embedding_dim])
        self.split_batchnorm(config.batchnorm_splits)
        # NPID's initialisation: random rows of about unit length.
        bound = (3 / config.embedding_dim) ** 0.5
        self.register_buffer("bank", torch.empty(num_images, config.embedding_dim).uniform_(-bound, bound))

    @staticmethod
    def views(config: Config, image_size: int) -> Views:
        """Return a single view."""
        return {"student": View(size=image_size, area=config.area, augmentation=config.augmentation)}

    @torch.no_grad()
    def prepare(self, loader: BatchSource, device: torch.device) -> None:
        """Fill the bank with the untrained network's embeddings.

        Epochs are repeated until every image was seen, because each epoch drops its last incomplete batch. The running
        statistics of BatchNorm are restored afterwards.
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
        generator = np.random.default_rng([self.seed, progress.step, progress.part])  # the same in all processes
        mixed = cutmix(images, alpha=self.config.cutmix, generator=generator)
        embedding = self._embed(mixed.images)
        with full_precision(embedding):
            return self._losses(embedding, batch.indices, mixed, generator)

    def _embed(self, images: Tensor) -> Tensor:
        return F.normalize(self.projector(self.backbone(images)).float(), dim=1)  # z: (batch, dim)

    def _losses(self, embedding: Tensor, indices: Tensor, mixed: Mixed, generator: np.random.Generator) -> Losses:
        config = self.config
        images = distributed.gather(indices)  # of the batches of all processes
        place = torch.arange(len(indices), device=indices.device) + distributed.rank() * len(indices)
        bank = self.bank
        if config.negatives is not None:
            bank = self.bank[torch.cat([images, self._sample(images, generator)])]
        rows = self.bank[images]  # (batch of all processes, dim)
        entropy_temperature = None
        if config.sqrtkl_weight:
            entropy_temperature = config.sqrtkl_temperature or config.temperature
        # The image's row of `bank`; CutMix leaves it the larger share.
        own = place if config.negatives is not None else indices
        softmax = instance_softmax(
            embedding,
            bank,
            temperature=config.temperature,
            entropy_temperature=entropy_temperature,
            own=own,
        )
        total = instance_loss(softmax, embedding, rows[place], temperature=config.temperature, mixed=mixed)
        parts = {"instance": total.detach()}
        if config.sqrtkl_weight:
            divergence = sqrt_kl(softmax, config.sqrtkl_terms)
            parts["sqrt_kl"] = divergence.detach()
            total = total + config.sqrtkl_weight * divergence
        if config.proximal_weight:
            proximal = (embedding - rows[place]).square().sum(dim=1).mean()
            parts["proximal"] = proximal.detach()
            total = total + config.proximal_weight * proximal
        target = self._bank_target(embedding.detach(), rows, place, softmax.log_normalizer.detach(), mixed)
        return Losses(
            total,
            parts,
            embedding=embedding.detach(),
            memory={"images": images, "target": target},
            measures={"instance/top1": 100 * softmax.is_nearest.mean()},
        )

    def _sample(self, images: Tensor, generator: np.random.Generator) -> Tensor:
        """Draw up to `negatives` different images outside the batch."""
        others = len(self.bank) - len(images)
        count = min(self.config.negatives or 0, others)
        drawn = torch.from_numpy(generator.choice(others, count, replace=False, shuffle=False))
        drawn = drawn.to(images.device, non_blocking=True)
        # The image with rank r outside the batch is r plus the number of batch images in front of it.
        skipped = images.sort().values - torch.arange(len(images), device=images.device)
        return drawn + torch.searchsorted(skipped, drawn, right=True)

    @torch.no_grad()
    def _bank_target(
        self, embedding: Tensor, rows: Tensor, place: Tensor, log_normalizer: Tensor, mixed: Mixed
    ) -> Tensor:
        """Return the vectors towards which the bank's `rows` of all processes move after the step."""
        everyone = distributed.gather(embedding)
        if self.config.update == "moving_average":
            return everyone
        probability = (embedding @ rows.T / self.config.temperature - log_normalizer[:, None]).exp()
        label = torch.zeros_like(probability)
        label[torch.arange(len(place)), place] = mixed.share
        label[torch.arange(len(place)), place[mixed.partner]] += 1 - mixed.share
        return gradient_update(everyone, distributed.gather(probability), distributed.gather(label))

    @torch.no_grad()
    def after_step(self, progress: Progress, memories: Sequence[Memory]) -> None:
        """Move the bank's rows of this step's images towards their targets (Cao & Wu, eq. 6)."""
        momentum = self.config.bank_momentum
        for memory in memories:
            images = memory["images"]
            moved = momentum * self.bank[images] + (1 - momentum) * memory["target"]
            self.bank.index_copy_(0, images, F.normalize(moved, dim=1))


def sqrt_kl(softmax: InstanceSoftmax, terms: tuple[Term, ...] = ("l1", "l2")) -> Tensor:
    """Return the KL divergence of the softmax p from u ~ sqrt(p), mean over the batch (Cao & Wu, eq. 7-9).

    l1 is the sum of p log p, l2 is minus the sum of p log u (Table 8). No gradient reaches u, otherwise its sign would
    flip. log u is half of log p plus a constant, so that the gradient of l2 is -1/2 of that of l1.
    """
    l1 = softmax.negative_entropy
    values = {"l1": l1, "l2": softmax.to_square_root - 0.5 * (l1 - l1.detach())}
    return torch.stack([values[term] for term in terms]).sum(dim=0).mean()


def gradient_update(embedding: Tensor, probability: Tensor, label: Tensor) -> Tensor:
    """Return the negative gradient of a batch's cross-entropy with respect to its class vectors, times the temperature.

    This is Cao & Wu's eq. 5. probability[b, i] (batch, batch) is the probability of image i's class for image b
    (docs/sources.md#cao-wu-bank-update), `label` (batch, batch) its target: the identity, or the shares of CutMix.
    """
    return (label - probability).T @ embedding
