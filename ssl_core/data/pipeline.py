"""The DALI graph from shards to views, for CPU and GPU: decode each image once, crop it once per view.

Every random operator has its own seed, derived from the run's seed, the view and the operation, so that an additional
view does not change the others.

Colour jitter is torchvision's with three differences. (1) torchvision clamps to 0..255 after each of its four
operations; here only the result is clamped. Without the clamps between them all 24 orders give the same image, since
saturation and hue keep the luma and contrast is relative to the mean luma, so no order is drawn. (2) Hue rotates in
YIQ, not HSV: the sign agrees, an equal rotation moves colours about 1.3 times as far. (3) Nothing is rounded between
the operations.
"""

# DALI's stubs lack operators and `if` on graph nodes, and most constants.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false
# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false, reportAssignmentType=false, reportOptionalMemberAccess=false

import ctypes
import math
import zlib
from collections.abc import Callable, Collection, Sequence
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

# With tracing, every operator stores its Python stack: building is slower, and the serialized graph, which identifies a
# saved state, changes with every line number.
dali_trace.set_tracing(enabled=False)

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # from malloc.h
RANDOM = ("crop", "flip", "colour", "blur", "sigma", "solarize")
FILES = "files"
NARROW = 8  # a longer side of more than so many shorter sides
# For DALI's BatchInfo: the files of first images, those of second images, label and index of the first, as arrays.
Read = Callable[[Any], tuple[list[np.ndarray], list[np.ndarray], list[np.ndarray]]]
INTERPOLATION = {"linear": types.INTERP_LINEAR, "cubic": types.INTERP_CUBIC}


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The parameters of the graph; equal plans give bit-identical views."""

    tars: tuple[str, ...]
    indices: tuple[str, ...]
    views: Views
    mean: tuple[float, ...]  # of pixels in 0..1
    std: tuple[float, ...]
    seed: int
    shuffle_buffer: int  # images; 0: read in order
    rank: int = 0
    world_size: int = 1
    gpu: bool = False

    def seed_of(self, *names: object) -> int:
        """Return the seed of one random operator from its name."""
        return zlib.crc32("/".join(map(str, (self.seed, self.rank, *names))).encode())


def build(
    plan: Plan, *, batch_size: int, threads: int, device_id: int | None = None, checkpoint: bytes | None = None
) -> Pipeline:
    """Build the pipeline, in the state of `checkpoint` if given; `device_id` is the GPU if `plan.gpu`."""
    _keep_freed_memory()
    pipeline = _graph(
        plan, batch_size=batch_size, num_threads=threads, device_id=device_id, seed=0, checkpoint=checkpoint
    )
    pipeline.build()
    return pipeline


def build_pairs(
    plan: Plan,
    read: Read,
    partners: Collection[str],
    *,
    batch_size: int,
    threads: int,
    device_id: int | None = None,
    checkpoint: bytes | None = None,
) -> Pipeline:
    """Build the pipeline of `pair_graph`, in the state of `checkpoint` if given."""
    _keep_freed_memory()
    options = {"batch_size": batch_size, "num_threads": threads, "device_id": device_id, "seed": 0}
    pipeline = pair_graph(plan, read, partners, **options, checkpoint=checkpoint)
    pipeline.build()
    return pipeline


def _keep_freed_memory() -> None:
    """Make glibc reuse large buffers instead of returning them to the system after every batch.

    Measured gain: 10 % of the views' CPU time, for batches of 256 at 64 px and of 32 at 224 px.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, 2**30)


def serialize(plan: Plan, *, batch_size: int) -> bytes:
    """Return the graph in DALI's format, independent of threads; it needs neither the shards nor a GPU."""
    return _graph(plan, batch_size=batch_size, num_threads=1, device_id=None, seed=0).serialize()


@pipeline_def(enable_conditionals=True, enable_checkpointing=True)
def _graph(plan: Plan) -> tuple[DataNode, ...]:
    """Return label and dataset index, then the views in order, each HWC float."""
    encoded, meta = fn.readers.webdataset(
        paths=list(plan.tars),
        index_paths=list(plan.indices),
        ext=["jpg;jpeg;png", "meta.i64"],
        dtypes=[types.UINT8, types.INT64],
        random_shuffle=plan.shuffle_buffer > 0,
        initial_fill=max(1, plan.shuffle_buffer),
        pad_last_batch=True,  # without it epochs would not end at the same step
        stick_to_shard=plan.shuffle_buffer == 0,
        missing_component_behavior="error",
        tensor_init_bytes=1,  # the default reserves a MB per image in the buffer
        shard_id=plan.rank,
        num_shards=plan.world_size,
        seed=plan.seed_of("reader"),
        name="reader",
    )
    image = _decode(encoded, plan)
    views = []
    for group, view in plan.views.items():
        for index in range(view.count):
            views.append(_view(image, plan, group, view, index))
    return (meta.gpu() if plan.gpu else meta, *views)


@pipeline_def(enable_conditionals=True, enable_checkpointing=True)
def pair_graph(plan: Plan, read: Read, partners: Collection[str]) -> tuple[DataNode, ...]:
    """Return label and dataset index of the first image of each pair, then the views in order, each HWC float.

    Views of the groups `partners` are made of the second image. `read` must depend on the iteration alone, so that a
    restored pipeline continues exactly.
    """
    first, second, meta = _read_pairs(read)
    images = _decode_pairs([first, second], plan)
    views = []
    for group, view in plan.views.items():
        image = images[int(group in partners)]
        for index in range(view.count):
            views.append(_view(image, plan, group, view, index))
    return (meta.gpu() if plan.gpu else meta, *views)


def _decode_pairs(encoded: Sequence[DataNode], plan: Plan) -> Sequence[DataNode]:
    """Decode as `_decode` does, by two operators, so without its name."""
    where = {"device": "mixed", "jpeg_fancy_upsampling": True} if plan.gpu else {"device": "cpu"}
    return fn.decoders.image(encoded, output_type=types.RGB, **where)


@do_not_convert
def _read_pairs(read: Read) -> Sequence[DataNode]:
    return fn.external_source(
        source=read, num_outputs=3, batch_info=True, dtype=[types.UINT8, types.UINT8, types.INT64], ndim=[1, 1, 1]
    )


@pipeline_def(enable_conditionals=True)
def file_graph(plan: Plan) -> DataNode:
    """Return the first view, HWC float, of the image files that each run is given as the input `FILES`."""
    image = _decode(fn.external_source(name=FILES, dtype=types.UINT8, ndim=1), plan)
    group, view = next(iter(plan.views.items()))
    return _view(image, plan, group, view, 0)


def _decode(encoded: DataNode, plan: Plan) -> DataNode:
    # With fancy upsampling the GPU decoder gives the same colours as the CPU decoder.
    where = {"device": "mixed", "jpeg_fancy_upsampling": True} if plan.gpu else {"device": "cpu"}
    return fn.decoders.image(encoded, output_type=types.RGB, name="decoder", **where)


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
        output_layout="HWC",  # permuted to NCHW it is channels_last
    )


def _crop(image: DataNode, view: View, seed: int) -> DataNode:
    interpolation = INTERPOLATION[view.interpolation]
    if view.crop == "center":
        start, end = _middle(image)
        image = fn.resize(
            image,
            resize_shorter=view.resize or view.size,
            interp_type=interpolation,
            roi_start=start,
            roi_end=end,
        )
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


def _middle(image: DataNode) -> tuple[DataNode, DataNode]:
    """Return start and end of the region that a center crop enlarges: the middle of narrow images, all of others.

    A strip of 6000 x 20 pixels as a whole would become one of 76,800 x 256.
    """
    sides = fn.slice(image.shape(dtype=types.FLOAT), 0, 2, axes=[0])  # height and width
    shorter = fn.reductions.min(sides, axes=[0], keep_dims=True)
    start = dmath.max(sides - NARROW * shorter, 0.0) / 2
    return start, sides - start


def _has_jitter(how: Augmentation) -> bool:
    return max(how.brightness, how.contrast, how.saturation, how.hue) > 0


def _colour(image: DataNode, how: Augmentation, seed: int, gpu: bool) -> DataNode:
    """Apply brightness, contrast, saturation, hue and grayscale to 0..255 as one map; return float."""
    contrasted = how.contrast > 0 and how.jitter > 0
    # The alternative, twenty operators, costs twice the time at 32 px.
    hue, saturation, value, *share = _drawn(3 + contrasted, 0, draw_colours, how, seed)
    turned = fn.hsv(image, hue=hue, saturation=saturation, value=value, dtype=types.FLOAT)
    if contrasted:  # contrast moves towards the mean grey
        grey = fn.reductions.mean(fn.color_space_conversion(image, image_type=types.RGB, output_type=types.GRAY))
        turned = turned + grey * (share[0].gpu() if gpu else share[0])
    # Not dmath.clamp, which takes four times as long on the CPU.
    return dmath.min(dmath.max(turned, 0.0), 255.0)


@do_not_convert  # DALI would look for conditionals in every function called here, at every step
def _drawn(outputs: int, ndim: int, draw: Callable[..., Sequence[np.ndarray]], *arguments: Any) -> Sequence[DataNode]:
    """Return numbers that `draw` derives from the iteration alone, so that a restored pipeline continues exactly."""
    batch_size = Pipeline.current().max_batch_size
    return fn.external_source(
        source=lambda info: list(draw(*arguments, info.iteration, batch_size))[:outputs],
        num_outputs=outputs,
        batch_info=True,
        dtype=types.FLOAT,
        ndim=ndim,
    )


def draw_colours(how: Augmentation, seed: int, iteration: int, batch_size: int) -> np.ndarray:
    """Draw the parameters of `_colour`: hue in degrees, saturation, brightness x contrast, grey share; (4, batch).

    Images without jitter get those of the identity; grayscale is a saturation of zero.
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
    """Blur as torchvision does; `fn.filter` needs a third of the time of `fn.gaussian_blur`."""
    window = blur_window(size, how.blur_sigma[1])
    kernels = _drawn(2, 2, draw_kernels, how, window, seeds["sigma"])
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


def blur_window(size: int, sigma: float) -> int:
    """Return the side of the blur's window: an odd number near a tenth of `size`, and three `sigma` on each side.

    A tenth is SimCLR's window. Three sigma match PIL's blur of small images, which has no window
    (docs/sources.md#blur). No side is longer than the reflected border allows.
    """
    return min(max(size // 10 | 1, 2 * math.ceil(3 * sigma) + 1), 2 * size - 1)


def draw_kernels(how: Augmentation, window: int, seed: int, iteration: int, batch_size: int) -> list[np.ndarray]:
    """Draw one sigma per image; return the Gaussians as rows and columns."""
    smallest, largest = how.blur_sigma
    sigma = smallest + (largest - smallest) * _generator(seed, iteration).random((batch_size, 1))
    offsets = np.arange(window) - window // 2
    weights = np.exp(-0.5 * (offsets / sigma) ** 2)
    weights = (weights / weights.sum(axis=1, keepdims=True)).astype(np.float32)
    return [weights[:, None, :], weights[:, :, None]]


def _generator(seed: int, iteration: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(key=seed, counter=[0, iteration, 0, 0]))


def _solarize(image: DataNode, probability: float, seed: int) -> DataNode:
    if fn.random.coin_flip(probability=probability, seed=seed, dtype=types.BOOL):
        bright = image >= 127.5  # values that round to 128 or more
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
    """Return the fourteen operations of FixMatch and CLSA for images of `size` px.

    At magnitude m of 10 a range (low, high) gives low + (high - low) m / 10. Equalize is OpenCV's; PIL's differs by up
    to a third at 32 px, since its steps are integers.
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
    """Apply one operation of the pool with probability 0.5, at an integer magnitude from 1 to 9."""
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
    """Select an operation by bisection, since each `if` splits the batch; `first` is the number of the pool's first."""
    if len(pool) == 1:
        return apply_operation(pool[0], image, strength)
    half = len(pool) // 2
    if operation < first + half:
        result = _one_of(pool[:half], operation, first, image, strength)
    else:
        result = _one_of(pool[half:], operation, first + half, image, strength)
    return result


@do_not_convert  # DALI would spend most of the building time looking for conditionals
def apply_operation(operation: Any, image: DataNode, strength: Any) -> DataNode:
    """Apply one operation as PIL would: the nearest pixel, black beyond the border."""
    return operation(image, magnitude_bin=strength, num_magnitude_bins=11, fill_value=0, interp_type=types.INTERP_NN)
