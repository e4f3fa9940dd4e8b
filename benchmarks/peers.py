"""The peer of a training step: lightly's building blocks in the plain PyTorch loops of its documentation."""

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from lightly.data import LightlyDataset
from lightly.loss import DINOLoss, NTXentLoss
from lightly.models.modules import DINOProjectionHead, MoCoProjectionHead, SimCLRProjectionHead
from lightly.models.modules.memory_bank import MemoryBankModule
from lightly.models.utils import deactivate_requires_grad, update_momentum
from lightly.transforms.dino_transform import DINOTransform
from lightly.transforms.moco_transform import MoCoV2Transform
from lightly.transforms.multi_view_transform import MultiViewTransform
from lightly.transforms.simclr_transform import SimCLRTransform
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision import transforms

from ssl_core.config import Backbone
from ssl_core.networks.backbones import build_backbone

QUEUE = (4096, 128)
NORMALISE = transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
Loss = Callable[[list[Tensor]], Tensor]


def training(
    method: dict[str, Any],
    backbone: dict[str, Any],
    folder: Path,
    *,
    size: int,
    batch_size: int,
    workers: int,
    bf16: bool,
) -> Callable[[int], None]:
    """Return a function that runs a number of training steps."""
    torch.manual_seed(0)
    network = build_backbone(Backbone(**backbone), size)
    transform, module = METHODS[method["name"]](method, network, size)
    data: Any = LightlyDataset(str(folder), transform=transform)
    loader = DataLoader(
        data, batch_size=batch_size, shuffle=True, drop_last=True, num_workers=workers, persistent_workers=True
    )
    trained = (parameter for parameter in module.parameters() if parameter.requires_grad)
    optimizer = torch.optim.SGD(trained, lr=0.06, momentum=0.9, weight_decay=5e-4)
    batches = endless(loader)

    def run(steps: int) -> None:
        for _ in range(steps):
            views = next(batches)[0]
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
                loss = module(views)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    return run


def endless(loader: DataLoader[Any]) -> Iterator[Any]:
    while True:
        yield from loader


class SimCLR(nn.Module):
    def __init__(self, method: dict[str, Any], network: Any) -> None:
        super().__init__()
        self.backbone = network
        self.projection_head = SimCLRProjectionHead(network.num_features, method["projector_hidden"], 128)
        self.criterion = NTXentLoss()

    def forward(self, views: list[Tensor]) -> Tensor:
        first, second = (self.projection_head(self.backbone(view)) for view in views)
        return self.criterion(first, second)


class MoCo(nn.Module):
    """MoCo with the query's loss only, as in the official code and in lightly's documentation."""

    def __init__(self, method: dict[str, Any], network: Any) -> None:
        super().__init__()
        self.backbone = network
        self.projection_head = MoCoProjectionHead(network.num_features, method["projector_hidden"], 128)
        self.backbone_momentum = copy.deepcopy(self.backbone)
        self.projection_head_momentum = copy.deepcopy(self.projection_head)
        deactivate_requires_grad(self.backbone_momentum)
        deactivate_requires_grad(self.projection_head_momentum)
        self.criterion = NTXentLoss(memory_bank_size=QUEUE)

    def embed(self, views: list[Tensor]) -> tuple[Tensor, Tensor]:
        update_momentum(self.backbone, self.backbone_momentum, m=0.99)
        update_momentum(self.projection_head, self.projection_head_momentum, m=0.99)
        query = self.projection_head(self.backbone(views[0]))
        key = self.projection_head_momentum(self.backbone_momentum(views[1])).detach()
        return query, key

    def forward(self, views: list[Tensor]) -> Tensor:
        query, key = self.embed(views)
        return self.criterion(query, key)


class ReSSL(MoCo):
    """ReSSL, which lightly does not have: MoCo's parts, lightly's memory bank and the relation loss."""

    def __init__(self, method: dict[str, Any], network: Any) -> None:
        super().__init__(method, network)
        self.projection_head = MoCoProjectionHead(
            network.num_features, method["projector_hidden"], 128, batch_norm=True
        )
        self.projection_head_momentum = copy.deepcopy(self.projection_head)
        deactivate_requires_grad(self.projection_head_momentum)
        self.memory_bank = MemoryBankModule(size=QUEUE)

    def forward(self, views: list[Tensor]) -> Tensor:
        query, key = self.embed(views)
        query, key = F.normalize(query, dim=1), F.normalize(key, dim=1)
        key, bank = self.memory_bank(key, update=True)
        target = F.softmax(key @ bank / 0.04, dim=1)
        return -(target * F.log_softmax(query @ bank / 0.1, dim=1)).sum(dim=1).mean()


class DINO(nn.Module):
    def __init__(self, method: dict[str, Any], network: Any) -> None:
        super().__init__()
        dims = (network.num_features, method["head_hidden"], method["bottleneck_dim"], method["num_outputs"])
        self.student_backbone, self.student_head = network, DINOProjectionHead(*dims, freeze_last_layer=1)
        self.teacher_backbone, self.teacher_head = copy.deepcopy(network), DINOProjectionHead(*dims)
        deactivate_requires_grad(self.teacher_backbone)
        deactivate_requires_grad(self.teacher_head)
        self.criterion = DINOLoss(output_dim=method["num_outputs"], warmup_teacher_temp_epochs=5)

    def forward(self, views: list[Tensor]) -> Tensor:
        update_momentum(self.student_backbone, self.teacher_backbone, m=0.996)
        update_momentum(self.student_head, self.teacher_head, m=0.996)
        teacher = [self.teacher_head(self.teacher_backbone(view)) for view in views[:2]]
        student = [self.student_head(self.student_backbone(view)) for view in views]
        return self.criterion(teacher, student, epoch=0)


def weak(size: int) -> transforms.Compose:
    crop = transforms.RandomResizedCrop(size, scale=(0.2, 1.0))
    return transforms.Compose([crop, transforms.RandomHorizontalFlip(), transforms.ToTensor(), NORMALISE])


def views(kind: str, size: int, local_size: int) -> Any:
    """Return lightly's transform of an image into a list of views, of a kind of `loader.KINDS`."""
    strong = MoCoV2Transform(input_size=size).transforms[0]
    if kind == "one":
        return MultiViewTransform(transforms=[strong])
    if kind == "weak + strong":
        return MultiViewTransform(transforms=[strong, weak(size)])
    return DINOTransform(global_crop_size=size, local_crop_size=local_size, n_local_views=6)


def ressl(method: dict[str, Any], network: Any, size: int) -> tuple[Any, nn.Module]:
    return views("weak + strong", size, 0), ReSSL(method, network)


def moco(method: dict[str, Any], network: Any, size: int) -> tuple[Any, nn.Module]:
    return MoCoV2Transform(input_size=size), MoCo(method, network)


def simclr(method: dict[str, Any], network: Any, size: int) -> tuple[Any, nn.Module]:
    return SimCLRTransform(input_size=size, cj_strength=0.5, gaussian_blur=0.0), SimCLR(method, network)


def dino(method: dict[str, Any], network: Any, size: int) -> tuple[Any, nn.Module]:
    transform = DINOTransform(global_crop_size=size, local_crop_size=size // 2, n_local_views=method["num_locals"])
    return transform, DINO(method, network)


METHODS = {"ressl": ressl, "moco": moco, "simclr": simclr, "dino": dino}
