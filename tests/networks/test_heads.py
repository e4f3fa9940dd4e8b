"""Heads have the layers of the papers."""

import pytest
import torch
from torch import nn

from ssl_core.networks.heads import Normalize, mlp, rebuild_mlp


def layers(head: nn.Sequential) -> list[str]:
    """Name the layers in order; a Linear without bias as `linear`, with one as `Linear`."""
    return ["linear" if isinstance(layer, nn.Linear) and layer.bias is None else type(layer).__name__ for layer in head]


def test_ressl_journal_projector():
    head = mlp((512, 4096, 256))
    assert layers(head) == ["Linear", "BatchNorm1d", "ReLU", "Linear"]
    assert sum(parameter.numel() for parameter in head.parameters()) == 513 * 4096 + 2 * 4096 + 4097 * 256


def test_ressl_neurips_projector_has_no_batch_norm():
    assert layers(mlp((512, 4096, 512), batch_norm=False)) == ["Linear", "ReLU", "Linear"]


def test_simsiam_projector_ends_with_a_batch_norm_without_scale():
    head = mlp((8, 16, 16, 16), bias=False, final_batch_norm=True, final_affine=False)
    assert layers(head) == ["linear", "BatchNorm1d", "ReLU"] * 2 + ["linear", "BatchNorm1d"]
    assert [layer.affine for layer in head if isinstance(layer, nn.BatchNorm1d)] == [True, True, False]


def test_the_last_layer_of_simsiams_predictor_has_a_bias():
    assert layers(mlp((16, 4, 16), bias=False)) == ["linear", "BatchNorm1d", "ReLU", "Linear"]


def test_dino_trunk_and_npid_head():
    trunk = mlp((8, 16, 16, 4), batch_norm=False, activation=nn.GELU)
    assert layers(trunk) == ["Linear", "GELU", "Linear", "GELU", "Linear"]
    assert layers(mlp((8, 4))) == ["Linear"]


def test_normalize_computes_in_float32():
    rows = Normalize()(torch.tensor([[3.0, 4.0], [0.0, 0.0]], dtype=torch.bfloat16))
    assert rows.dtype == torch.float32
    assert rows.flatten().tolist() == pytest.approx([0.6, 0.8, 0.0, 0.0])


@pytest.mark.parametrize(
    "weights",
    [
        {"0.weight": torch.ones(8)},
        {"0.weight": torch.tensor(1.0)},
        {"0.weight": torch.ones(4, 8, 1, 1)},
        {"0.weight_g": torch.ones(4, 1), "0.weight_v": torch.ones(4, 8)},
        {"0.weight": torch.ones(4, 8), "0.bias": torch.ones(3)},
        {"0.bias": torch.ones(3)},
        {"0.running_mean": torch.tensor(1.0)},
        {"1000000000.weight": torch.ones(4, 8)},
    ],
)
def test_tensors_of_other_layers_are_refused(weights: dict[str, torch.Tensor]) -> None:
    with pytest.raises(ValueError, match="its projector does not consist of plain layers"):
        rebuild_mlp(weights, 8)
