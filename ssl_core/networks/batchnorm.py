"""Batch norm with statistics of parts of the batch (split) or of the batches of all processes (synchronised).

MoCo and ReSSL shuffle the keys over the GPUs, so that query and key of an image have different batch statistics and
cannot be matched by them. On one device shuffling alone changes nothing, so the batch is split into parts, as in MoCo's
CIFAR-10 notebook (docs/sources.md#batchnorm-leak).
"""

from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm
from torchvision.models.resnet import BasicBlock, Bottleneck


class _SplitBatchNorm(_BatchNorm):
    """In training normalise each of `splits` consecutive chunks of the batch by itself; in evaluation as usual.

    If `splits` does not divide the batch, the first chunks get one image more; a batch of fewer than two images per
    chunk is cut into fewer chunks of two. The running statistics move once per forward pass, to the mean over chunks.
    """

    splits: int = 1

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return super().forward(input)
        self._check_input_dim(input)
        if not (self.track_running_stats and self.momentum is not None):
            raise ValueError("split batch norm needs track_running_stats=True and a number as momentum")
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        chunks = input.tensor_split(max(1, min(self.splits, len(input) // 2)))
        means = self.running_mean.repeat(len(chunks), 1)
        variances = self.running_var.repeat(len(chunks), 1)
        normalised = [
            functional.batch_norm(
                chunk, mean, variance, self.weight, self.bias, training=True, momentum=self.momentum, eps=self.eps
            )
            for chunk, mean, variance in zip(chunks, means, variances, strict=True)
        ]
        self.running_mean.copy_(means.mean(dim=0))
        self.running_var.copy_(variances.mean(dim=0))
        self.num_batches_tracked.add_(1)
        return torch.cat(normalised)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, splits={self.splits}"


class SplitBatchNorm1d(_SplitBatchNorm, nn.BatchNorm1d):
    """`BatchNorm1d` with the statistics of chunks of the batch."""


class SplitBatchNorm2d(_SplitBatchNorm, nn.BatchNorm2d):
    """`BatchNorm2d` with the statistics of chunks of the batch."""


class SyncBatchNorm(_BatchNorm):
    """Batch norm over the batches of all processes, for CPU tensors, which `torch.nn.SyncBatchNorm` refuses.

    In training the statistics of processes of equal batch size are combined, with gradient.
    """

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() not in (2, 4):
            raise ValueError(
                f"expected (batch, channels) or (batch, channels, height, width), found {input.dim()} axes"
            )

    def forward(self, input: Tensor) -> Tensor:
        """Normalise `input` (batch, channels[, height, width]) per channel."""
        if not self.training or not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
            return super().forward(input)
        self._check_input_dim(input)
        weight, bias = self.weight, self.bias
        if not self.affine:
            weight, bias = input.new_ones(self.num_features), input.new_zeros(self.num_features)
        result, mean, variance = _SynchronisedNorm.apply(input, weight, bias, self.eps)
        self._track(mean, variance, input.numel() // self.num_features * dist.get_world_size())
        return result

    def _track(self, mean: Tensor, variance: Tensor, count: int) -> None:
        """Move the running statistics; `count` is the number of values per channel."""
        if self.running_mean is None or self.running_var is None or self.num_batches_tracked is None:
            return
        self.num_batches_tracked.add_(1)
        momentum = self.momentum if self.momentum is not None else 1 / int(self.num_batches_tracked)
        self.running_mean.lerp_(mean, momentum)
        self.running_var.lerp_(variance * count / max(count - 1, 1), momentum)


class _SynchronisedNorm(torch.autograd.Function):
    """Batch norm with the mean and the variance (channels) of all processes: torch's kernels, one exchange per pass.

    The variance is the mean variance plus the variance of the means. Backward, with weight w, incoming gradient g and
    normalised input x: w / std * (g - mean(g) - x * mean(g * x)). The kernel for fixed statistics gives the first term
    and this process's sums of g and g * x.
    """

    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
        _, mean, inverse = torch.native_batch_norm(input, weight, bias, None, None, True, 0.0, eps)
        means, variances = _gather(torch.stack([mean, inverse.pow(-2) - eps])).unbind(dim=1)
        mean, variance = means.mean(dim=0), variances.mean(dim=0) + means.var(dim=0, correction=0)
        ctx.save_for_backward(input, weight, mean, variance)
        ctx.eps = eps
        ctx.mark_non_differentiable(mean, variance)
        return functional.batch_norm(input, mean, variance, weight, bias, eps=eps), mean, variance

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        input, weight, mean, variance = ctx.saved_tensors
        gradient, of_weight, of_bias = torch.ops.aten.native_batch_norm_backward(
            gradients[0], input, weight, mean, variance, None, None, False, ctx.eps, [True, True, True]
        )
        parts = _gather(torch.stack([of_bias, of_weight]))
        shift, slope = parts.mean(dim=0) / (input.numel() // len(mean))
        inverse = torch.rsqrt(variance + ctx.eps)
        slope = slope * inverse
        added = functional.batch_norm(
            input, mean, torch.ones_like(mean), weight * inverse * slope, weight * inverse * shift, eps=0.0
        )
        return gradient - added, of_weight, of_bias, None


def _gather(tensor: Tensor) -> Tensor:
    """Return the tensors of all processes, stacked; gloo needs less than half of the time of a sum over processes."""
    parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, tensor)
    return torch.stack(parts)


def split_batchnorm(module: nn.Module, splits: int) -> nn.Module:
    """Turn every BatchNorm1d and BatchNorm2d of the module into its split version, in place; return the module.

    Parameters, buffers and their names stay. Raises ValueError for a batch norm of another kind, whose statistics would
    leak.
    """
    for path, layer in module.named_modules():
        if type(layer) in (nn.BatchNorm1d, SplitBatchNorm1d):
            layer.__class__ = SplitBatchNorm1d
        elif type(layer) in (nn.BatchNorm2d, SplitBatchNorm2d):
            layer.__class__ = SplitBatchNorm2d
        elif isinstance(layer, _BatchNorm):
            raise ValueError(f"{path} is a {type(layer).__name__}, which cannot be split: use a torchvision backbone")
        if isinstance(layer, _SplitBatchNorm):
            layer.splits = splits
    return module


def synchronise_batchnorm(module: nn.Module, *, cuda: bool) -> nn.Module:
    """Turn every BatchNorm1d and BatchNorm2d of the module into a synchronised one, in place; return the module.

    With `cuda` they become `torch.nn.SyncBatchNorm`, else ours. Parameters, buffers and their names stay. Split batch
    norms stay too: their chunks take the place of processes. Raises ValueError for a trained batch norm of another
    kind.
    """
    for path, layer in module.named_modules():
        if type(layer) in (nn.BatchNorm1d, nn.BatchNorm2d):
            layer.__class__ = nn.SyncBatchNorm if cuda else SyncBatchNorm
            layer.process_group = None  # pyright: ignore[reportArgumentType] - None means all processes
        elif isinstance(layer, _BatchNorm) and not _is_accepted(layer):
            raise ValueError(
                f"training.sync_batchnorm cannot replace {type(layer).__name__} ({path}): set it to false or choose "
                "another backbone"
            )
    return module


def _is_accepted(layer: _BatchNorm) -> bool:
    frozen = not any(parameter.requires_grad for parameter in layer.parameters())
    return frozen or isinstance(layer, (SyncBatchNorm, nn.SyncBatchNorm, _SplitBatchNorm))


def zero_residuals(backbone: nn.Module) -> None:
    """Set the last BatchNorm of each residual block of a ResNet to 0, so that the blocks start as identities."""
    for block in backbone.modules():
        if isinstance(block, BasicBlock | Bottleneck):
            last = block.bn2 if isinstance(block, BasicBlock) else block.bn3
            nn.init.zeros_(cast(Tensor, last.weight))
