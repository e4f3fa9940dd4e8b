"""The size of local views at an equal pixel scale (SSLight, Tan et al., 2023, section 3.2). Torch-free.

A pixel of a small local view covers more of the image than a pixel of a global view. Small networks depend more on
scale and learn better where both cover the same on average (docs/sources.md#sslight): https://arxiv.org/abs/2210.02808.
"""

import math

Range = tuple[float, float]


def local_size(global_size: int, global_area: Range, local_area: Range, *, multiple: int = 1) -> int:
    """Return the side of local views at which E[scale of global / scale of local] = 1, to the nearest `multiple`.

    The scale is pixels^2 / cropped area. `global_area` and `local_area` are the shares of the image that crops cover,
    drawn uniformly; the closed form ignores crops that do not fit. At 224 pixels it is 104 for global areas from 0.14,
    the paper's number, and 123 from 0.3, which is the paper's 128 as a multiple of 32.
    """
    mean_local_area = sum(local_area) / 2
    exact = global_size * math.sqrt(_mean_inverse(global_area) * mean_local_area)
    return max(1, round(exact / multiple)) * multiple


def _mean_inverse(area: Range) -> float:
    """Return E[1/A] for A uniform in `area`."""
    smallest, largest = area
    if smallest == largest:
        return 1 / smallest
    return math.log(largest / smallest) / (largest - smallest)
