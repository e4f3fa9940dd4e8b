"""Heads have the layers of the papers."""

import pytest
import torch
from torch import nn

from ssl_core.networks.heads import Normalize, mlp


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
