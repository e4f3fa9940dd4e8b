"""Batch norm over parts of the batch: what several GPUs without synchronisation do, on one device.

MoCo and ReSSL keep a query from recognising its key by shared batch statistics: the keys are shuffled over the GPUs.
On one device a shuffle alone changes nothing, so the statistics must be those of parts (MoCo's CIFAR-10 notebook).
"""

import torch
from torch import Tensor, nn
from torch.nn import functional


class _SplitBatchNorm(nn.modules.batchnorm._BatchNorm):
    """In training normalise each of `splits` consecutive chunks of the batch by itself; in evaluation as ever.

    A batch that `splits` does not divide gives its first chunks one image more; a batch of fewer than two images a
    chunk gives fewer chunks of two. The running statistics move once a forward, by the mean of the chunks'.
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


def split_batchnorm(module: nn.Module, splits: int) -> nn.Module:
    """Turn every BatchNorm1d and 2d of the module into its split version, in place, and return the module.

    Parameters, buffers and their names stay. Raises ValueError for a batch norm of another kind, which would leak.
    """
    for path, layer in module.named_modules():
        if type(layer) in (nn.BatchNorm1d, SplitBatchNorm1d):
            layer.__class__ = SplitBatchNorm1d
        elif type(layer) in (nn.BatchNorm2d, SplitBatchNorm2d):
            layer.__class__ = SplitBatchNorm2d
        elif isinstance(layer, nn.modules.batchnorm._BatchNorm):
            raise ValueError(f"{path} is a {type(layer).__name__}, which cannot be split: use a torchvision backbone")
        if isinstance(layer, _SplitBatchNorm):
            layer.splits = splits
    return module
