"""Two views of an image with policies of their own (Grill et al., 2020), shared by methods without local views."""

from collections.abc import Sequence
from typing import Any, Literal

from ssl_core.config import Strict
from ssl_core.data.views import POLICIES, Augmentation, View, Views


class TwoViews(Strict):
    """Crop of both views and augmentation of each."""

    area: tuple[float, float] = (0.2, 1.0)
    interpolation: Literal["linear", "cubic"] = "linear"
    first_augmentation: Augmentation = POLICIES["contrastive_no_blur"]
    second_augmentation: Augmentation = POLICIES["contrastive_no_blur"]


# Parts of the methods' presets: BYOL's views, and solo-learn's for CIFAR, the same without blur.
BYOL_VIEWS = {
    "area": (0.08, 1.0), "interpolation": "cubic", "first_augmentation": "byol_first",
    "second_augmentation": "byol_second",
}  # fmt: skip
SMALL_VIEWS = {
    "area": (0.08, 1.0), "first_augmentation": {"policy": "byol_first", "blur": 0.0},
    "second_augmentation": {"policy": "byol_second", "blur": 0.0},
}  # fmt: skip


def two_views(
    config: TwoViews, image_size: int, *, first: Sequence[str] = ("student",), second: Sequence[str] = ("student",)
) -> Views:
    """Return the groups `first` and `second` of one view each; `first` and `second` name the networks that see them."""
    shared: Any = {"size": image_size, "area": config.area, "interpolation": config.interpolation}
    return {
        "first": View(augmentation=config.first_augmentation, seen_by=tuple(first), **shared),
        "second": View(augmentation=config.second_augmentation, seen_by=tuple(second), **shared),
    }
