"""SSLight's view sampling (Tan et al., 2023, section 3.2), https://arxiv.org/abs/2210.02808: how large local views are.

A pixel of a small local view shows more of the image than one of a global view. Small networks, which are less
indifferent to scale, learn better where both show as much: on average pixels^2 / cropped area is equal. Torch-free.
"""

import math

import numpy as np

Range = tuple[float, float]


def local_size(global_size: int, global_area: Range, local_area: Range, *, multiple: int = 1) -> int:
    """Return the side of local views at which E[scale of global / scale of local] = 1, to the nearest `multiple`.

    `global_area` and `local_area` are the shares of the image that crops cover, drawn uniformly. In closed form: crops
    that never meet the border. At 224 pixels 104 for global areas from 0.14, as the paper says, and 123 from 0.3, which
    is its 128 as a multiple of 32.
    """
    exact = global_size * math.sqrt(_mean_inverse(global_area) * sum(local_area) / 2)
    return _to_multiple(exact, multiple)


def sampled_local_size(
    global_size: int,
    global_area: Range,
    local_area: Range,
    *,
    width: int,
    height: int,
    ratio: Range = (3 / 4, 4 / 3),
    multiple: int = 1,
    samples: int = 100_000,
    seed: int = 0,
) -> int:
    """Return what `local_size` does, measured on random crops as they are drawn from `width` x `height` images.

    Crops that do not fit are drawn anew, so that large areas are rarer than asked for: 132 pixels where the closed form
    says 123 (global areas from 0.3, images of 500 x 375).
    """
    generator = np.random.default_rng(seed)
    globals_ = crop_areas(global_area, ratio, width=width, height=height, samples=samples, generator=generator)
    locals_ = crop_areas(local_area, ratio, width=width, height=height, samples=samples, generator=generator)
    return _to_multiple(global_size * math.sqrt((1 / globals_).mean() * locals_.mean()), multiple)


def crop_areas(
    area: Range, ratio: Range, *, width: int, height: int, samples: int, generator: np.random.Generator
) -> np.ndarray:
    """Draw the areas in pixels of `samples` random crops as torchvision's `RandomResizedCrop` makes them.

    Ten attempts at an area and a log-uniform ratio; if none fits, the largest central crop of a permitted ratio.
    """
    areas = np.zeros(samples)
    for _ in range(10):
        target = width * height * generator.uniform(*area, size=samples)
        ratios = np.exp(generator.uniform(math.log(ratio[0]), math.log(ratio[1]), size=samples))
        widths, heights = np.round(np.sqrt(target * ratios)), np.round(np.sqrt(target / ratios))
        fits = (widths > 0) & (widths <= width) & (heights > 0) & (heights <= height)
        areas = np.where((areas == 0) & fits, widths * heights, areas)
    central = min(width, round(height * ratio[1])) * min(height, round(width / ratio[0]))
    return np.where(areas == 0, central, areas)


def _mean_inverse(area: Range) -> float:
    """Return E[1/A] of A uniform in `area`."""
    smallest, largest = area
    return 1 / smallest if smallest == largest else math.log(largest / smallest) / (largest - smallest)


def _to_multiple(size: float, multiple: int) -> int:
    return max(1, round(size / multiple)) * multiple
