"""The GPU's graph of views against the CPU's, operator by operator, and against torchvision.

Tolerances are mean absolute differences of pixels in 0..255. Random numbers are drawn on the CPU for both graphs, so
equal seeds give equal parameters.
"""

from typing import Any

import pytest
import torch
from torch import Tensor

from ssl_core.config import Dataset
from ssl_core.data.loader import Loader
from ssl_core.data.shards import Manifest
from ssl_core.data.views import POLICIES, Augmentation, View
from tests.data.test_pipeline import difference, images, render

__all__ = ["images"]

EXACT, ROUNDED, RESAMPLED, NEAREST = 0.01, 0.1, 0.6, 1.5  # NEAREST: a pixel at an edge may come from its neighbour
JITTER = {"jitter": 0.8, "brightness": 0.4, "contrast": 0.4, "saturation": 0.4, "hue": 0.1}
OPERATORS: dict[str, tuple[dict[str, Any], float]] = {
    "decoder and normalisation": ({"flip": 0.0}, EXACT),
    "flip": ({"flip": 0.5}, EXACT),
    "brightness": ({"jitter": 1, "brightness": 0.6}, ROUNDED),
    "contrast": ({"jitter": 1, "contrast": 0.6}, ROUNDED),
    "saturation": ({"jitter": 1, "saturation": 0.6}, ROUNDED),
    "hue": ({"jitter": 1, "hue": 0.3}, ROUNDED),
    "colour jitter": (JITTER, ROUNDED),
    "grayscale": ({"grayscale": 0.5}, ROUNDED),
    "blur": ({"blur": 1.0}, ROUNDED),
    "blur of half the images": ({"blur": 0.5}, ROUNDED),
    "solarize": ({"solarize": 0.5}, EXACT),
    "one operation of RandAugment": ({"randaugment": 1}, NEAREST),
    "five operations of RandAugment": ({"randaugment": 5}, 3 * NEAREST),
}
WHOLE = Augmentation(flip=0.0)
CROPS: dict[str, View] = {
    "center": View(size=24, crop="center", resize=28, augmentation=WHOLE),
    "center, cubic": View(size=24, crop="center", resize=28, interpolation="cubic", augmentation=WHOLE),
    "random": View(count=2, size=24, augmentation=WHOLE),
    "random, cubic": View(size=24, interpolation="cubic", augmentation=WHOLE),
    "random, enlarged": View(size=64, area=(0.05, 0.4), augmentation=WHOLE),
    "region": View(size=16, region=(0.5, 0.0, 1.0, 0.5), augmentation=WHOLE),
}


def assert_equal_graphs(manifest: Manifest, view: View, device: str, tolerance: float) -> None:
    on_device = render(manifest, {"view": view}, device=device)["view"]
    on_cpu = render(manifest, {"view": view}, device="cpu")["view"]
    for one, other in zip(on_device, on_cpu, strict=True):
        assert difference(one, other) < tolerance


@pytest.mark.parametrize("operator", OPERATORS)
def test_an_operator_gives_the_cpus_pixels(tiny: Manifest, device: str, operator: str) -> None:
    changes, tolerance = OPERATORS[operator]
    how = Augmentation.model_validate({"flip": 0.0, **changes})
    assert_equal_graphs(tiny, View(size=32, crop="center", augmentation=how), device, tolerance)


@pytest.mark.parametrize("crop", CROPS)
def test_a_crop_gives_the_cpus_pixels(tiny: Manifest, device: str, crop: str) -> None:
    assert_equal_graphs(tiny, CROPS[crop], device, RESAMPLED)


@pytest.mark.parametrize("size", [pytest.param(64, marks=pytest.mark.slow), pytest.param(224, marks=pytest.mark.slow)])
def test_a_wide_blur_gives_the_cpus_pixels(tiny: Manifest, device: str, size: int) -> None:
    """Larger views are blurred by a row and a column."""
    how = Augmentation(flip=0.0, blur=1.0)
    assert_equal_graphs(tiny, View(size=size, crop="center", augmentation=how), device, RESAMPLED)


@pytest.mark.slow
@pytest.mark.parametrize("policy", POLICIES)
def test_a_policy_gives_the_cpus_pixels(tiny: Manifest, device: str, policy: str) -> None:
    tolerance = 4 * NEAREST if policy == "strong" else 2 * RESAMPLED  # jitter and solarize amplify a rounded pixel
    assert_equal_graphs(tiny, View(size=24, augmentation=POLICIES[policy]), device, tolerance)


@pytest.mark.cuda
def test_a_batch_is_not_overwritten_while_kernels_still_read_it(tiny: Manifest, device: str) -> None:
    """The loop does not wait for the GPU between two batches, whose memory belongs to DALI."""
    views = {"view": View(count=2, size=64, augmentation=POLICIES["contrastive"])}
    copies: list[list[Tensor]] = []
    for cycles in (0, 100_000_000):  # some 50 ms, far longer than a batch takes
        with Loader(tiny, Dataset(name="tiny"), views, batch_size=16, seed=0, device=device) as loader:
            copied = []
            for _ in range(12):
                batch = loader.next()
                if cycles:
                    torch.cuda._sleep(cycles)
                copied += [view.clone() for view in batch.views["view"]]
                if not cycles:
                    torch.cuda.synchronize()
                del batch
            torch.cuda.synchronize()
        copies.append(copied)
    assert all(torch.equal(one, other) for one, other in zip(*copies, strict=True))
