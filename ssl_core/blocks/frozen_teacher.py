"""The frozen teacher of distillation: a pre-trained network from a file, in evaluation mode, without gradient."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import torch
import torch.nn.functional as F
from pydantic import PositiveFloat, PositiveInt
from torch import Tensor, nn

from ssl_core.config import IMAGENET, Backbone, Normalisation, Strict
from ssl_core.data.batch import BatchSource
from ssl_core.data.views import Augmentation, View, Views
from ssl_core.networks.backbones import (
    Network,
    build_backbone,
    check_image_size,
    load_backbone,
    load_weights,
    read_tensors,
)
from ssl_core.networks.families import features_and_map
from ssl_core.networks.heads import PROJECTOR, rebuild_mlp, select


class Teacher(Strict):
    """The frozen network to distil."""

    # A backbone.safetensors of this project, a checkpoint that `ssl-core convert` wrote or, with `backbone`, a state
    # dict by torchvision or timm: safetensors, or a .pth of tensors alone.
    weights: str
    backbone: Backbone | None = None  # the network, for a file without that entry in its header
    projector: str | None = None  # model.safetensors of the same run or the converted file; None: pooled features
    size: PositiveInt | None = None  # side of its input in pixels; None: the student's
    # Side that the position embeddings of the file are for (DINOv2 of timm: 518); None: `size`, else 224.
    trained_size: PositiveInt | None = None
    mean: tuple[float, float, float] | None = None  # normalisation; None: from the file's header, else ImageNet's
    std: tuple[PositiveFloat, PositiveFloat, PositiveFloat] | None = None


class FrozenTeacher(nn.Module):
    """Backbone and optional projector: views as the student sees them -> embeddings (batch, dim), in float32.

    The network is not part of the state dict, since its file is part of the run's identity. `load_head` reads another
    head than a plain projector: (file, num_features) -> (head, width of its output).
    """

    scale: Tensor
    shift: Tensor

    def __init__(self, config: Teacher, load_head: Callable[[Path, int], tuple[nn.Module, int]] | None = None) -> None:
        super().__init__()
        self.size = config.size
        backbone, self.normalisation = _load_backbone(config)
        self.num_features = self.dim = backbone.num_features
        projector: nn.Module = nn.Identity()
        if config.projector is not None:
            projector, self.dim = (load_head or load_projector)(Path(config.projector), backbone.num_features)
        self.network = nn.Sequential(backbone, projector).requires_grad_(False)
        self.network.register_state_dict_post_hook(_remove_network)
        self.network.register_load_state_dict_pre_hook(_add_network)
        self.register_buffer("scale", torch.ones(3, 1, 1))  # from the data's normalisation to the teacher's
        self.register_buffer("shift", torch.zeros(3, 1, 1))
        self.eval()

    def prepare(self, loader: BatchSource, device: torch.device) -> None:
        """Compute the map from the data's normalisation to the teacher's."""

        def per_channel(values: Sequence[float]) -> Tensor:
            return torch.tensor(values, device=device).view(3, 1, 1)

        mean, std = map(per_channel, loader.normalisation)
        teacher_mean, teacher_std = per_channel(self.normalisation.mean), per_channel(self.normalisation.std)
        self.scale.copy_(std / teacher_std)
        self.shift.copy_((mean - teacher_mean) / teacher_std)

    def train(self, mode: bool = True) -> Self:
        """Remain in evaluation mode."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, view: Tensor) -> Tensor:
        """Return the embeddings (batch, dim) of a view (batch, 3, size, size)."""
        return self.network(self._fit(view)).float()

    @torch.no_grad()
    def features_and_map(self, view: Tensor) -> tuple[Tensor, Tensor]:
        """Return pooled features (batch, num_features) and the last map (batch, channels, height, width)."""
        features, maps = features_and_map(self.network[0], self._fit(view))
        return features.float(), maps.float()

    def _fit(self, view: Tensor) -> Tensor:
        """Resize and normalise a view for the teacher."""
        if self.size is not None and self.size != view.shape[-1]:
            view = F.interpolate(view, size=(self.size, self.size), mode="bilinear", antialias=True)
        return view * self.scale + self.shift


class Distilled:
    """Base of methods whose `teacher` is or may be a frozen network."""

    teacher: Any

    def prepare(self, loader: BatchSource, device: torch.device) -> None:
        """Fit the input of a frozen teacher to the data's normalisation."""
        if isinstance(self.teacher, FrozenTeacher):
            self.teacher.prepare(loader, device)


def one_view(
    image_size: int,
    area: tuple[float, float],
    augmentation: Augmentation,
    *,
    seen_by: tuple[str, ...] = ("student", "teacher"),
) -> Views:
    """Return the group `both` of the single view that all networks see."""
    return {"both": View(size=image_size, area=area, augmentation=augmentation, seen_by=seen_by)}


def load_projector(path: Path, num_features: int) -> tuple[nn.Module, int]:
    """Rebuild the `projector` of a file from its shapes; return it with its output width.

    Raises ValueError if there is none, or none for `num_features` features.
    """
    tensors, _ = read_tensors(path)
    weights = select(tensors, PROJECTOR)
    if not weights:
        raise ValueError(f"{path} has no projector: leave out teacher.projector to distil pooled features")
    try:
        return rebuild_mlp(weights, num_features)
    except ValueError as error:
        raise ValueError(f"{path}: {error}: leave out teacher.projector to distil pooled features") from None


def _load_backbone(config: Teacher) -> tuple[Network, Normalisation]:
    path, normalisation = Path(config.weights), dict(IMAGENET)
    if config.backbone is None:
        backbone, header = load_backbone(path)
        normalisation |= {name: json.loads(header[name]) for name in ("mean", "std") if name in header}
    else:
        backbone = build_backbone(config.backbone, config.trained_size or config.size or 224)
        if config.size is not None and config.trained_size is not None:
            check_image_size(backbone, config.backbone, config.size)
        load_weights(backbone, path)
    normalisation |= config.model_dump(include={"mean", "std"}, exclude_none=True)
    return backbone, Normalisation.model_validate(normalisation)


def _remove_network(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    for name in [name for name in state if name.startswith(prefix)]:
        del state[name]


def _add_network(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    tensors: Mapping[str, Tensor] = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    state.update({f"{prefix}{name}": tensor for name, tensor in tensors.items()})
