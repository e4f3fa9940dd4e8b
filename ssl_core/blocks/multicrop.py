"""Multi-crop: two global views of an image and several small local ones (Caron et al., 2020).

Shared by MoCo, SwAV and DINO: the settings, the presets of SSLight (Tan et al., ICLR 2023,
https://arxiv.org/abs/2210.02808), one forward pass per image size, and the weights of the pairs of views.
"""

from collections.abc import Sequence
from itertools import groupby
from typing import Self

import torch
from pydantic import Field, NonNegativeInt, PositiveInt, model_validator
from torch import Tensor, nn

from ssl_core.config import Strict
from ssl_core.data.view_sizes import local_size
from ssl_core.data.views import Augmentation, View, Views


class MultiCrop(Strict):
    """Number, area and size of the views, and their weights in the loss."""

    area: tuple[float, float] = (0.14, 1.0)  # of global views, share of the image; SSLight: from 0.3
    num_locals: NonNegativeInt = 0
    local_area: tuple[float, float] = (0.05, 0.14)  # SSLight: up to 0.3
    # pixels; None: equal pixel scale (SSLight), to the nearest multiple of `local_multiple`
    local_size: PositiveInt | None = None
    local_multiple: PositiveInt = 8
    # weight of the pairs of global views, the rest is for those with a local one (SSLight, eq. 3); None: all alike
    alpha: float | None = Field(default=None, ge=0, le=1)

    @model_validator(mode="after")
    def _alpha_has_something_to_weigh(self) -> Self:
        if self.alpha is not None and self.num_locals == 0:
            raise ValueError("alpha weighs pairs of global views against local ones: set num_locals, or alpha: null")
        return self


# Parts of the methods' presets. For images of 224 pixels, local views have 96 pixels here and 128 in SSLIGHT.
SIX_LOCALS = {"area": (0.14, 1.0), "num_locals": 6, "local_area": (0.05, 0.14), "local_multiple": 32}
SSLIGHT = {"area": (0.3, 1.0), "num_locals": 6, "local_area": (0.05, 0.3), "local_multiple": 32, "alpha": 0.4}
SSLIGHT_TRAINING = {
    "optimizer": "lars", "weight_decay": 1e-6, "batch_size": 1024, "epochs": 200, "warmup_epochs": 10,
    "minimum_learning_rate": 0.0048,  # the code's; 1e-3 x peak in the paper (docs/sources.md#sslight-minimum-rate)
    "decay_exclusion": "norm_bias_depthwise",
}  # fmt: skip


def local_views(
    config: MultiCrop, image_size: int, augmentation: Augmentation, *, interpolation: str = "linear"
) -> Views:
    """Return the group of local views, or no group if `num_locals` is 0.

    Raises `ValueError` for local views that are not smaller than the global ones, of `image_size` pixels.
    """
    if config.num_locals == 0:
        return {}
    size = config.local_size or local_size(image_size, config.area, config.local_area, multiple=config.local_multiple)
    if size >= image_size:
        raise ValueError(
            f"method: local views of {size} pixels are no smaller than the images ({image_size}): set local_size, or a "
            f"local_multiple below {config.local_multiple}"
        )
    view = {
        "count": config.num_locals,
        "size": size,
        "area": config.local_area,
        "interpolation": interpolation,
        "augmentation": augmentation,
    }
    return {"local": View.model_validate(view)}


def encode(backbone: nn.Module, views: Sequence[Tensor]) -> Tensor:
    """Return the features (views * batch, dim) of `views`, each (batch, 3, size, size), in their order.

    Consecutive views of equal size form one batch of the backbone, so that its BatchNorm sees each size separately.
    A head that follows sees all views at once (docs/sources.md#multicrop-forward).
    """
    sizes = groupby(views, key=lambda view: view.shape[-1])
    return torch.cat([backbone(torch.cat([*group])) for _, group in sizes])


def cross_entropies(targets: Tensor, log_predictions: Tensor) -> Tensor:
    """Return the cross-entropy of each pair (target view, predicted view), mean over the batch.

    `targets` are distributions (target views, batch, outputs), `log_predictions` (views, batch, outputs). No
    gradient reaches the targets.
    """
    return torch.stack([-(target * log_predictions).sum(dim=2).mean(dim=1) for target in targets.detach()])


def balance(pairs: Tensor, alpha: float | None) -> tuple[Tensor, dict[str, Tensor]]:
    """Return alpha * mean over pairs of global views + (1 - alpha) * mean over pairs with a local one, and both means.

    `pairs` holds the losses (global views, all views), global views first. A view is not paired with itself. Without
    `alpha` all pairs have the same weight. Raises `ValueError` if there is no pair.
    """
    num_globals, num_views = pairs.shape
    if num_views < 2:
        raise ValueError(
            "views: the loss compares different views of an image, found a single one: set a count of 2 or more"
        )
    across, beside = num_globals * (num_globals - 1), num_globals * (num_views - num_globals)
    others = 1 - torch.eye(num_globals, device=pairs.device)
    means: dict[str, Tensor] = {}
    if across:
        means["global"] = (pairs[:, :num_globals] * others).sum() / across
    if beside:
        means["local"] = pairs[:, num_globals:].mean()
    if len(means) == 1:
        (total,) = means.values()
    else:
        weight = across / (across + beside) if alpha is None else alpha
        total = weight * means["global"] + (1 - weight) * means["local"]
    return total, {name: mean.detach() for name, mean in means.items()}
