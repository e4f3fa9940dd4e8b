"""Projectors and predictors: the small networks behind a backbone, as every method builds them."""

from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor, nn
from torch.nn import functional


def mlp(
    dims: Sequence[int],
    *,
    batch_norm: bool = True,
    bias: bool = True,
    final_batch_norm: bool = False,
    final_affine: bool = True,
    activation: type[nn.Module] = nn.ReLU,
) -> nn.Sequential:
    """Build Linear layers of widths `dims`, (batch, dims[0]) -> (batch, dims[-1]), activated between but not after.

    `batch_norm` normalises the hidden layers, `final_batch_norm` the output (`final_affine`: with scale and shift).
    `bias=False` drops the bias of layers that a batch norm follows and cancels; all others have one.

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
        layers.append(nn.Linear(width_in, width_out, bias=bias or not normalised))
        if normalised:
            layers.append(nn.BatchNorm1d(width_out, affine=final_affine or index != last))
        if index != last:
            layers.append(activation())
    return nn.Sequential(*layers)


class Normalize(nn.Module):
    """Scale every row to length 1, in float32 even under autocast."""

    def forward(self, rows: Tensor) -> Tensor:
        return functional.normalize(rows.float(), dim=1)
