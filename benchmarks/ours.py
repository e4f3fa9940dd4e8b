"""Our side of a training step: the trainer on the loader, and on one fixed batch, which is the floor."""

import statistics
import time
from pathlib import Path
from typing import Any

import torch

from ssl_core.blocks.schedules import forward_batch_size
from ssl_core.config import Backbone
from ssl_core.data.loader import Batch, Loader
from ssl_core.data.shards import Manifest
from ssl_core.methods.base import method_class, resolve, views_of
from ssl_core.networks.backbones import build_backbone, save_backbone
from ssl_core.stages.pretrain import set_determinism
from ssl_core.training.loop import Trainer


class Training:
    """Runs a number of training steps when called; `waited` counts the seconds of waiting for data."""

    def __init__(
        self,
        method: dict[str, Any],
        backbone: dict[str, Any],
        folder: Path,
        training: dict[str, Any],
        device: str = "cpu",
    ) -> None:
        set_determinism(compiled=False)
        manifest = Manifest.load(folder / "shards" / "manifest.json")
        if method["name"] == "dino":
            method = {**method, "local_size": manifest.image_size // 2}
        if method["name"] in ("seed", "simreg", "compress", "disco", "bingo", "feature_distillation"):
            weights, teacher = folder / "teacher.safetensors", Backbone.model_validate(backbone)
            save_backbone(weights, build_backbone(teacher, manifest.image_size), teacher, manifest.image_size, {})
            method = {**method, "teacher": {"weights": str(weights)}}
        training = {"epochs": 1000, "optimizer": "sgd", "learning_rate": 0.06, **training}
        spec = {"dataset": {"name": "benchmark"}, "backbone": backbone, "method": method, "training": training}
        resolved = resolve(spec)
        views = views_of(resolved, manifest.image_size)
        loader = Loader(
            manifest, resolved.dataset, views, batch_size=forward_batch_size(resolved.training), seed=0,
            device=device, threads=torch.get_num_threads(),
        )  # fmt: skip
        module = method_class(resolved.method.name)(
            resolved.method, build_backbone(resolved.backbone, manifest.image_size), num_images=loader.num_images,
            batch_size=resolved.training.batch_size, seed=0,
        )  # fmt: skip
        self.trainer = Trainer(module, loader, resolved.training, device=torch.device(device))
        self.trainer.method.train()

    def __call__(self, steps: int) -> None:
        for _ in range(steps):
            self.trainer._one_step()
            self.trainer.step += 1

    def of_floor(self, pairs: int) -> float:
        """Return a fixed batch's time over a new one's: the median over pairs of consecutive steps.

        The loader makes the next batch while the step runs that took one, so that its work counts where it belongs.
        """
        real = self.trainer.loader
        loaders: Any = (Fixed(real.next()), real)
        ratios = []
        for _ in range(pairs):
            seconds = []
            for self.trainer.loader in loaders:
                start = time.perf_counter()
                self(1)
                seconds.append(time.perf_counter() - start)
            ratios.append(seconds[0] / seconds[1])
        return statistics.median(ratios)

    @property
    def waited(self) -> float:
        return self.trainer.waited


class Fixed:
    """A loader that repeats one batch."""

    def __init__(self, batch: Batch) -> None:
        self.batch = batch

    def next(self) -> Batch:
        return self.batch
