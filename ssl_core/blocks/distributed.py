"""Collectives that make N processes equal one process on the concatenated batch; no-ops in a single process."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def is_distributed() -> bool:
    """Return whether a process group of several processes is running."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def rank() -> int:
    """Return the rank of this process, 0 in a single process."""
    return dist.get_rank() if is_distributed() else 0


def world_size() -> int:
    """Return the number of processes, 1 without a process group."""
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
    """Concatenate `tensor` (batch, ...) of all processes in rank order, with gradients to each process.

    For losses that each process averages over its own batch: DistributedDataParallel averages the gradients over
    processes, which gives the gradient of one process on the concatenated batch.
    """
    return _Gather.apply(tensor) if is_distributed() else tensor


def shuffle(images: Tensor, *, seed: int, step: int) -> tuple[Tensor, Tensor]:
    """Permute the images (batch, ...) of all processes; return this process's part and the order.

    For BatchNorm statistics that do not reveal the positive pair (He et al., 2020, section 3.3). The order depends on
    seed and step only, so that a resumed run draws it again.
    """
    all_images = gather(images)
    generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
    order = torch.randperm(len(all_images), generator=generator).to(images.device, non_blocking=True)
    part = slice(rank() * len(images), (rank() + 1) * len(images))
    return all_images[order[part]].contiguous(memory_format=torch.channels_last), order


def unshuffle(rows: Tensor, order: Tensor) -> Tensor:
    """Undo `shuffle` for `rows` (batch, dim) that were computed from shuffled images."""
    part = slice(rank() * len(rows), (rank() + 1) * len(rows))
    return gather(rows)[order.argsort()[part]]


def average(tensor: Tensor) -> Tensor:
    """Return the mean of `tensor` over processes, without gradient."""
    if not is_distributed():
        return tensor
    total = tensor.detach().clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total)
    return total / world_size()


def agree(value: bool, device: torch.device) -> bool:
    """Return rank 0's `value` on every process."""
    if not is_distributed():
        return value
    flag = torch.tensor(int(value), device=device)
    dist.broadcast(flag, 0)
    return bool(flag.item())


def any_rank(value: bool) -> bool:
    """Return on every process whether `value` is true on any; exchanged on the CPU, so no device waits."""
    if not is_distributed():
        return value
    flag = torch.tensor(int(value))
    dist.all_reduce(flag, dist.ReduceOp.MAX)
    return bool(flag.item())


class _Gather(torch.autograd.Function):
    """The tensors of all processes; its gradient is the sum over processes of the gradients for this process's part."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        return gather(tensor)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        total = gradients[0].clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total.chunk(world_size())[rank()]
