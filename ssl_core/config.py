"""The typed configuration of an experiment, with its defaults. Imports no torch.

The hyper-parameters of a method are in `ssl_core/methods/<name>.py`, those of an evaluation protocol in
`ssl_core/evaluations/<name>.py`; both derive from `Strict`.
"""

import difflib
from collections.abc import Iterable
from typing import Any, Literal, TypeVar, get_args

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ValidationError,
)


class Strict(BaseModel):
    """A frozen section that refuses unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Subset(Strict):
    """A seeded random subset of the images, drawn without labels (IN-10k, IN-100k)."""

    images: PositiveInt
    seed: int = 0


class Dataset(Strict):
    """A data set by the name of its card in `datasets/`, one of its splits, and optionally a subset of it."""

    name: str
    split: str = "train"
    subset: Subset | None = None


class Backbone(Strict):
    """A network by name, with the stem for its image size."""

    name: str
    stem: Literal["imagenet", "small", "tiny"] = "imagenet"
    hidden_layer: bool = True  # Linear + h-swish after MobileNetV3's pooling (docs/sources.md#backbones)
    # Largest probability of skipping a residual path in pre-training, reached in the last block; teachers skip none.
    drop_path: float = Field(default=0.0, ge=0, lt=1)


class Training(Strict):
    """Optimisation. The preset of a method overrides these defaults; the user's settings override both."""

    epochs: PositiveInt = 200
    batch_size: PositiveInt = 256  # of all processes and accumulation steps together
    accumulation: PositiveInt = 1
    seed: NonNegativeInt = 0
    optimizer: Literal["sgd", "lars", "adamw"] = "sgd"
    learning_rate: PositiveFloat = 0.06
    learning_rate_scaling: Literal["linear", "none"] = "linear"  # linear: multiplied by batch_size / 256
    minimum_learning_rate: NonNegativeFloat = 0.0  # absolute: never scaled by the batch size
    momentum: NonNegativeFloat = 0.9
    nesterov: bool = False
    weight_decay: NonNegativeFloat = 5e-4
    final_weight_decay: NonNegativeFloat | None = None  # at the end of a cosine over all steps; None: constant
    decay_exclusion: Literal["none", "norm_bias", "norm_bias_depthwise", "named"] = "none"
    schedule: Literal["cosine", "step", "constant"] = "cosine"
    schedule_unit: Literal["step", "epoch"] = "step"  # how often the cosine changes (docs/sources.md#schedules)
    milestones: tuple[PositiveInt, ...] = ()  # epochs, for the step schedule
    decay_factor: PositiveFloat = 0.1
    warmup_epochs: NonNegativeFloat = 10.0
    gradient_clip: PositiveFloat | None = None
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    compile: bool = False
    gpus: PositiveInt = 1  # processes per node; without a GPU they share the CPU (gloo)
    nodes: PositiveInt = 1  # machines that train together, each with `gpus` processes (docs/tutorials/slurm.md)
    sync_batchnorm: bool = True  # no effect in a single process
    checkpoint_minutes: PositiveFloat = 2.0
    monitor_epochs: PositiveInt = 5  # epochs between two online kNN measurements
    keep_epochs: tuple[PositiveInt, ...] = ()  # the backbone after these epochs becomes epoch-<number>.safetensors
    stop_on_collapse: bool = True  # false: a collapsed embedding causes a warning and training goes on

    @property
    def processes(self) -> int:
        """Return the number of processes on all nodes."""
        return self.gpus * self.nodes


class Experiment(Strict):
    """One pre-training with all defaults filled in; `method` is an instance of the method's `Config`."""

    dataset: Dataset
    backbone: Backbone
    method: Any
    # For each group of views, the settings that differ from the method's.
    views: dict[str, dict[str, Any]] = Field(default_factory=dict)
    training: Training


class Normalisation(Strict):
    """Mean and standard deviation per channel, for pixels in 0..1."""

    mean: tuple[float, float, float]
    std: tuple[PositiveFloat, PositiveFloat, PositiveFloat]


IMAGENET = Normalisation(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))


class Adopted(Strict):
    """An experiment with a network trained elsewhere: it has `weights` instead of a method and its training."""

    dataset: Dataset
    backbone: Backbone
    weights: str  # safetensors with torchvision's or timm's names, or a backbone.safetensors of this project
    # None takes image size and normalisation from the header of a backbone.safetensors of this project, else the
    # data set's image size and ImageNet's normalisation.
    image_size: PositiveInt | None = None
    normalisation: Literal["imagenet", "dataset"] | Normalisation | None = None


class Export(Strict):
    """Inputs of the exported ONNX file."""

    normalise: bool = False  # true: the file takes pixels in 0..1 and normalises them
    dynamic_size: bool = False  # true: it takes images of any height and width


class Quantise(Strict):
    """How exported networks are quantised to 8-bit integers."""

    images: PositiveInt = 256  # training images that calibrate the ranges of activations
    seed: NonNegativeInt = 0  # draws them
    largest_error: PositiveFloat = 0.5  # of the features, as a share of their variance; above, nothing is written


class Reported(Strict):
    """Published numbers that the table shows beside the measured ones; only the report reads them."""

    source: str  # for example "ReSSL, Table 2"
    epochs: PositiveInt | None = None
    hours: str | None = None
    hardware: str | None = None
    note: str | None = None
    # Evaluation -> its main metric in percent, or evaluation.metric -> any number of its JSON.
    results: dict[str, float]


# Words of other projects that are not similar to the key here.
SYNONYMS = {
    "arch": "backbone",
    "base_lr": "learning_rate",
    "bs": "batch_size",
    "encoder": "backbone",
    "lr": "learning_rate",
    "model": "backbone",
    "network": "backbone",
    "wd": "weight_decay",
}

Model = TypeVar("Model", bound=BaseModel)


def parse(model: type[Model], section: Any, where: str) -> Model:
    """Validate `section` as `model`; `where` is its path in the configuration.

    The first mistake raises a one-line `ValueError` with the path of the key and, for an unknown key, the nearest one.
    """
    try:
        return model.model_validate(section)
    except ValidationError as error:
        first = error.errors()[0]
        *path, key = list(first["loc"]) or [""]
        place = ".".join(str(part) for part in [where, *path, key] if part != "")
        if first["type"] == "extra_forbidden":
            raise ValueError(f"{place}: unknown key{nearest(str(key), _keys_at(model, path))}") from None
        if first["type"] == "missing":
            raise ValueError(f"{place}: this key is missing") from None
        raise ValueError(f"{place}: {_reason(first)}") from None


def nearest(word: str, words: Iterable[str]) -> str:
    """Return "; did you mean 'x'?" with the most similar of `words`, or a list of all if none is similar."""
    words = sorted(words)
    if SYNONYMS.get(word.lower()) in words:
        return f"; did you mean '{SYNONYMS[word.lower()]}'?"
    matches = difflib.get_close_matches(word, words, n=1, cutoff=0.5)
    if matches:
        return f"; did you mean '{matches[0]}'?"
    return f"; possible: {', '.join(words)}" if words else ""


def _reason(error: Any) -> str:
    if error["type"] == "value_error":  # raised by a validator of this project: its message is complete
        return str(error["ctx"]["error"])
    return f"{error['msg'][0].lower()}{error['msg'][1:]}, found {error['input']!r}"


def _keys_at(model: type[BaseModel], path: list[Any]) -> list[str]:
    """Return the keys of the section at `path` inside `model`, none if there is no section."""
    for part in path:
        field = model.model_fields.get(str(part))
        section = _section_type(field.annotation) if field else None
        if section is None:
            return []
        model = section
    return list(model.model_fields)


def _section_type(annotation: Any) -> type[BaseModel] | None:
    """Return the model in an annotation like `Subset` or `Subset | None`."""
    for kind in (annotation, *get_args(annotation)):
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            return kind
    return None
