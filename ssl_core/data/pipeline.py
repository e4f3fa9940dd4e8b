"""The DALI graph that turns shards into views, one for CPU and GPU: decode an image once, crop it as often as asked.

Every random operator has a seed of its own, made of the run's seed and of the view and the operation it belongs to, so
that adding a view leaves the others as they were.

Colour jitter has torchvision's meaning with three stated differences. (1) torchvision clamps to 0..255 after each of
its four operations, here only the end result is; without those clamps all 24 orders give the same image, since
saturation and hue keep the luma and contrast is about the mean luma, so there is no order to draw. (2) Hue turns in
YIQ, not HSV: the sign agrees, equal turns move colours about 1.3 times as far. (3) Nothing is rounded on the way.
"""

# DALI's stubs know neither operators on graph nodes nor `if` on them nor most constants.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false
# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false, reportAssignmentType=false, reportOptionalMemberAccess=false

import ctypes
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from nvidia.dali import fn, types
from nvidia.dali import math as dmath
from nvidia.dali._utils import dali_trace
from nvidia.dali.auto_aug import augmentations as ops
from nvidia.dali.auto_aug.core import augmentation, signed_bin
from nvidia.dali.data_node import DataNode
from nvidia.dali.pipeline import Pipeline, do_not_convert, pipeline_def

from ssl_core.data.views import Augmentation, View, Views

# Else every operator carries the stack that made it: building takes longer, and the serialized graph, which says
# whether a saved state fits, would change with every line number.
dali_trace.set_tracing(enabled=False)

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # from malloc.h
RANDOM = ("crop", "flip", "colour", "blur", "sigma", "solarize")
INTERPOLATION = {"linear": types.INTERP_LINEAR, "cubic": types.INTERP_CUBIC}


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Everything the graph depends on; two equal plans make the same views, bit for bit."""

    tars: tuple[str, ...]
    indices: tuple[str, ...]
    views: Views
    mean: tuple[float, ...]  # of pixels in 0..1
    std: tuple[float, ...]
    seed: int
    shuffle_buffer: int  # images; 0 reads them in order
    rank: int = 0
    world_size: int = 1
    gpu: bool = False

    def seed_of(self, *names: object) -> int:
        """Return the seed of one random operator, by its name."""
        return zlib.crc32("/".join(map(str, (self.seed, self.rank, *names))).encode())


def build(
    plan: Plan, *, batch_size: int, threads: int, device_id: int | None = None, checkpoint: bytes | None = None
) -> Pipeline:
    """Start the pipeline, from `checkpoint` if there is one; `device_id` is the GPU of a plan for one."""
    _keep_freed_memory()
    pipeline = _graph(
        plan, batch_size=batch_size, num_threads=threads, device_id=device_id, seed=0, checkpoint=checkpoint
    )
    pipeline.build()
    return pipeline


def _keep_freed_memory() -> None:
    """Have glibc reuse large buffers, which it else gives back after every batch and gets again page by page.

    Measured: 10 % of the views' CPU time, with batches of 256 at 64 px as with batches of 32 at 224 px.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, 2**30)


def serialize(plan: Plan, *, batch_size: int) -> bytes:
    """Return the graph in DALI's own format; it takes neither the shards nor a GPU and does not depend on threads."""
    return _graph(plan, batch_size=batch_size, num_threads=1, device_id=None, seed=0).serialize()


@pipeline_def(enable_conditionals=True, enable_checkpointing=True)
def _graph(plan: Plan) -> tuple[DataNode, ...]:
    """Return (label and dataset index, then the views in order, each HWC float)."""
    encoded, meta = fn.readers.webdataset(
        paths=list(plan.tars),
        index_paths=list(plan.indices),
        ext=["jpg;jpeg;png", "meta.i64"],
        dtypes=[types.UINT8, types.INT64],
        random_shuffle=plan.shuffle_buffer > 0,
        initial_fill=max(1, plan.shuffle_buffer),
        pad_last_batch=True,  # else the borders of epochs drift
        stick_to_shard=plan.shuffle_buffer == 0,
        missing_component_behavior="error",
        tensor_init_bytes=1,  # else each image in the buffer reserves a MB and touches a page or two of it
        shard_id=plan.rank,
        num_shards=plan.world_size,
        seed=plan.seed_of("reader"),
        name="reader",
    )
    # Fancy upsampling gives a GPU the CPU's colours; the CPU's decoder has no other.
    where = {"device": "mixed", "jpeg_fancy_upsampling": True} if plan.gpu else {"device": "cpu"}
    image = fn.decoders.image(encoded, output_type=types.RGB, name="decoder", **where)
    views = []
    for group, view in plan.views.items():
        for index in range(view.count):
            views.append(_view(image, plan, group, view, index))
    return (meta.gpu() if plan.gpu else meta, *views)


def _view(image: DataNode, plan: Plan, group: str, view: View, index: int) -> DataNode:
    seeds = {name: plan.seed_of(group, index, name) for name in RANDOM}
    how = view.augmentation
    image = _crop(image, view, seeds["crop"])
    if (how.jitter > 0 and _has_jitter(how)) or how.grayscale > 0:
        image = _colour(image, how, seeds["colour"], plan.gpu)
    elif how.blur > 0 or how.solarize > 0:
        image = fn.cast(image, dtype=types.FLOAT)
    if how.blur > 0:
        image = _blur(image, how, view.size, seeds, plan.gpu)
    if how.solarize > 0:
        image = _solarize(image, how.solarize, seeds["solarize"])
    if how.randaugment > 0:
        image = fn.cast(image, dtype=types.UINT8)
        for number in range(how.randaugment):
            image = _randaugment(image, view.size, [plan.seed_of(group, index, "rand", number, k) for k in range(4)])
    return fn.crop_mirror_normalize(
        image,
        mirror=fn.random.coin_flip(probability=how.flip, seed=seeds["flip"]) if how.flip > 0 else 0,
        mean=[255 * value for value in plan.mean],
        std=[255 * value for value in plan.std],
        output_layout="HWC",  # a permuted view of it is channels_last
    )


def _crop(image: DataNode, view: View, seed: int) -> DataNode:
    interpolation = INTERPOLATION[view.interpolation]
    if view.crop == "center":
        image = fn.resize(image, resize_shorter=view.resize or view.size, interp_type=interpolation)
        return fn.crop(image, crop=(view.size, view.size))
    if view.region is not None:
        left, top, right, bottom = view.region
        image = fn.slice(image, rel_start=[top, left], rel_end=[bottom, right], axis_names="HW")
    return fn.random_resized_crop(
        image,
        size=(view.size, view.size),
        random_area=list(view.area),
        random_aspect_ratio=list(view.ratio),
        interp_type=interpolation,
        seed=seed,
    )


def _has_jitter(how: Augmentation) -> bool:
    return max(how.brightness, how.contrast, how.saturation, how.hue) > 0


def _colour(image: DataNode, how: Augmentation, seed: int, gpu: bool) -> DataNode:
    """Apply brightness, contrast, saturation, hue and grayscale to 0..255 as one map; return float."""
    contrasted = how.contrast > 0 and how.jitter > 0
    # Twenty operators would do the same for twice the price of the map itself at 32 px.
    hue, saturation, value, *share = _drawn(3 + contrasted, 0, draw_colours, how, seed)
    turned = fn.hsv(image, hue=hue, saturation=saturation, value=value, dtype=types.FLOAT)
    if contrasted:  # what is taken from the contrast comes back as the mean grey
        grey = fn.reductions.mean(fn.color_space_conversion(image, image_type=types.RGB, output_type=types.GRAY))
        turned = turned + grey * (share[0].gpu() if gpu else share[0])
    # Not dmath.clamp, which takes four times as long on the CPU.
    return dmath.min(dmath.max(turned, 0.0), 255.0)


@do_not_convert  # else DALI looks for conditionals in all that is called here, at every step
def _drawn(outputs: int, ndim: int, draw: Callable[..., Sequence[np.ndarray]], *arguments: Any) -> Sequence[DataNode]:
    """Return numbers that `draw` makes of the iteration alone, so that a restored pipeline draws on."""
    batch_size = Pipeline.current().max_batch_size
    return fn.external_source(
        source=lambda info: list(draw(*arguments, info.iteration, batch_size))[:outputs],
        num_outputs=outputs,
        batch_info=True,
        dtype=types.FLOAT,
        ndim=ndim,
    )


def draw_colours(how: Augmentation, seed: int, iteration: int, batch_size: int) -> np.ndarray:
    """Draw what `_colour` needs: hue in degrees, saturation, brightness x contrast, share of the mean grey; (4, batch).

    Where jitter is not drawn they are those of the identity, and grayscale is a saturation of zero.
    """
    uniform = _generator(seed, iteration).random((6, batch_size))
    jitter = uniform[0] < how.jitter

    def factor(draw: np.ndarray, strength: float) -> np.ndarray:
        smallest = max(0.0, 1 - strength)
        return np.where(jitter, smallest + draw * (1 + strength - smallest), 1.0)

    brightness, contrast = factor(uniform[1], how.brightness), factor(uniform[2], how.contrast)
    saturation = factor(uniform[3], how.saturation) * (uniform[5] >= how.grayscale)
    hue = np.where(jitter, 360 * how.hue * (2 * uniform[4] - 1), 0.0)
    return np.stack([hue, saturation, brightness * contrast, brightness * (1 - contrast)]).astype(np.float32)


def _blur(image: DataNode, how: Augmentation, size: int, seeds: dict[str, int], gpu: bool) -> DataNode:
    """Blur as torchvision does; `fn.filter` takes a third of the time of `fn.gaussian_blur`."""
    window = blur_window(size)
    kernels = _drawn(1 if window == 3 else 2, 2, draw_kernels, how, window, seeds["sigma"])
    kernels = [kernel.gpu() if gpu else kernel for kernel in kernels]
    if how.blur == 1:
        return _filter(image, kernels)
    if fn.random.coin_flip(probability=how.blur, seed=seeds["blur"], dtype=types.BOOL):
        result = _filter(image, kernels)
    else:
        result = image
    return result


def _filter(image: DataNode, kernels: list[DataNode]) -> DataNode:
    for kernel in kernels:
        image = fn.filter(image, kernel)
    return image


def blur_window(size: int) -> int:
    """Return the side of the blur's window for views of `size` px: an odd number near a tenth of it, at least 3."""
    return max(3, size // 10 | 1)


def draw_kernels(how: Augmentation, window: int, seed: int, iteration: int, batch_size: int) -> list[np.ndarray]:
    """Draw a sigma an image; return its Gaussian as a row and a column, or as their product if the window is 3."""
    smallest, largest = how.blur_sigma
    sigma = smallest + (largest - smallest) * _generator(seed, iteration).random((batch_size, 1))
    offsets = np.arange(window) - window // 2
    weights = np.exp(-0.5 * (offsets / sigma) ** 2)
    weights = (weights / weights.sum(axis=1, keepdims=True)).astype(np.float32)
    row, column = weights[:, None, :], weights[:, :, None]
    return [row * column] if window == 3 else [row, column]


def _generator(seed: int, iteration: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(key=seed, counter=[0, iteration, 0, 0]))


def _solarize(image: DataNode, probability: float, seed: int) -> DataNode:
    if fn.random.coin_flip(probability=probability, seed=seed, dtype=types.BOOL):
        bright = image >= 127.5  # what would round to the threshold of 128
        result = image + bright * (255.0 - 2.0 * image)
    else:
        result = image
    return result


@augmentation(mag_range=(0.05, 0.95), mag_to_param=ops.sharpness_kernel_shifted, param_device="auto")
def _sharpness(data: DataNode, kernel: DataNode) -> DataNode:
    return fn.filter(data, kernel)


@augmentation
def _equalize(data: DataNode, _: Any) -> DataNode:
    return fn.equalize(data)


def clsa_pool(size: int) -> list[Any]:
    """Return FixMatch's fourteen operations, from which CLSA draws, for images of `size` px.

    At magnitude m of 10 a range (low, high) gives low + (high - low) m / 10. Equalize is OpenCV's; PIL's, whose steps
    are whole numbers, is up to a third off at 32 px.
    """
    shifts = np.array([float(int(0.03 * magnitude * size)) for magnitude in range(11)])  # whole pixels of at most 30 %
    bits = np.array([4 + int(0.4 * magnitude) for magnitude in range(11)])
    return [
        ops.auto_contrast,
        ops.brightness.augmentation((0.05, 0.95), False, None),
        ops.color.augmentation((0.05, 0.95), False, None),
        ops.contrast.augmentation((0.05, 0.95), False, None),
        _equalize,
        ops.identity,
        ops.posterize.augmentation(bits),
        ops.rotate.augmentation((0, 30), True),
        _sharpness,
        ops.shear_x.augmentation((0, 0.3), True),
        ops.shear_y.augmentation((0, 0.3), True),
        ops.solarize.augmentation((256, 0)),
        ops.translate_x_no_shape.augmentation(shifts, True),
        ops.translate_y_no_shape.augmentation(shifts, True),
    ]


def _randaugment(image: DataNode, size: int, seeds: list[int]) -> DataNode:
    """Apply, with probability one half, one operation of the pool at an integer magnitude from 1 to 9."""
    pool = clsa_pool(size)
    operation = fn.random.uniform(values=list(range(len(pool))), dtype=types.INT32, seed=seeds[0])
    magnitude = fn.random.uniform(values=list(range(1, 10)), dtype=types.INT32, seed=seeds[1])
    sign = fn.random.coin_flip(dtype=types.INT32, seed=seeds[2])
    strength = signed_bin(magnitude, sign)
    if fn.random.coin_flip(probability=0.5, seed=seeds[3], dtype=types.BOOL):
        result = _one_of(pool, operation, 0, image, strength)
    else:
        result = image
    return result


def _one_of(pool: list[Any], operation: DataNode, first: int, image: DataNode, strength: Any) -> DataNode:
    """Halve the pool, which counts from `first`, until one operation is left; each `if` splits the batch."""
    if len(pool) == 1:
        return apply_operation(pool[0], image, strength)
    half = len(pool) // 2
    if operation < first + half:
        result = _one_of(pool[:half], operation, first, image, strength)
    else:
        result = _one_of(pool[half:], operation, first + half, image, strength)
    return result


@do_not_convert  # nothing here is conditional, and looking for it takes DALI most of the time of building the graph
def apply_operation(operation: Any, image: DataNode, strength: Any) -> DataNode:
    """Apply one operation as PIL would: the nearest pixel, black beyond the border."""
    return operation(image, magnitude_bin=strength, num_magnitude_bins=11, fill_value=0, interp_type=types.INTERP_NN)
