"""The size of local views at an equal pixel scale."""

import pytest

from ssl_core.data.view_sizes import local_size


@pytest.mark.parametrize(
    ("smallest", "pixels", "size", "multiple"),
    [
        # docs/sources.md#worked-pixel-scale: 104.4 and 122.9 in closed form; SSLight runs 96 and 128
        (0.14, 224, 104, 1), (0.3, 224, 123, 1), (0.14, 224, 96, 32), (0.3, 224, 128, 32),
        (0.3, 32, 18, 1), (0.3, 32, 16, 8), (0.14, 64, 30, 1), (0.3, 96, 56, 8),
    ],
)  # fmt: skip
def test_the_closed_form_gives_the_papers_sizes(smallest: float, pixels: int, size: int, multiple: int) -> None:
    assert local_size(pixels, (smallest, 1.0), (0.05, smallest), multiple=multiple) == size


def test_equal_areas_need_equal_sizes() -> None:
    assert local_size(48, (0.5, 0.5), (0.5, 0.5)) == 48


def test_no_size_is_below_the_multiple() -> None:
    assert local_size(16, (0.3, 1.0), (0.05, 0.05), multiple=8) == 8
