"""Memory of a pre-training before it runs: an estimate, the capacity, and settings under which a batch fits."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import psutil
import torch
from torch import Tensor, nn

from ssl_core.blocks.schedules import forward_batch_size
from ssl_core.config import Training
from ssl_core.data.batch import Batch
from ssl_core.data.loader import SHUFFLE_BUFFER
from ssl_core.data.views import Views
from ssl_core.methods.base import Method, Progress
from ssl_core.training.precision import autocast_type

OPTIMIZER_STATES = {"sgd": 1, "lars": 1, "adamw": 2}  # numbers per trained parameter
LIBRARIES = 0.9e9  # bytes of a process after importing torch and DALI, measured on a processor
BUFFERED, INDEXED = 900, 450  # bytes per image in the shuffle buffer, and per image of an index
PER_IMAGE = ("activations", "views", "decoded images")  # uses that grow with the images of a forward pass
CGROUP = Path("/sys/fs/cgroup/memory.max")  # a container's limit


@contextmanager
def saved_storages(module: nn.Module) -> Iterator[dict[int, torch.UntypedStorage]]:
    """Collect what the forward passes of `module` save for the backward pass, without its own tensors, by address."""
    constant = {tensor.untyped_storage().data_ptr() for tensor in (*module.parameters(), *module.buffers())}
    kept: dict[int, torch.UntypedStorage] = {}  # storages stay alive, since a freed address could be used again

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in constant:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        yield kept


def measure_activations(method: Method, views: Views, training: Training, images: int) -> float:
    """Return the bytes per image that a backward pass needs, from a pass over random images on the processor."""
    dtype = autocast_type(training.precision, device())
    method.train()
    with saved_storages(method) as kept:
        with torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
            losses = method(random_batch(views, images), Progress(0, 100))
        losses.total.backward()
    method.zero_grad(set_to_none=True)
    return sum(storage.nbytes() for storage in kept.values()) / images


def estimate(
    method: Method, views: Views, training: Training, *, activations: float, num_images: int
) -> dict[str, float]:
    """Estimate the bytes of one process by their use. A rough sum: allocators and kernels need more."""
    batch = forward_batch_size(training)
    trained = 4 * count(method, trained=True)
    pixels = sum(view.count * 3 * view.size**2 for view in views.values())
    return {
        "weights and memory": sum(tensor.nbytes for tensor in (*method.parameters(), *method.buffers())),
        "gradients and optimizer": trained * (1 + OPTIMIZER_STATES[training.optimizer]),
        "activations": activations * batch,
        "views": 4.0 * pixels * batch * 3,  # one in use, two prefetched
        "shuffle buffer": BUFFERED * min(num_images / training.processes, SHUFFLE_BUFFER) + INDEXED * num_images,
        "libraries": LIBRARIES,
    }


def capacity(training: Training) -> float:
    """Return the bytes that this machine has for one process: of its GPU, or an equal share of the memory."""
    if torch.cuda.is_available():
        return float(torch.cuda.get_device_properties(0).total_memory)
    total = psutil.virtual_memory().total
    limit = CGROUP.read_text(encoding="utf-8").strip() if CGROUP.is_file() else "max"
    if limit.isdigit():
        total = min(total, int(limit))
    return total / training.gpus


def shortage(uses: Mapping[str, float], training: Training, available: float) -> str | None:
    """Return why a batch cannot fit into `available` bytes and which settings make it fit; None if it fits."""
    needed = sum(uses.values())
    if needed <= available:
        return None
    images = forward_batch_size(training)
    message = (
        f"training.batch_size {training.batch_size} needs about {needed / 1e9:.0f} GB per process for {images} images "
        f"at once, this machine has {available / 1e9:.0f} GB"
    )
    per_image = sum(uses.get(use, 0.0) for use in PER_IMAGE) / images
    fitting = (available - needed) / per_image + images
    sizes = [size for size in range(2, images) if images % size == 0 and size <= fitting]
    if not sizes:
        return f"{message}: use a smaller network, smaller images or a shorter queue or bank"
    factor = images // sizes[-1]
    return (
        f"{message}: set training.accumulation to {training.accumulation * factor} (BatchNorm then sees "
        f"{sizes[-1]} images at once) or training.gpus to {training.gpus * factor} on as many GPUs"
    )


def count(module: nn.Module, *, trained: bool = False) -> int:
    """Count the parameters, all or the trained ones."""
    return sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad or not trained)


def device() -> torch.device:
    """Return the device of pre-training."""
    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


def random_batch(views: Views, images: int) -> Batch:
    """Return a batch of random images."""
    batch: dict[str, list[Tensor]] = {}
    for group, view in views.items():
        shape = (images, 3, view.size, view.size)
        batch[group] = [torch.randn(shape).contiguous(memory_format=torch.channels_last) for _ in range(view.count)]
    return Batch(batch, torch.zeros(images, dtype=torch.long), torch.arange(images))
