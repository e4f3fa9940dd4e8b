"""What the tests of all methods share: a tiny backbone, batches, and the proofs of T6 (resume) and T7 (processes)."""

import io
import multiprocessing
import sys
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.multiprocessing.spawn import start_processes

from ssl_core.blocks import distributed
from ssl_core.config import Training
from ssl_core.data.loader import Batch
from ssl_core.data.views import Views
from ssl_core.methods.base import Method, MethodConfig, Progress
from ssl_core.networks.batchnorm import synchronise_batchnorm
from ssl_core.training.loop import Trainer
from ssl_core.training.monitor import Alarm, spread

NUM_IMAGES = 80
BATCH = 16  # of all processes
PIXELS = 8
EPOCHS = 2
START = Progress(0, 100)
CPU = torch.device("cpu")
ROOT = Path(__file__).parents[2]
# Processes are forked from one that has imported this much, instead of each spending seconds on it.
multiprocessing.get_context("forkserver").set_forkserver_preload(["torch._dynamo", "ssl_core.training.loop"])


class Tiny(nn.Module):
    """A backbone of one convolution that notes the shapes it has seen."""

    num_features = 6

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(3, 6, 3)
        self.norm = nn.BatchNorm2d(6)
        self.seen: list[tuple[int, ...]] = []

    def forward(self, images: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(images))

    def forward_features(self, images: Tensor) -> Tensor:
        self.seen.append(tuple(images.shape))
        return self.norm(self.layer(images)).relu()

    def forward_head(self, maps: Tensor, pre_logits: bool = True) -> Tensor:
        return maps.mean(dim=(2, 3))


def make(method: type[Method], config: MethodConfig, *, num_images: int = NUM_IMAGES, batch_size: int = BATCH) -> Any:
    """Build `method` around `Tiny`, the same every time; `Any`, since tests look into what only their method has."""
    torch.manual_seed(0)
    return method(config, Tiny(), num_images=num_images, batch_size=batch_size, seed=0)  # pyright: ignore[reportArgumentType]


def batch(views: Views, *, images: int = BATCH, seed: int = 0, num_images: int = NUM_IMAGES) -> Batch:
    """Draw a batch of different images, noise in every view."""
    generator = torch.Generator().manual_seed(seed)
    drawn = {
        group: [torch.randn(images, 3, view.size, view.size, generator=generator) for _ in range(view.count)]
        for group, view in views.items()
    }
    indices = torch.randperm(num_images, generator=generator)[:images]
    return Batch(drawn, torch.zeros(images, dtype=torch.long), indices)


def collapse_alarms(method: type[Method], config: MethodConfig, *, pixels: int = PIXELS) -> float:
    """Assert that a backbone that gives every image the same features raises the alarm; return its loss (T19)."""
    model: Method = make(method, config).train()
    for parameter in model.backbone.parameters():
        nn.init.zeros_(parameter)
    losses = model(batch(method.views(config, pixels)), START)
    alarm, total, width = Alarm(), losses.total.item(), spread(losses.embedding).item()
    alarm.check(1, total, width)
    alarm.check(2, total, width)
    with pytest.raises(ValueError, match="training collapsed"):
        alarm.check(3, total, width)
    return total


class Noise:
    """A loader of noise, as exact as the real one: batch `step` is always the same."""

    normalisation = ((0.5, 0.4, 0.3), (0.2, 0.25, 0.3))

    def __init__(self, views: Views, batch_size: int, num_images: int = NUM_IMAGES) -> None:
        self.views, self.batch_size, self.num_images = views, batch_size, num_images
        self.steps_per_epoch = num_images // batch_size
        self.step = 0

    def next(self) -> Batch:
        self.step += 1
        return batch(self.views, images=self.batch_size, seed=self.step, num_images=self.num_images)

    def epoch(self) -> Iterator[Batch]:
        self.step += -self.step % self.steps_per_epoch
        for _ in range(self.steps_per_epoch):
            yield self.next()

    def state(self) -> dict[str, Any]:
        return {"step": self.step}

    def restore(self, state: dict[str, Any]) -> None:
        self.step = state["step"]


def trainer(method: type[Method], config: MethodConfig, *, pixels: int = PIXELS, **training: Any) -> Trainer:
    """Return the project's own training loop, ready to train `method` on noise for `EPOCHS` epochs."""
    settings = Training(
        **{"epochs": EPOCHS, "batch_size": BATCH, "warmup_epochs": 0.5, "precision": "fp32", **training}
    )
    loader = Noise(method.views(config, pixels), BATCH // settings.accumulation)
    result = Trainer(make(method, config), loader, settings, device=CPU)  # pyright: ignore[reportArgumentType]
    result.log_steps = 1
    return result


def resume_is_exact(
    method: type[Method],
    config: MethodConfig,
    *,
    stops: Collection[int] = (3, 5),
    pixels: int = PIXELS,
    **training: Any,
) -> None:
    """Assert that a run broken off within and after the first epoch ends bit for bit as one undisturbed (T6).

    `training` overrides `Training`'s defaults.
    """
    whole = trainer(method, config, pixels=pixels, **training)
    states: dict[int, bytes] = {}

    def note(row: dict[str, float]) -> None:
        if row["step"] in stops:
            states[int(row["step"])] = _dump(whole.state())

    start = whole.loader.state()
    whole.method.prepare(whole.loader, whole.device)
    whole.loader.restore(start)
    whole.run(save=lambda: None, log=note)
    assert sorted(states) == sorted(stops)
    for saved in states.values():
        second = trainer(method, config, pixels=pixels, **training)
        second.restore(torch.load(io.BytesIO(saved), weights_only=True))
        second.run(save=lambda: None, log=lambda row: None)
        assert _dump(second.method.state_dict()) == _dump(whole.method.state_dict()), _first_difference(second, whole)
        assert _dump(second.optimizer.state_dict()) == _dump(whole.optimizer.state_dict())
        assert second.history == whole.history


def _dump(state: Any) -> bytes:
    file = io.BytesIO()
    torch.save(state, file)
    return file.getvalue()


def _first_difference(second: Trainer, whole: Trainer) -> list[str]:
    expected = whole.method.state_dict()
    return [name for name, value in second.method.state_dict().items() if not torch.equal(value, expected[name])]


def two_processes_equal_one(
    method: type[Method],
    config: MethodConfig,
    folder: Path,
    *,
    steps: int = 3,
    pixels: int = PIXELS,
    ignore: Collection[str] = (),
    atol: float = 1e-10,
    rtol: float = 1e-8,
) -> None:
    """Assert that two gloo processes see the losses, gradients and state of one on the concatenated batch (T7).

    BatchNorm is synchronised. State whose name holds a word of `ignore` may differ ("running" under split BatchNorm).
    `folder` is the test's `tmp_path`.
    """
    path = folder / "two.pt"
    with patch.object(sys, "path", [*sys.path, str(ROOT)]):  # so that the processes find this file
        start_processes(_as_rank, (method, config, steps, pixels, str(path)), nprocs=2, start_method="forkserver")
    two, one = torch.load(path), _train(method, config, steps, pixels)
    assert two.keys() == one.keys()
    for name, value in one.items():
        if not any(word in name for word in ignore):
            torch.testing.assert_close(two[name], value, atol=atol, rtol=rtol, msg=lambda m, name=name: f"{name}: {m}")


def _as_rank(rank: int, method: type[Method], config: MethodConfig, steps: int, pixels: int, path: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{path}.rendezvous", rank=rank, world_size=2)
    result = _train(method, config, steps, pixels)
    if rank == 0:
        torch.save(result, path)
    dist.destroy_process_group()


def _train(kind: type[Method], config: MethodConfig, steps: int, pixels: int) -> dict[str, Tensor]:
    """Train on this process's share of noise; return losses of the whole batch, gradients of the last step, state."""
    with float64():
        return _train_steps(kind, config, steps, pixels)


@contextmanager
def float64() -> Iterator[None]:
    """Compute everything in float64, losses included, so that rounding on no processor hides or feigns a difference."""
    torch.set_default_dtype(torch.float64)
    try:
        with patch.object(Tensor, "float", Tensor.double):
            yield
    finally:
        torch.set_default_dtype(torch.float32)


def _train_steps(kind: type[Method], config: MethodConfig, steps: int, pixels: int) -> dict[str, Tensor]:
    method: Method = make(kind, config)
    module: nn.Module = method
    if distributed.is_distributed():
        synchronise_batchnorm(method, cuda=False)
        module = nn.parallel.DistributedDataParallel(method, forward_sync_buffers=False)
    torch.manual_seed(distributed.rank())  # as in training: what must be equal on all ranks may not be drawn from this
    optimizer = torch.optim.SGD(method.parameters(), lr=0.1)
    own = slice(*(BATCH * part // distributed.world_size() for part in (distributed.rank(), distributed.rank() + 1)))
    losses = []
    for step in range(steps):
        whole, progress = batch(method.views(config, pixels), seed=step), Progress(step, 10)
        views = {group: [view[own] for view in many] for group, many in whole.views.items()}
        optimizer.zero_grad()
        loss = module(Batch(views, whole.labels[own], whole.indices[own]), progress).total
        loss.backward()
        method.before_step(progress)
        optimizer.step()
        method.after_step(progress)
        losses.append(distributed.gather(loss.detach()[None]).mean())
    gradients = {f"gradient of {name}": p.grad for name, p in method.named_parameters() if p.grad is not None}
    state = {name: value.detach().clone() for name, value in method.state_dict().items()}
    return {"losses": torch.stack(losses), **gradients, **state}
