"""Layers behind a backbone: projectors, predictors, normalisation, and pooling over the quadrants of a map."""

import re
from collections.abc import Mapping, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional

PROJECTOR = "projector."  # prefix of a projector's tensors in files
PROTOTYPES = "prototypes"  # SwAV's, beside the layers of its projector in a converted file
NOT_PLAIN = "its projector does not consist of plain layers"


def mlp(
    dims: Sequence[int],
    *,
    batch_norm: bool = True,
    bias: bool = True,
    final_bias: bool = True,
    final_batch_norm: bool = False,
    final_affine: bool = True,
    activation: type[nn.Module] = nn.ReLU,
) -> nn.Sequential:
    """Build Linear layers of widths `dims`: (batch, dims[0]) -> (batch, dims[-1]), with activations between them.

    `batch_norm` normalises the hidden layers, `final_batch_norm` the output (`final_affine`: with scale and shift).
    `bias=False` drops the bias of layers in front of a batch norm, which cancels it; the other layers keep theirs.
    `final_bias=False` drops the bias of the last layer, for losses that cancel it.

    MoCo v2: mlp((d, d, 128), batch_norm=False). SimCLR: mlp((d, 2048, 128), final_batch_norm=True). BYOL and ReSSL
    (journal): mlp((d, 4096, 256)), predictor mlp((256, 4096, 256)). ReSSL (NeurIPS): mlp((d, 4096, 512),
    batch_norm=False). SimSiam: mlp((d, 2048, 2048, 2048), bias=False, final_batch_norm=True, final_affine=False),
    predictor mlp((2048, 512, 2048), bias=False). SwAV: mlp((d, 2048, 128)). DINO: mlp((d, 2048, 2048, 256),
    activation=nn.GELU). NPID: mlp((d, 128)).
    """
    layers: list[nn.Module] = []
    last = len(dims) - 2
    for index, (width_in, width_out) in enumerate(pairwise(dims)):
        normalised = final_batch_norm if index == last else batch_norm
        has_bias = (bias or not normalised) and (final_bias or index != last)
        layers.append(nn.Linear(width_in, width_out, bias=has_bias))
        if normalised:
            layers.append(nn.BatchNorm1d(width_out, affine=final_affine or index != last))
        if index != last:
            layers.append(activation())
    return nn.Sequential(*layers)


def select(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Return the tensors whose names start with `prefix`, without it."""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def rebuild_mlp(weights: Mapping[str, Tensor], num_features: int) -> tuple[nn.Sequential, int]:
    """Rebuild a projector from its tensors: linear layers and BatchNorms, ReLU in between; return it and its width.

    Prototypes are left out. Raises ValueError for other layers, and for a projector that does not take `num_features`
    features.
    """
    weights = {name: weight for name, weight in weights.items() if name != PROTOTYPES}
    if any(re.fullmatch(r"\d\d?\.\w+", name) is None for name in weights):  # a projector has below 100 layers
        raise ValueError(NOT_PLAIN)
    layers: list[nn.Module] = []
    dim = num_features
    for index in range(1 + max(int(name.split(".")[0]) for name in weights)):
        weight, mean = weights.get(f"{index}.weight"), weights.get(f"{index}.running_mean")
        if mean is not None and mean.ndim == 1:
            layers.append(nn.BatchNorm1d(len(mean), affine=weight is not None))
        elif weight is None:
            layers.append(nn.ReLU())
        elif weight.ndim != 2:
            raise ValueError(NOT_PLAIN)
        else:
            if weight.shape[1] != dim:
                raise ValueError(f"its projector takes {weight.shape[1]} features, its backbone gives {dim}")
            dim = len(weight)
            layers.append(nn.Linear(weight.shape[1], dim, bias=f"{index}.bias" in weights))
    projector = nn.Sequential(*layers)
    try:
        projector.load_state_dict(weights)
    except RuntimeError as error:  # other names or shapes
        raise ValueError(NOT_PLAIN) from error
    return projector, dim


class Normalize(nn.Module):
    """Scale each row to length 1, in float32 even under autocast."""

    def forward(self, rows: Tensor) -> Tensor:
        return functional.normalize(rows.float(), dim=1)


def quadrants(maps: Tensor) -> Tensor:
    """Average the quadrants of maps: (batch, channels, height, width) -> (4 * batch, channels).

    The rows are all top left quadrants, then top right, bottom left and bottom right. Maps of an odd side are first
    interpolated to the next even one, as JigClu does from 7 x 7 to 8 x 8. Raises ValueError for maps of one cell, which
    have no quadrants.
    """
    side = min(maps.shape[2:])
    if side < 2:
        raise ValueError("the last map has one cell, no quadrants: use larger images or backbone.stem: small")
    if side % 2:
        maps = functional.interpolate(maps, size=(side + 1, side + 1), mode="bilinear", align_corners=False)
    cells = functional.adaptive_avg_pool2d(maps, 2)  # (batch, channels, 2, 2)
    return torch.cat([*cells.flatten(2).unbind(2)])
