"""Collectives that make N processes equal one process on the concatenated batch; no-ops in a single process."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ssl_core.networks.batchnorm import SplitBatchNorm1d, SplitBatchNorm2d


def is_distributed() -> bool:
    """Return whether a process group of several processes is running."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def rank() -> int:
    """Return the rank of this process, 0 in a single process."""
    return dist.get_rank() if is_distributed() else 0


def world_size() -> int:
    """Return the number of processes, 1 in a single process."""
    return dist.get_world_size() if is_distributed() else 1


@torch.no_grad()
def gather(tensor: Tensor) -> Tensor:
    """Concatenate `tensor` (batch, ...) of all processes in rank order, without gradient."""
    if not is_distributed():
        return tensor
    parts = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for _ in range(world_size())]
    dist.all_gather(parts, tensor.contiguous())
    return torch.cat(parts)


def gather_with_gradient(tensor: Tensor) -> Tensor:
    """Concatenate `tensor` (batch, ...) of all processes in rank order, with gradient to each of them.

    For a loss that each process averages over its part of the batch: DistributedDataParallel averages the gradients
    over processes, which gives the gradient of one process on the concatenated batch.
    """
    return _Gather.apply(tensor) if is_distributed() else tensor


def shuffle(images: Tensor, *, seed: int, step: int) -> tuple[Tensor, Tensor]:
    """Permute the images (batch, ...) across all processes; return the part of this process and the order.

    For BatchNorm statistics that do not reveal the positive pair (He et al., 2020, section 3.3). The order depends on
    seed and step only, so that a resumed run draws it again.
    """
    everyone = gather(images)
    generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
    order = torch.randperm(len(everyone), generator=generator).to(images.device, non_blocking=True)
    own = slice(rank() * len(images), (rank() + 1) * len(images))
    return everyone[order[own]].contiguous(memory_format=torch.channels_last), order


def unshuffle(rows: Tensor, order: Tensor) -> Tensor:
    """Return `rows` (batch, dim) of shuffled images to the processes and positions of the original order."""
    own = slice(rank() * len(rows), (rank() + 1) * len(rows))
    return gather(rows)[order.argsort()[own]]


def average(tensor: Tensor) -> Tensor:
    """Return the mean of `tensor` over processes, without gradient."""
    return _averaged(tensor.detach()) if is_distributed() else tensor


def agree(value: bool, device: torch.device) -> bool:
    """Return rank 0's `value` on every process."""
    if not is_distributed():
        return value
    flag = torch.tensor(int(value), device=device)
    dist.broadcast(flag, 0)
    return bool(flag.item())


class _Gather(torch.autograd.Function):
    """Concatenation over processes; backward sums over processes the gradients of this process's tensor."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        return gather(tensor)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        total = gradients[0].clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total.chunk(world_size())[rank()]


class _Average(torch.autograd.Function):
    """The mean over processes of a tensor, and of its gradient."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        return _averaged(tensor)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return _averaged(gradients[0])


def _averaged(tensor: Tensor) -> Tensor:
    result = tensor.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(result)
    return result / world_size()


class SyncBatchNorm(nn.modules.batchnorm._BatchNorm):
    """BatchNorm over the batches of all processes, on CPU as on GPU (torch's own refuses CPU tensors).

    In training the mean and then the variance are averaged over processes of equal batch, with gradient.
    """

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() not in (2, 4):
            raise ValueError(
                f"expected (batch, channels) or (batch, channels, height, width), found {input.dim()} axes"
            )

    def forward(self, input: Tensor) -> Tensor:
        """Normalise `input` (batch, channels[, height, width]) per channel."""
        if not self.training or not is_distributed():
            return super().forward(input)
        values = input.float()
        axes = [0, *range(2, input.dim())]
        shape = [1, -1] + [1] * (input.dim() - 2)
        mean: Tensor = _Average.apply(values.mean(axes))
        centred = values - mean.view(shape)
        variance: Tensor = _Average.apply(centred.square().mean(axes))
        self._track(mean.detach(), variance.detach(), input.numel() // input.shape[1] * world_size())
        result = centred * torch.rsqrt(variance + self.eps).view(shape)
        if self.affine:
            result = result * self.weight.view(shape) + self.bias.view(shape)
        return result.to(input.dtype)

    def _track(self, mean: Tensor, variance: Tensor, count: int) -> None:
        if self.running_mean is None or self.running_var is None or self.num_batches_tracked is None:
            return
        self.num_batches_tracked.add_(1)
        momentum = self.momentum if self.momentum is not None else 0.1
        self.running_mean.lerp_(mean, momentum)
        self.running_var.lerp_(variance * count / max(count - 1, 1), momentum)


def _is_of_another_kind(child: nn.Module) -> bool:
    known = isinstance(child, (SyncBatchNorm, SplitBatchNorm1d, SplitBatchNorm2d))
    trained = any(parameter.requires_grad for parameter in child.parameters())
    return isinstance(child, nn.modules.batchnorm._BatchNorm) and not known and trained


def synchronise_batchnorm(module: nn.Module) -> nn.Module:
    """Replace every plain BatchNorm in `module` by `SyncBatchNorm`, names in the state dict unchanged.

    Split ones stay: their parts stand for processes. Raises ValueError for one of another kind that is trained.
    """
    for name, child in module.named_children():
        if isinstance(child, nn.modules.batchnorm._BatchNorm) and type(child) in (nn.BatchNorm1d, nn.BatchNorm2d):
            synced = SyncBatchNorm(
                child.num_features, child.eps, child.momentum, child.affine, child.track_running_stats
            )
            synced.load_state_dict(child.state_dict())
            for parameter, own in zip(child.parameters(), synced.parameters(), strict=True):
                own.requires_grad_(parameter.requires_grad)
            synced.train(child.training)
            setattr(module, name, synced)
        elif _is_of_another_kind(child):
            raise ValueError(
                f"training.sync_batchnorm cannot replace {type(child).__name__} ({name}): set it to false or choose "
                "another backbone"
            )
        else:
            synchronise_batchnorm(child)
    return module
