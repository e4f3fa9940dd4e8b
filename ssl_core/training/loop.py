"""The training loop, the same for every method: steps, schedules, checkpoints and one progress line."""

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ssl_core.blocks import distributed
from ssl_core.blocks.schedules import learning_rate, weight_decay
from ssl_core.config import Training
from ssl_core.data.loader import Batch, Loader
from ssl_core.experiments.processes import Stop
from ssl_core.methods.base import Losses, Memory, Method, Progress
from ssl_core.networks.backbones import find_infinite
from ssl_core.progress import progress_bar
from ssl_core.training.monitor import Alarm, OtherWork, rankme, spread
from ssl_core.training.optimizers import build_optimizer, set_learning_rate, set_weight_decay
from ssl_core.training.precision import autocast_type

LOG_STEPS = 50  # at most this many steps between two rows of the history; only then the loop waits for the device
RANK_ROWS = 512  # rows of the embedding used for RankMe


class Trainer:
    """Trains `method` on `loader`; a run continued with `state()` and `restore()` equals an uninterrupted one."""

    def __init__(self, method: Method, loader: Loader, training: Training, *, device: torch.device) -> None:
        self.task = "pretrain"  # of the progress line
        self.method: Method = method.to(device=device, memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        self.loader, self.training, self.device = loader, training, device
        self.optimizer = build_optimizer(
            self.method, training, constant=method.constant_rate, undecayed=method.undecayed
        )
        self.dtype = autocast_type(training.precision, device)
        self.steps_per_epoch = loader.steps_per_epoch // training.accumulation
        if self.steps_per_epoch == 0:
            raise ValueError(
                f"training.batch_size {training.batch_size} is larger than the data set ({loader.num_images} images)"
            )
        late = [milestone for milestone in training.milestones if milestone >= training.epochs]
        if training.schedule == "step" and late:
            raise ValueError(
                f"training.milestones {', '.join(map(str, late))} are not below training.epochs {training.epochs}: "
                "lower them, or set training.schedule to cosine"
            )
        self.total_steps = training.epochs * self.steps_per_epoch
        self.log_steps = min(LOG_STEPS, self.steps_per_epoch)
        self.step = 0
        self.history: list[dict[str, float]] = []
        self.seconds = self.waited = 0.0  # over all processes that continued this run
        self._alarm = Alarm(stop_on_collapse=training.stop_on_collapse)
        self._sums: dict[str, Tensor] = {}  # (sum, count) of each measured value since the last row of the history
        self._module: nn.Module = self.method
        if training.compile:
            self._module.compile()
        if distributed.is_distributed():
            # Methods keep their buffers (queues, BatchNorm statistics) equal; synchronising them would hide errors.
            self._module = DistributedDataParallel(self._module, forward_sync_buffers=False)

    def state(self) -> dict[str, Any]:
        """Return everything that later steps depend on."""
        rank_state = {"loader": self.loader.state(), "rng": torch.get_rng_state()}
        rank_state["sums"] = {name: value.cpu() for name, value in self._sums.items()}
        if self.device.type == "cuda":
            rank_state["rng_cuda"] = torch.cuda.get_rng_state()
        ranks: list[Any] = [rank_state]
        if distributed.is_distributed():
            ranks = [None] * distributed.world_size()
            dist.all_gather_object(ranks, rank_state)
        return {
            "method": self.method.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "history": self.history,
            "collapsed_looks": self._alarm.collapsed_looks,
            "seconds": self.seconds,
            "waited": self.waited,
            "ranks": ranks,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from `state()`; the number of processes must be the same."""
        if len(state["ranks"]) != distributed.world_size():
            raise ValueError(
                f"the checkpoint was written by {len(state['ranks'])} processes, training.gpus x "
                f"training.nodes is {distributed.world_size()}: make it {len(state['ranks'])} or remove the checkpoint"
            )
        rank_state = state["ranks"][distributed.rank()]
        self.method.load_state_dict(state["method"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.loader.restore(rank_state["loader"])
        torch.set_rng_state(rank_state["rng"])
        if "rng_cuda" in rank_state:
            torch.cuda.set_rng_state(rank_state["rng_cuda"])
        self.step, self.history = state["step"], state["history"]
        self.seconds, self.waited = state["seconds"], state["waited"]
        self._alarm.collapsed_looks = state["collapsed_looks"]
        self._sums = {name: value.to(self.device) for name, value in rank_state["sums"].items()}

    def run(self, *, save: Callable[[], None], log: Callable[[dict[str, float]], None]) -> None:
        """Train to the end; call `log` with each row of the history, and `save` every few minutes and before `Stop`."""
        self.method.train()
        saved = time.monotonic()
        others = distributed.rank() > 0
        other_work = OtherWork(self.waited)
        with (
            _stop_signals() as stop,
            progress_bar(self.total_steps, self.task, unit="steps", initial=self.step, disable=others) as bar,
        ):
            while self.step < self.total_steps:
                start = time.monotonic()
                self._one_step()
                self.step += 1
                row = self._append_row() if self._row_is_due() else None
                self.seconds += time.monotonic() - start
                bar.update(1)
                if row is not None:
                    if self.device.type == "cpu":
                        other_work.look(self.waited)
                    log(row)
                    bar.set_postfix_str(self._postfix(row), refresh=False)
                if row is not None or not distributed.is_distributed():  # `agree` synchronises: not at every step
                    due = time.monotonic() - saved > self.training.checkpoint_minutes * 60
                    if distributed.agree(due, self.device) and self.step < self.total_steps:
                        save()
                        saved = time.monotonic()
                # All processes save after the same step, whichever of them received the signal first.
                if distributed.any_rank(bool(stop)) and self.step < self.total_steps:
                    save()
                    raise Stop(128 + (stop[0] if stop else signal.SIGTERM))
        self._check_weights()

    def _check_weights(self) -> None:
        """Raise `ValueError` for a tensor that is not finite: no loss has seen the last update."""
        name = find_infinite(self.method.state_dict())
        if name is not None:
            raise ValueError(
                f"training diverged: '{name}' is not finite after the last step, {self.step}; lower "
                "training.learning_rate, increase training.warmup_epochs or set training.gradient_clip"
            )

    def _row_is_due(self) -> bool:
        watched = self.training.monitor_epochs * self.steps_per_epoch  # online kNN needs a row
        kept = [epoch * self.steps_per_epoch for epoch in self.training.keep_epochs]
        due = self.step % self.log_steps == 0 or self.step % watched == 0 or self.step in kept
        return due or self.step == self.total_steps

    def _one_step(self) -> None:
        """Accumulate gradients over the parts, take an optimizer step, and update the method's memory."""
        rate = learning_rate(self.step, training=self.training, steps_per_epoch=self.steps_per_epoch)
        set_learning_rate(self.optimizer, rate)
        if self.training.final_weight_decay is not None:
            set_weight_decay(self.optimizer, weight_decay(self.step / self.total_steps, training=self.training))
        memories: list[Memory] = []
        for part in range(self.training.accumulation):
            progress = Progress(self.step, self.total_steps, part)
            started = time.monotonic()
            batch = self._to_device(self.loader.next())
            self.waited += time.monotonic() - started
            last = part == self.training.accumulation - 1
            with nullcontext() if last else self._unsynchronised():
                with torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype is not None):
                    losses: Losses = self._module(batch, progress)
                (losses.total / self.training.accumulation).backward()
            self._add_to_sums(losses)
            memories.append(losses.memory or {})
        progress = Progress(self.step, self.total_steps)
        if self.training.gradient_clip is not None:
            nn.utils.clip_grad_norm_(self.method.parameters(), self.training.gradient_clip)
        self.method.before_step(progress)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.method.after_step(progress, memories)

    def _unsynchronised(self) -> AbstractContextManager[None]:
        """Return a context without gradient exchange; only the last part of a step exchanges gradients."""
        return self._module.no_sync() if isinstance(self._module, DistributedDataParallel) else nullcontext()

    def _to_device(self, batch: Batch) -> Batch:
        if self.device.type == "cpu":
            return batch
        views = {
            name: [view.to(self.device, non_blocking=True) for view in group] for name, group in batch.views.items()
        }
        return Batch(views, batch.labels, batch.indices.to(self.device, non_blocking=True))

    def _add_to_sums(self, losses: Losses) -> None:
        """Add the losses to the sums on the device, so that no step waits for a value."""
        self._embedding = losses.embedding
        values = {f"loss/{name}": value for name, value in {"total": losses.total, **losses.parts}.items()}
        for name, value in {**values, **(losses.measures or {})}.items():
            addend = torch.stack([value.detach(), torch.ones_like(value)])
            self._sums[name] = self._sums[name] + addend if name in self._sums else addend

    def _append_row(self) -> dict[str, float]:
        """Append the next row, means over processes, to the history; raise if the run has diverged or collapsed."""
        row = {"step": self.step, "epoch": round(self.step / self.steps_per_epoch, 4)}
        means = {name: total / count for name, (total, count) in self._sums.items()}
        values = torch.stack([*means.values(), spread(self._embedding)])
        row |= dict(zip([*means, "embedding/spread"], distributed.average(values).tolist(), strict=True))
        row["schedule/learning_rate"] = self.optimizer.param_groups[0]["lr"]
        self._sums = {}
        self._alarm.check(self.step, row["loss/total"], row["embedding/spread"])
        row["embedding/rankme"] = distributed.average(rankme(self._embedding[:RANK_ROWS])).item()
        self.history.append(row)
        return row

    def _postfix(self, row: dict[str, float]) -> str:
        images = self.training.batch_size * self.step / max(self.seconds, 1e-9)
        share = 100 * self.waited / max(self.seconds, 1e-9)
        return f"epoch {row['epoch']:.1f} loss {row['loss/total']:.3f} {images:.0f} img/s data-wait {share:.1f}%"


@contextmanager
def _stop_signals() -> Iterator[list[int]]:
    """Collect SIGINT and SIGTERM in a list, so that a step in progress is completed."""
    received: list[int] = []
    previous = {
        number: signal.signal(number, lambda number, _: received.append(number))
        for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
