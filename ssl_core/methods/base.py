"""What every method is: a configuration, views, a loss, and what happens after a step."""

import importlib
import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from ssl_core.config import Experiment, Strict, Training, nearest, parse
from ssl_core.data.loader import Batch, Loader
from ssl_core.data.views import Views, adjust
from ssl_core.networks.backbones import Network


class MethodConfig(Strict):
    """Hyper-parameters of a method; `name` picks the method, `preset` the paper's setting that the rest starts from."""


class Preset(NamedTuple):
    """A published setting: what it changes in the method's own defaults and in `Training`'s."""

    method: Mapping[str, Any]
    training: Mapping[str, Any]


class Progress(NamedTuple):
    """Where a run stands: optimizer steps taken before this one, of how many."""

    step: int
    total_steps: int

    @property
    def fraction(self) -> float:
        """Share of the run that lies behind, in [0, 1]."""
        return self.step / self.total_steps


class Losses(NamedTuple):
    """What `forward` returns: the scalar to minimise, its named parts, and detached embeddings for the monitor."""

    total: Tensor
    parts: dict[str, Tensor]
    embedding: Tensor  # (rows, dim)


class Method(nn.Module):
    """A pre-training method around `backbone`; all its state is parameters and buffers from construction on."""

    Config: ClassVar[type[MethodConfig]]
    constant_rate: tuple[str, ...] = ()  # submodules whose learning rate never falls (SimSiam's predictor)
    undecayed: tuple[str, ...] = ()  # parameters that weight decay spares, whatever `training.decay_exclusion`
    fixed_views: tuple[str, ...] = ()  # groups of views of which the loss takes neither more nor fewer
    backbone: Network  # the student's, which evaluations use

    def __init__(self, config: Any, backbone: Network, *, num_images: int, batch_size: int, seed: int) -> None:
        """Build heads and state; `num_images` and the global `batch_size` bound queues and banks."""
        super().__init__()

    @staticmethod
    def views(config: Any, image_size: int) -> Views:
        """Say which views of an image are made and who sees them."""
        raise NotImplementedError

    def prepare(self, loader: Loader, device: torch.device) -> None:
        """Look at the data once before the first step of a new run; where this leaves the loader is of no account."""

    def forward(self, batch: Batch, progress: Progress) -> Losses:
        """Return the losses of one batch, using memory as it stood before this batch."""
        raise NotImplementedError

    def before_step(self, progress: Progress) -> None:
        """Look at the gradients before the optimizer uses them; a parameter whose gradient is None stays as it is."""

    def after_step(self, progress: Progress) -> None:
        """Move teacher, queue and schedules; called once after every optimizer step."""


def full_precision(tensor: Tensor) -> torch.autocast:
    """Return a context in which losses are computed in float32 though networks run in bfloat16 (recipes rule 11)."""
    return torch.autocast(tensor.device.type, enabled=False)


def load(name: str) -> ModuleType:
    """Import `ssl_core.methods.<name>`; an unknown name is a `ValueError` with the nearest one."""
    names = {path.stem for path in Path(__file__).parent.glob("[a-z]*.py")} - {"base"}
    if name not in names:
        raise ValueError(f"method.name: there is no method '{name}'{nearest(name, names)}")
    return importlib.import_module(f"ssl_core.methods.{name}")


def method_class(name: str) -> type[Method]:
    """Return the one `Method` that the file `ssl_core/methods/<name>.py` defines."""
    module = load(name)
    (found,) = [
        member
        for _, member in inspect.getmembers(module, inspect.isclass)
        if issubclass(member, Method) and member.__module__ == module.__name__
    ]
    return found


def views_of(experiment: Experiment, image_size: int, *, avoid: Sequence[str] = ()) -> Views:
    """Return the method's views with the experiment's changes, less what the data set's card avoids.

    Raises `ValueError` for an unknown group or key, and for a `count` that the method's loss cannot take.
    """
    kind = method_class(experiment.method.name)
    own = kind.views(experiment.method, image_size)
    views = adjust(own, experiment.views, avoid=avoid)
    for group in kind.fixed_views:
        if views[group].count != own[group].count:
            takes = f"{experiment.method.name} takes {own[group].count} of these views"
            raise ValueError(f"views.{group}.count: {takes}, found {views[group].count}: leave it out")
    return views


def resolve(spec: Mapping[str, Any]) -> Experiment:
    """Fill in everything an experiment leaves unsaid: class defaults, then the method's preset, then the user's words.

    Raises `ValueError` with the path of the key for anything unknown, missing or out of range.
    """
    section = dict(spec.get("method") or {})
    if "name" not in section:
        raise ValueError("method.name: say which method, for example {name: ressl}")
    module = load(section["name"])
    preset_name = section.get("preset", next(iter(module.PRESETS)))
    if preset_name not in module.PRESETS:
        raise ValueError(
            f"method.preset: there is no preset '{preset_name}'{nearest(str(preset_name), module.PRESETS)}"
        )
    preset = module.PRESETS[preset_name]
    method = parse(module.Config, {**preset.method, **section}, "method")
    training = parse(Training, {**preset.training, **(spec.get("training") or {})}, "training")
    return parse(Experiment, {**spec, "method": method, "training": training}, "experiment")
