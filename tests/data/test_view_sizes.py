import numpy as np
import pytest
import torch
from torchvision.transforms import RandomResizedCrop

from ssl_core.data.view_sizes import crop_areas, local_size, sampled_local_size


@pytest.mark.parametrize(
    ("smallest", "pixels", "size", "multiple"),
    [
        # recipes section 7, fixture 9: 104.4 and 122.9 in closed form; 96 and 128 are what SSLight runs
        (0.14, 224, 104, 1), (0.3, 224, 123, 1), (0.14, 224, 96, 32), (0.3, 224, 128, 32),
        (0.3, 32, 18, 1), (0.3, 32, 16, 8), (0.14, 64, 30, 1), (0.3, 96, 56, 8),
    ],
)  # fmt: skip
def test_the_closed_form_gives_the_papers_sizes(smallest, pixels, size, multiple):
    assert local_size(pixels, (smallest, 1.0), (0.05, smallest), multiple=multiple) == size


@pytest.mark.parametrize(
    ("smallest", "image", "size"),
    [(0.14, (500, 375), 114), (0.3, (500, 375), 132), (0.14, (400, 400), 108), (0.3, (400, 400), 127)],
)
def test_measured_on_drawn_crops_the_sizes_are_those_of_the_real_sampler(smallest, image, size):
    width, height = image
    found = sampled_local_size(224, (smallest, 1.0), (0.05, smallest), width=width, height=height)
    assert abs(found - size) <= 1


def test_crops_that_always_fit_agree_with_the_closed_form():
    sampled = sampled_local_size(224, (0.1, 0.2), (0.05, 0.1), width=4000, height=4000)
    assert abs(sampled - local_size(224, (0.1, 0.2), (0.05, 0.1))) <= 1


def test_equal_areas_need_equal_sizes():
    assert local_size(48, (0.5, 0.5), (0.5, 0.5)) == 48


def test_no_size_is_below_the_multiple():
    assert local_size(16, (0.3, 1.0), (0.05, 0.05), multiple=8) == 8


@pytest.mark.parametrize("area", [(0.05, 0.3), (0.3, 1.0), (1.0, 1.0)])
def test_areas_are_distributed_as_torchvisions(area):
    torch.manual_seed(0)
    image = torch.empty(3, 75, 100)
    theirs = []
    for _ in range(4000):
        _, _, height, width = RandomResizedCrop.get_params(image, list(area), [3 / 4, 4 / 3])
        theirs.append(height * width)
    generator = np.random.default_rng(0)
    ours = crop_areas(area, (3 / 4, 4 / 3), width=100, height=75, samples=40_000, generator=generator)
    for quantile in (0.1, 0.5, 0.9):
        assert np.quantile(ours, quantile) == pytest.approx(np.quantile(theirs, quantile), rel=0.03)
