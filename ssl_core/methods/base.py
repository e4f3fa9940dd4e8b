"""The contract of a method: its settings, its views, its loss, and the update of its memory after each step.

The training loop calls, for every optimizer step:

1. `forward(batch, progress)` once per accumulation part. It is pure: it changes no parameter, no buffer (except
   BatchNorm statistics) and no attribute. Tensors that a queue, a bank or a centre needs are returned in
   `Losses.memory`.
2. `before_step(progress)`, after the backward passes and before the optimizer's step.
3. `after_step(progress, memories)`, after the optimizer's step, with the `memory` of every part in order.
"""

import importlib
import inspect
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn

from ssl_core.blocks import distributed
from ssl_core.config import Experiment, Strict, Training, nearest, parse
from ssl_core.data.batch import Batch, BatchSource
from ssl_core.data.views import Views, adjust
from ssl_core.networks.backbones import Network, build_backbone, check_image_size
from ssl_core.networks.batchnorm import split_batchnorm
from ssl_core.networks.families import can_drop_paths, is_transformer

Memory = dict[str, Tensor]  # tensors of one forward pass, without gradient; the keys are the method's own


class MethodConfig(Strict):
    """Hyper-parameters of a method: `name` selects the method, `preset` the values to start from."""

    def ineffective(self) -> Mapping[str, str]:
        """Return the keys without effect beside the other settings, with the reason; users must not set them."""
        return {}


class Preset(NamedTuple):
    """A setting with its source, as differences from the defaults of the method's `Config` and of `Training`."""

    method: Mapping[str, Any]
    training: Mapping[str, Any]
    source: str  # who published it, or that it was chosen here, with an anchor of docs/sources.md
    networks: Literal["convolutional", "transformer"] | None = None  # the kind it was made for; None: any
    drop_path: float = 0.0  # default of `backbone.drop_path`, for networks that have it


class Progress(NamedTuple):
    """Position in a run: optimizer steps done, optimizer steps in total, and the accumulation part of this step."""

    step: int
    total_steps: int
    part: int = 0

    @property
    def fraction(self) -> float:
        """Share of the run that is done, in [0, 1]."""
        return self.step / self.total_steps


class Losses(NamedTuple):
    """Result of `forward`."""

    total: Tensor  # scalar to minimise
    parts: dict[str, Tensor]  # scalars for the history, without gradient
    embedding: Tensor  # (rows, dim) for the monitor, without gradient
    memory: Memory | None = None  # passed on to `after_step`
    measures: dict[str, Tensor] | None = None  # other scalars for the history, by the name of their column


class Method(nn.Module):
    """A pre-training method around `backbone`; all its state is parameters and buffers created in `__init__`."""

    Config: ClassVar[type[MethodConfig]]
    constant_rate: tuple[str, ...] = ()  # submodules with a constant learning rate (SimSiam's predictor)
    undecayed: tuple[str, ...] = ()  # parameters without weight decay, for any `training.decay_exclusion`
    fixed_views: tuple[str, ...] = ()  # groups of views whose `count` the loss depends on
    order_matters: ClassVar[bool] = False  # whether the loss depends on the order of the images in a batch

    def __init__(self, config: Any, backbone: Network, *, num_images: int, batch_size: int, seed: int) -> None:
        """Build heads and memory; `num_images` and the global `batch_size` limit queues and banks."""
        super().__init__()
        self.backbone: Network = backbone  # the student's, which evaluations use
        self.seed = seed

    def split_batchnorm(self, splits: int) -> None:
        """Give each of `splits` parts of the global batch BatchNorm statistics of its own."""
        if splits > 1:
            split_batchnorm(self, max(1, splits // distributed.world_size()))

    @staticmethod
    def views(config: Any, image_size: int) -> Views:
        """Return the views made of each image, by group."""
        raise NotImplementedError

    def prepare(self, loader: BatchSource, device: torch.device) -> None:
        """Read the data once before the first step of a new run; the caller resets the loader afterwards."""

    def forward(self, batch: Batch, progress: Progress) -> Losses:
        """Return the losses of one batch, computed with the memory of earlier steps; change nothing."""
        raise NotImplementedError

    def before_step(self, progress: Progress) -> None:
        """Edit gradients before the optimizer's step; a parameter whose gradient is None is not updated."""

    def after_step(self, progress: Progress, memories: Sequence[Memory]) -> None:
        """Update teacher, queue or bank after the optimizer's step; `memories` has one entry per accumulation part."""


def full_precision(tensor: Tensor) -> torch.autocast:
    """Return a context that disables autocast: losses are computed in float32, networks may run in bfloat16."""
    return torch.autocast(tensor.device.type, enabled=False)


def method_names() -> list[str]:
    """Return the names of all methods: every file of `ssl_core/methods/` except this one."""
    folder = Path(__file__).parent
    return sorted(path.stem for path in folder.glob("[a-z]*.py") if path.name != Path(__file__).name)


def load_method_module(name: str) -> ModuleType:
    """Import `ssl_core.methods.<name>`; raise `ValueError` with the nearest name for an unknown one."""
    names = method_names()
    if name not in names:
        raise ValueError(f"method.name: there is no method '{name}'{nearest(name, names)}")
    return importlib.import_module(f"ssl_core.methods.{name}")


def method_class(name: str) -> type[Method]:
    """Return the only `Method` subclass defined in `ssl_core/methods/<name>.py`."""
    module = load_method_module(name)
    classes = [member for _, member in inspect.getmembers(module, inspect.isclass)]
    (method,) = [kind for kind in classes if issubclass(kind, Method) and kind.__module__ == module.__name__]
    return method


def views_of(experiment: Experiment, image_size: int, *, avoid: Sequence[str] = ()) -> Views:
    """Return the method's views with the experiment's changes, without the augmentations that the card avoids.

    Raises `ValueError` for an unknown group or key, and for a `count` that the method's loss does not accept.
    """
    name = experiment.method.name
    method = method_class(name)
    defaults = method.views(experiment.method, image_size)
    views = adjust(defaults, experiment.views, avoid=avoid)
    for group in method.fixed_views:
        expected, count = defaults[group].count, views[group].count
        if count != expected:
            raise ValueError(
                f"views.{group}.count: {name} takes {expected} of these views, found {count}: leave it out"
            )
    return views


def resolve(spec: Mapping[str, Any]) -> Experiment:
    """Complete an experiment: defaults of the classes, then the method's preset, then the user's settings.

    A default warm-up that is as long as the training becomes a tenth of it.

    Raises `ValueError` with the path of the key for an unknown or missing key and for a value out of range.
    """
    section = dict(spec.get("method") or {})
    if "name" not in section:
        raise ValueError("method.name: say which method, for example {name: ressl}")
    module = load_method_module(section["name"])
    preset_name = section.get("preset", next(iter(module.PRESETS)))
    if preset_name not in module.PRESETS:
        suggestion = nearest(str(preset_name), module.PRESETS)
        raise ValueError(f"method.preset: there is no preset '{preset_name}'{suggestion}")
    preset = module.PRESETS[preset_name]
    method = parse(module.Config, {**preset.method, **section}, "method")
    for key, reason in method.ineffective().items():
        if key in section:
            raise ValueError(f"method.{key} has no effect here: {reason}")
    chosen = spec.get("training") or {}
    training = parse(Training, {**preset.training, **chosen}, "training")
    if "warmup_epochs" not in chosen and training.warmup_epochs >= training.epochs:  # a trial of a few epochs
        training = training.model_copy(update={"warmup_epochs": training.epochs / 10})
    completed = {**spec, "method": method, "training": training}
    backbone = spec.get("backbone")
    if preset.drop_path and isinstance(backbone, Mapping) and can_drop_paths(str(backbone.get("name"))):
        completed["backbone"] = {"drop_path": preset.drop_path, **backbone}
    return parse(Experiment, completed, "experiment")


def preset_of(method: MethodConfig) -> tuple[str, Preset]:
    """Return the name and the values of the preset that the settings of a method start from."""
    settings: Any = method
    presets: dict[str, Preset] = load_method_module(settings.name).PRESETS
    name: str = getattr(settings, "preset", next(iter(presets)))
    return name, presets[name]


def build(experiment: Experiment, image_size: int, views: Views, *, num_images: int) -> Method:
    """Build backbone and method from the run's seed; print a warning for a preset made for other networks.

    Raises `ValueError` for views that the backbone cannot take.
    """
    training = experiment.training
    # The backbone comes first after the seed, so that the evaluations' untrained baseline is this very network.
    torch.manual_seed(training.seed)
    backbone = build_backbone(experiment.backbone, image_size)
    for view in views.values():
        check_image_size(backbone, experiment.backbone, view.size)
    warning = preset_warning(experiment, backbone)
    if warning is not None and distributed.rank() == 0:
        print(warning, file=sys.stderr)
    return method_class(experiment.method.name)(
        experiment.method, backbone, num_images=num_images, batch_size=training.batch_size, seed=training.seed
    )


def preset_warning(experiment: Experiment, backbone: Network) -> str | None:
    """Return a warning if the preset was made for another kind of network, else None."""
    name, preset = preset_of(experiment.method)
    kind = "transformer" if is_transformer(backbone) else "convolutional"
    if preset.networks in (None, kind):
        return None
    presets = load_method_module(experiment.method.name).PRESETS
    others = [other for other, values in presets.items() if values.networks == kind]
    advice = f"use preset {' or '.join(others)}, or set" if others else "set"
    return (
        f"warning: preset {name} of {experiment.method.name} was made for {preset.networks} networks, "
        f"{experiment.backbone.name} is {'a transformer' if kind == 'transformer' else 'convolutional'}: {advice} "
        "optimizer, learning rate and head yourself"
    )
