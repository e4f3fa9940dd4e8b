"""Shared by the tests of methods: a tiny backbone, batches of noise, and proofs of exact resume and of distribution."""

import io
import sys
from collections.abc import Callable, Collection, Iterator
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
from ssl_core.methods.base import Losses, Method, MethodConfig, Progress, resolve
from ssl_core.networks.batchnorm import SplitBatchNorm1d, SplitBatchNorm2d, synchronise_batchnorm
from ssl_core.training.loop import Trainer
from ssl_core.training.monitor import Alarm, spread

NUM_IMAGES = 80
BATCH = 16  # of all processes
PIXELS = 8
SIZES = (PIXELS, 16, 32, 64, 96, 128)
EPOCHS = 2
START = Progress(0, 100)
CPU = torch.device("cpu")
DEVICE = "cpu"  # of `trainer`; tests/gpu sets it
ROOT = Path(__file__).parents[2]


class Tiny(nn.Module):
    """A backbone of one convolution that records the shapes of its inputs."""

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
    """Build `method` around `Tiny` from a fixed seed; `Any`, because tests use attributes of particular methods."""
    torch.manual_seed(0)
    return method(config, Tiny(), num_images=num_images, batch_size=batch_size, seed=0)  # pyright: ignore[reportArgumentType]


def resolved(name: str, **settings: Any) -> Any:
    """Resolve an experiment that pre-trains ResNet-18 by a method with these settings."""
    experiment = {"dataset": {"name": "demo"}, "backbone": {"name": "resnet18"}}
    return resolve({**experiment, "method": {"name": name, **settings}})


def smallest_views(method: type[Method], config: MethodConfig) -> Views:
    """Return the views at the smallest image size that the method accepts (multi-crop presets refuse small ones)."""
    for size in SIZES[:-1]:
        try:
            return method.views(config, size)
        except ValueError:
            continue
    return method.views(config, SIZES[-1])


def batch(views: Views, *, images: int = BATCH, seed: int = 0, num_images: int = NUM_IMAGES) -> Batch:
    """Draw a batch of different images with noise in every view."""
    generator = torch.Generator().manual_seed(seed)
    drawn = {
        group: [torch.randn(images, 3, view.size, view.size, generator=generator) for _ in range(view.count)]
        for group, view in views.items()
    }
    indices = torch.randperm(num_images, generator=generator)[:images]
    return Batch(drawn, torch.zeros(images, dtype=torch.long), indices)


def select(whole: Batch, rows: Any) -> Batch:
    """Return the given images of a batch: a slice, or a list of positions."""
    views = {group: [view[rows] for view in many] for group, many in whole.views.items()}
    return Batch(views, whole.labels[rows], whole.indices[rows])


def remember(model: Method, *losses: Losses, progress: Progress = START) -> None:
    """Call `after_step` with the memory of these forward passes, as the training loop does."""
    model.after_step(progress, [each.memory or {} for each in losses])


def step(model: Method, optimizer: torch.optim.Optimizer, one: Batch, progress: Progress) -> None:
    """Take one optimizer step as the training loop does."""
    losses = model(one, progress)
    losses.total.backward()
    model.before_step(progress)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    remember(model, losses, progress=progress)


def collapse_alarms(method: type[Method], config: MethodConfig) -> float:
    """Assert that a backbone with constant features raises the alarm; return the loss."""
    model: Method = make(method, config).train()
    for parameter in model.backbone.parameters():
        nn.init.zeros_(parameter)
    losses = model(batch(smallest_views(method, config)), START)
    alarm, total, width = Alarm(), losses.total.item(), spread(losses.embedding).item()
    alarm.check(1, total, width)
    alarm.check(2, total, width)
    with pytest.raises(ValueError, match="training collapsed"):
        alarm.check(3, total, width)
    return total


class Noise:
    """A loader of noise with exact state: batch number `step` is always the same."""

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


def trainer(method: type[Method], config: MethodConfig, **training: Any) -> Trainer:
    """Return the training loop of the project, ready to train `method` on noise for `EPOCHS` epochs."""
    settings = Training(
        **{"epochs": EPOCHS, "batch_size": BATCH, "warmup_epochs": 0.5, "precision": "fp32", **training}
    )
    loader = Noise(smallest_views(method, config), BATCH // settings.accumulation)
    result = Trainer(make(method, config), loader, settings, device=torch.device(DEVICE))  # pyright: ignore[reportArgumentType]
    result.log_steps = 1
    return result


def resume_is_exact(
    method: type[Method], config: MethodConfig, *, stops: Collection[int] = (3, 5), **training: Any
) -> None:
    """Assert that a run interrupted within and after the first epoch ends bit for bit like an uninterrupted one.

    `training` overrides `Training`'s defaults.
    """
    whole = trainer(method, config, **training)
    states: dict[int, bytes] = {}

    def keep_state(row: dict[str, float]) -> None:
        if row["step"] in stops:
            states[int(row["step"])] = state_bytes(whole.state())

    start = whole.loader.state()
    whole.method.prepare(whole.loader, whole.device)
    whole.loader.restore(start)
    _run(whole, log=keep_state)
    assert sorted(states) == sorted(stops)
    for state in states.values():
        second = trainer(method, config, **training)
        second.restore(torch.load(io.BytesIO(state), weights_only=True))
        _run(second, log=lambda row: None)
        for one, other in ((second.method, whole.method), (second.optimizer, whole.optimizer)):
            assert state_bytes(one.state_dict()) == state_bytes(other.state_dict()), _differences(second, whole)
        assert second.history == whole.history


def _run(trainer: Trainer, log: Callable[[dict[str, float]], None]) -> None:
    """Train without the alarm for collapse, since small heads on noise may have almost equal embeddings."""
    with patch("ssl_core.training.monitor.COLLAPSED", -1.0):
        trainer.run(save=lambda: None, log=log)


@contextmanager
def failing_at(step: int) -> Iterator[None]:
    """Let the training loop end with an error before this step, and expect it."""
    one_step = Trainer._one_step

    def fail(trainer: Trainer) -> None:
        if trainer.step == step:
            raise RuntimeError("the test ends the training")
        one_step(trainer)

    with patch.object(Trainer, "_one_step", fail), pytest.raises(RuntimeError, match="the test ends the training"):
        yield


def state_bytes(state: Any) -> bytes:
    file = io.BytesIO()
    torch.save(state, file)
    return file.getvalue()


def _differences(second: Trainer, whole: Trainer) -> list[str]:
    expected = whole.method.state_dict()
    return [name for name, value in second.method.state_dict().items() if not torch.equal(value, expected[name])]


@contextmanager
def float64() -> Iterator[None]:
    """Compute in float64, also where the code casts to float32, so that rounding is the same on every processor."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with patch.object(Tensor, "float", Tensor.double):
            yield
    finally:
        torch.set_default_dtype(default)


def start_in_processes(function: Callable[..., None], *arguments: Any, processes: int = 2) -> None:
    """Run a function of a test in new processes, with their rank as its first argument."""
    with patch.object(sys, "path", [*sys.path, str(ROOT)]):  # so that the processes find the file of the test
        start_processes(function, arguments, nprocs=processes, start_method="forkserver")


def two_processes_equal_one(method: type[Method], *configs: MethodConfig, folder: Path, steps: int = 3) -> None:
    """Assert that two gloo processes have the losses, gradients and state of one on the concatenated batch.

    BatchNorm is synchronised, all is computed in float64. `folder` is the test's `tmp_path`.
    """
    path = folder / "two.pt"
    start_in_processes(_as_rank, method, configs, steps, str(path))
    for config, two in zip(configs, torch.load(path), strict=True):
        one = _train(method, config, steps)
        assert two.keys() == one.keys()
        for name, value in one.items():
            torch.testing.assert_close(two[name], value, atol=1e-9, rtol=1e-7, msg=lambda m, name=name: f"{name}: {m}")


def _as_rank(rank: int, method: type[Method], configs: Collection[MethodConfig], steps: int, path: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{path}.rendezvous", rank=rank, world_size=2)
    results = [_train(method, config, steps) for config in configs]
    if rank == 0:
        torch.save(results, path)
    dist.destroy_process_group()


def _train(kind: type[Method], config: MethodConfig, steps: int) -> dict[str, Tensor]:
    """Train on this process's part of the noise; return losses of the whole batch, last gradients, and the state."""
    with float64():
        return _train_in_default_type(kind, config, steps)


def _train_in_default_type(kind: type[Method], config: MethodConfig, steps: int) -> dict[str, Tensor]:
    method: Method = make(kind, config)
    module: nn.Module = method
    if distributed.is_distributed():
        synchronise_batchnorm(method, cuda=False)
        module = nn.parallel.DistributedDataParallel(method, forward_sync_buffers=False)
    torch.manual_seed(distributed.rank())  # values that must be equal on all ranks may not be drawn from this
    optimizer = torch.optim.SGD(method.parameters(), lr=0.1)
    share = BATCH // distributed.world_size()
    rows = slice(share * distributed.rank(), share * (distributed.rank() + 1))
    losses = []
    for step in range(steps):
        progress = Progress(step, 10)
        whole = batch(smallest_views(kind, config), seed=step)
        optimizer.zero_grad()
        result = module(select(whole, rows), progress)
        result.total.backward()
        method.before_step(progress)
        optimizer.step()
        remember(method, result, progress=progress)
        losses.append(distributed.gather(result.total.detach()[None]).mean())
    gradients = {f"gradient of {name}": p.grad for name, p in method.named_parameters() if p.grad is not None}
    state = {name: value.detach().clone() for name, value in method.state_dict().items()}
    for path, layer in method.named_modules():
        if isinstance(layer, SplitBatchNorm1d | SplitBatchNorm2d):  # each process has those of its own parts
            for statistic in ("running_mean", "running_var"):
                state.pop(f"{path}.{statistic}", None)  # a frozen teacher's are not in the state
    return {"losses": torch.stack(losses), **gradients, **state}
