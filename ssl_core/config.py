"""The typed, strict configuration: what an experiment may say, and what it means when it says nothing.

Torch-free. A method's own hyper-parameters stand in its file (`ssl_core/methods/<name>.py`), a protocol's in
`ssl_core/evaluations/<name>.py`; both derive from `Strict`.
"""

import difflib
from collections.abc import Iterable
from typing import Annotated, Any, Literal, TypeVar, get_args

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
    """A frozen section that refuses keys it does not know."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Subset(Strict):
    """A seeded draw of images that never looks at labels (IN-10k, IN-100k)."""

    images: PositiveInt
    seed: int = 0


class Dataset(Strict):
    """A card in `datasets/`, one of its splits and, if asked, a part of it."""

    name: str
    split: str = "train"
    subset: Subset | None = None


class Backbone(Strict):
    """A network by name; the stem fits it to the image size."""

    name: str
    stem: Literal["imagenet", "small", "tiny"] = "imagenet"
    hidden_layer: bool = True  # MobileNetV3's Linear + h-swish behind the pooling (recipes section 3)


class Training(Strict):
    """Optimisation. A method's preset replaces these defaults by its paper's values; the user's words win over both."""

    epochs: PositiveInt = 200
    batch_size: PositiveInt = 256  # over all processes and accumulation steps
    accumulation: PositiveInt = 1
    seed: NonNegativeInt = 0
    optimizer: Literal["sgd", "lars", "adamw"] = "sgd"
    learning_rate: PositiveFloat = 0.06
    learning_rate_scaling: Literal["linear", "none"] = "linear"  # linear: times batch_size / 256
    minimum_learning_rate: NonNegativeFloat = 0.0  # absolute, never scaled
    momentum: NonNegativeFloat = 0.9
    nesterov: bool = False
    weight_decay: NonNegativeFloat = 5e-4
    decay_exclusion: Literal["none", "norm_bias", "norm_bias_depthwise", "named"] = "none"
    schedule: Literal["cosine", "step", "constant"] = "cosine"
    schedule_unit: Literal["step", "epoch"] = "step"  # how often the cosine moves (recipes rule 10)
    milestones: tuple[PositiveInt, ...] = ()  # epochs, for the step schedule
    decay_factor: PositiveFloat = 0.1
    warmup_epochs: NonNegativeFloat = 10.0
    gradient_clip: PositiveFloat | None = None
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    compile: bool = False
    gpus: PositiveInt = 1  # processes; on a machine without a GPU they share the CPU through gloo
    sync_batchnorm: bool = True  # only matters with several processes
    checkpoint_minutes: PositiveFloat = 2.0
    monitor_epochs: PositiveInt = 5  # how often the online kNN looks


class Experiment(Strict):
    """One pre-training, resolved: `method` is the method's own `Config`, everything unsaid filled in."""

    dataset: Dataset
    backbone: Backbone
    method: Any
    views: dict[str, dict[str, Any]] = Field(
        default_factory=dict
    )  # per view group, what differs from the method's views
    training: Training


class Normalisation(Strict):
    """What is taken from the channels of pixels in 0..1, and what they are then divided by."""

    mean: tuple[float, float, float]
    std: tuple[PositiveFloat, PositiveFloat, PositiveFloat]


class Adopted(Strict):
    """An experiment whose network was trained elsewhere: `weights` in place of a method and its training."""

    dataset: Dataset
    backbone: Backbone
    weights: str  # safetensors named as torchvision or timm name them, or a backbone.safetensors of ours
    image_size: PositiveInt | None = None  # pixels the network sees; None: the data set's, or as a file of ours says
    # Of the pictures the network was trained on; None: ImageNet's, or what a file of ours says in its header.
    normalisation: Literal["imagenet", "dataset"] | Normalisation | None = None


class Reported(Strict):
    """Numbers from elsewhere that the table shows beside the measured ones; no stage ever reads them."""

    source: str  # for example "ReSSL, Table 2"
    epochs: PositiveInt | None = None
    hours: str | None = None
    hardware: str | None = None
    note: str | None = None
    results: dict[str, Annotated[float, Field(ge=0, le=100)]]  # evaluation -> its headline metric in percent


Model = TypeVar("Model", bound=BaseModel)


def parse(model: type[Model], section: Any, where: str) -> Model:
    """Read `section` as a `model`; what is wrong first is a one-line `ValueError` with its path and the nearest key."""
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
    """Return "; did you mean 'x'?" for the word most like `word`, else the list of what is possible."""
    words = sorted(words)
    matches = difflib.get_close_matches(word, words, n=1, cutoff=0.5)
    if matches:
        return f"; did you mean '{matches[0]}'?"
    return f"; possible: {', '.join(words)}" if words else ""


def _reason(error: Any) -> str:
    if error["type"] == "value_error":  # raised by one of our own validators, which say everything
        return str(error["ctx"]["error"])
    return f"{error['msg'][0].lower()}{error['msg'][1:]}, found {error['input']!r}"


def _keys_at(model: type[BaseModel], path: list[Any]) -> list[str]:
    for part in path:
        field = model.model_fields.get(str(part))
        inner = field.annotation if field else None
        models = [kind for kind in (inner, *get_args(inner)) if isinstance(kind, type) and issubclass(kind, BaseModel)]
        if not models:
            return []
        model = models[0]
    return list(model.model_fields)
