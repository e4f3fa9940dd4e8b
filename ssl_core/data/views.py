"""Views: size, crop, augmentation, and the networks that see them. Torch-free.

The numbers of the named policies are those of the papers' code (docs/sources.md#augmentations).
"""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, Self

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from ssl_core.config import Strict, nearest, parse
from ssl_core.mistakes import excerpt


def _check_range(name: str, pair: tuple[float, float]) -> None:
    if pair[0] > pair[1]:
        raise ValueError(f"{name} {list(pair)} is no range: the first number must not exceed the second")


Probability = Annotated[float, Field(ge=0, le=1)]


class Augmentation(Strict):
    """The operations on a crop, in this order: flip, colour jitter, grayscale, blur, solarize, RandAugment.

    A section may be the name of a policy, or `policy: <name>` with changes to it.
    """

    flip: Probability = 0.5
    jitter: Probability = 0.0  # of brightness, contrast, saturation and hue together
    brightness: NonNegativeFloat = 0.0  # a factor from [max(0, 1 - b), 1 + b], as for contrast and saturation
    contrast: NonNegativeFloat = 0.0
    saturation: NonNegativeFloat = 0.0
    hue: Annotated[float, Field(ge=0, le=0.5)] = 0.0  # in turns: 0.5 allows any hue
    grayscale: Probability = 0.0
    blur: Probability = 0.0
    blur_sigma: tuple[PositiveFloat, PositiveFloat] = (0.1, 2.0)  # pixels
    solarize: Probability = 0.0  # inverts values of 128 and more, of 255
    randaugment: NonNegativeInt = 0  # operations drawn as in CLSA: each applied with p = 0.5, magnitude 1 to 9 of 10

    @model_validator(mode="before")
    @classmethod
    def _start_from_policy(cls, section: Any) -> Any:
        if isinstance(section, str):
            section = {"policy": section}
        if not isinstance(section, Mapping) or "policy" not in section:
            return section
        changes = dict(section)
        name = changes.pop("policy")
        if name not in POLICIES:
            raise ValueError(f"there is no augmentation policy '{excerpt(name)}'{nearest(str(name), POLICIES)}")
        return {**POLICIES[name].model_dump(), **changes}

    @model_validator(mode="after")
    def _sigma_is_a_range(self) -> Self:
        _check_range("blur_sigma", self.blur_sigma)
        return self


_MOCO = Augmentation(jitter=0.8, brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1, grayscale=0.2, blur=0.5)
_BYOL = _MOCO.model_copy(update={"saturation": 0.2, "blur": 1.0})
_SIMCLR = _MOCO.model_copy(update={"brightness": 0.8, "contrast": 0.8, "saturation": 0.8, "hue": 0.2})

POLICIES: dict[str, Augmentation] = {
    "none": Augmentation(flip=0.0),
    "weak": Augmentation(),
    "contrastive": _MOCO,  # MoCo v2, ReSSL
    "contrastive_no_blur": _MOCO.model_copy(update={"blur": 0.0}),  # Cao and Wu on CIFAR
    "simclr": _SIMCLR,  # strength 1
    "simclr_small": _MOCO.model_copy(update={"blur": 0.0}),  # strength 0.5 for CIFAR: as MoCo, without blur
    "byol_first": _BYOL,
    "byol_second": _BYOL.model_copy(update={"blur": 0.1, "solarize": 0.2}),
    "dino_global_first": _BYOL,
    "dino_global_second": _BYOL.model_copy(update={"blur": 0.1, "solarize": 0.2}),
    "dino_local": _BYOL.model_copy(update={"blur": 0.5}),
    "swav": _SIMCLR,
    "aug_plus": _SIMCLR.model_copy(update={"hue": 0.4, "grayscale": 0.5}),  # Shi et al.
    "strong": _MOCO.model_copy(update={"randaugment": 5}),  # CLSA
    "npid": _MOCO.model_copy(update={"flip": 0.0, "jitter": 1.0, "hue": 0.4, "blur": 0.0}),
}


class View(Strict):
    """A group of `count` views of `size` x `size` pixels with the same distribution."""

    count: PositiveInt = 1
    size: PositiveInt
    crop: Literal["random", "center"] = "random"
    # the part of the image that random crops are taken from: left, top, right, bottom as shares of the sides
    region: tuple[Probability, Probability, Probability, Probability] | None = None
    area: tuple[float, float] = (0.2, 1.0)  # share of the image (or region) that a random crop covers
    ratio: tuple[PositiveFloat, PositiveFloat] = (3 / 4, 4 / 3)  # width over height of a random crop
    resize: PositiveInt | None = None  # the shorter side before a center crop; None: `size`
    interpolation: Literal["linear", "cubic"] = "linear"
    augmentation: Augmentation = POLICIES["none"]
    seen_by: tuple[str, ...] = ("student",)

    @model_validator(mode="after")
    def _crop_is_possible(self) -> Self:
        _check_range("area", self.area)
        _check_range("ratio", self.ratio)
        if self.area[0] <= 0 or self.area[1] > 1:
            raise ValueError(f"area {list(self.area)} is not a share of the image: give 0 < smallest <= largest <= 1")
        if self.region is not None and not (self.region[0] < self.region[2] and self.region[1] < self.region[3]):
            raise ValueError(f"region {list(self.region)} is empty: give left < right and top < bottom, from 0 to 1")
        if self.region is not None and self.crop == "center":
            raise ValueError("region needs `crop: random`: leave it out for a center crop")
        if self.resize is not None and self.crop == "random":
            raise ValueError("resize needs `crop: center`: a random crop is always resized to `size`")
        if self.resize is not None and self.resize < self.size:
            raise ValueError(f"resize {self.resize} is smaller than the crop: give {self.size} pixels or more")
        return self


Views = dict[str, View]  # by the name of the group


def adjust(views: Views, changes: Mapping[str, Mapping[str, Any]], *, avoid: Sequence[str] = ()) -> Views:
    """Apply the user's changes to each group, then switch off the augmentations that the card avoids.

    `changes` is an experiment's `views` section; an `augmentation` without `policy` changes the group's augmentation.
    An operation that the user sets stays on even if the card avoids it. Raises `ValueError` for an unknown group or
    key.
    """
    for group in changes:
        if group not in views:
            raise ValueError(f"views.{group}: the method has no such views{nearest(group, views)}")
    for name in avoid:
        if name not in _SWITCHES:
            raise ValueError(f"avoid: no augmentation is called '{name}'{nearest(name, _SWITCHES)}")
    return {group: _adjust_one(group, view, changes.get(group) or {}, avoid) for group, view in views.items()}


_SWITCHES = [name for name in Augmentation.model_fields if name != "blur_sigma"]  # zero switches an operation off


def _adjust_one(group: str, view: View, change: Mapping[str, Any], avoid: Sequence[str]) -> View:
    changed = change.get("augmentation", {})
    explicit = changed if isinstance(changed, Mapping) else {}  # else the name of a policy
    augmentation = changed
    if isinstance(changed, Mapping) and "policy" not in changed:
        augmentation = {**view.augmentation.model_dump(), **changed}
    view = parse(View, {**view.model_dump(), **change, "augmentation": augmentation}, f"views.{group}")
    off = {name: 0 for name in avoid if name not in explicit}
    return view.model_copy(update={"augmentation": view.augmentation.model_copy(update=off)})
