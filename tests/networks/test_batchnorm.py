"""Split batch norm equals one ordinary batch norm per chunk in training and a single one in evaluation."""

import copy

import pytest
import torch
from torch import Tensor, nn

from ssl_core.config import Backbone
from ssl_core.networks.backbones import build_backbone
from ssl_core.networks.batchnorm import SplitBatchNorm2d, SyncBatchNorm, split_batchnorm, synchronise_batchnorm
from ssl_core.networks.heads import mlp


def batch(rows: int) -> Tensor:
    return torch.randn(rows, 3, 4, 4, generator=torch.Generator().manual_seed(0)) * 2 + 1


@pytest.mark.parametrize(("rows", "splits", "sizes"), [(8, 4, [2] * 4), (7, 3, [3, 2, 2]), (5, 8, [3, 2]), (1, 8, [1])])
def test_training_equals_one_batch_norm_per_chunk(rows: int, splits: int, sizes: list[int]):
    plain = nn.BatchNorm2d(3)
    nn.init.uniform_(plain.double().weight)
    split = split_batchnorm(copy.deepcopy(plain), splits)
    devices = [copy.deepcopy(plain) for _ in sizes]
    inputs, twin = batch(rows).double().requires_grad_(), batch(rows).double().requires_grad_()

    output = split(inputs)
    expected = torch.cat([device(chunk) for device, chunk in zip(devices, twin.split(sizes), strict=True)])
    torch.testing.assert_close(output, expected)
    output.pow(3).sum().backward()  # the sum of squares would have no gradient but rounding
    expected.pow(3).sum().backward()
    torch.testing.assert_close(inputs.grad, twin.grad)
    for name in ("running_mean", "running_var"):
        mean = torch.stack([device.get_buffer(name) for device in devices]).mean(dim=0)
        torch.testing.assert_close(split.get_buffer(name), mean)
    assert split.get_buffer("num_batches_tracked") == 1


def test_evaluation_and_names_are_those_of_ordinary_batch_norm():
    plain = build_backbone(Backbone(name="resnet18", stem="tiny"), 16)
    split = split_batchnorm(copy.deepcopy(plain), 4)
    assert list(plain.state_dict()) == list(split.state_dict())
    assert sum(isinstance(layer, SplitBatchNorm2d) for layer in split.modules()) == 20
    images = torch.rand(4, 3, 16, 16)
    torch.testing.assert_close(plain.eval()(images), split.eval()(images), rtol=0, atol=0)


def test_an_image_does_not_influence_other_chunks():
    head = split_batchnorm(mlp((4, 8, 4)), 2)
    rows = torch.randn(8, 4)
    before = head(rows)[4:]
    rows[0] += 100
    torch.testing.assert_close(head(rows)[4:], before)


def test_splitting_again_changes_the_number_of_chunks():
    layer = split_batchnorm(split_batchnorm(nn.BatchNorm2d(3), 2), 4)
    torch.testing.assert_close(layer(batch(8))[:2], nn.BatchNorm2d(3)(batch(8)[:2]))


def test_batch_norms_of_another_kind_are_refused():
    with pytest.raises(ValueError, match="bn1 is a BatchNormAct2d, which cannot be split"):
        split_batchnorm(build_backbone(Backbone(name="timm/mobilenetv4_conv_small_050"), 32), 2)


def test_the_output_is_channels_last_like_the_input():
    layer = split_batchnorm(nn.BatchNorm2d(3), 2)
    output = layer(batch(8).to(memory_format=torch.channels_last))
    assert output.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(("cuda", "kind"), [(True, nn.SyncBatchNorm), (False, SyncBatchNorm)])
def test_synchronising_keeps_parameters_and_evaluation(cuda: bool, kind: type[nn.Module]):
    plain = build_backbone(Backbone(name="resnet18", stem="tiny"), 16)
    plain.get_submodule("bn1").requires_grad_(False)
    synchronised = copy.deepcopy(plain)
    parameters = dict(synchronised.named_parameters())
    synchronise_batchnorm(synchronised, cuda=cuda)
    assert sum(type(layer) is kind for layer in synchronised.modules()) == 20
    assert list(synchronised.state_dict()) == list(plain.state_dict())
    assert all(parameter is parameters[name] for name, parameter in synchronised.named_parameters())
    assert not synchronised.get_parameter("bn1.weight").requires_grad
    images = torch.rand(4, 3, 16, 16)
    torch.testing.assert_close(plain.eval()(images), synchronised.eval()(images), rtol=0, atol=0)


def test_synchronising_keeps_split_and_frozen_batch_norms_and_refuses_others():
    class Other(nn.BatchNorm2d):
        pass

    frozen = nn.Sequential(Other(3).requires_grad_(False), SplitBatchNorm2d(3))
    synchronise_batchnorm(frozen, cuda=False)
    assert [type(layer) for layer in frozen] == [Other, SplitBatchNorm2d]
    with pytest.raises(ValueError, match=r"cannot replace Other \(1\)"):
        synchronise_batchnorm(nn.Sequential(nn.Flatten(), Other(3)), cuda=False)
