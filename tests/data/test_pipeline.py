"""The DALI graph against torchvision and PIL: fixed parameters, distributions, seeds, and the graph for GPUs."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from nvidia.dali import fn
from nvidia.dali.pipeline import pipeline_def
from PIL import Image, ImageEnhance, ImageOps
from torch import Tensor
from torchvision import transforms
from torchvision.transforms import InterpolationMode  # v2 would import torch's compiler, which takes seconds
from torchvision.transforms import functional as tv

from ssl_core.config import Dataset
from ssl_core.data import pipeline
from ssl_core.data.loader import Loader
from ssl_core.data.pipeline import Plan, apply_operation, blur_window, clsa_pool, draw_colours, draw_kernels
from ssl_core.data.shards import Manifest
from ssl_core.data.views import POLICIES, Augmentation, View, Views

from .conftest import encode

SEED = 3
DEVICE = "cpu"  # tests/gpu sets it


def render(manifest: Manifest, views: Views, seed: int = SEED, device: str | None = None) -> dict[str, list[Tensor]]:
    """Return each view of all images, in the images' order, as 0..255."""
    options: dict[str, Any] = {"batch_size": manifest.split("train").images, "shuffle": False}
    options["device"] = device or DEVICE
    black = {"mean": (0.0, 0.0, 0.0), "std": (1 / 255,) * 3}
    with Loader(manifest, Dataset(name="tiny"), views, seed=seed, **options, **black) as loader:
        batch = loader.next()
    order = batch.indices.argsort()
    return {group: [view[order].cpu() for view in of_group] for group, of_group in batch.views.items()}


def augment(manifest: Manifest, size: int = 32, **augmentation: Any) -> Tensor:
    """Return the images whole, under one augmentation; no flip unless asked for."""
    how = Augmentation.model_validate({"flip": 0.0, **augmentation})
    return render(manifest, {"view": View(size=size, crop="center", augmentation=how)})["view"][0]


def colours(manifest: Manifest, **augmentation: Any) -> np.ndarray:
    """Return the parameters that `augment` drew for the images, in the images' order, (4, images)."""
    plan = Plan(tars=(), indices=(), views={}, mean=(), std=(), seed=SEED, shuffle_buffer=0)
    how = Augmentation.model_validate(augmentation)
    drawn = draw_colours(how, plan.seed_of("view", 0, "colour"), 0, manifest.split("train").images)
    return drawn[:, np.argsort(read_order(manifest))]


def read_order(manifest: Manifest) -> list[int]:
    lines = [line for index in manifest.indices("train") for line in index.read_text().splitlines()[1:]]
    return [int(line.split()[3][:8]) for line in lines]


def stacked(pictures: list[Image.Image]) -> Tensor:
    return torch.stack([tv.pil_to_tensor(picture) for picture in pictures])


def difference(found: Tensor, expected: Tensor | list[Tensor]) -> float:
    if isinstance(expected, list):
        expected = torch.stack(expected)
    return (found - expected.float()).abs().mean().item()


@pytest.fixture(scope="module")
def images(pictures: list[Image.Image]) -> Tensor:
    return stacked(pictures)


def test_an_untouched_view_is_the_image(tiny: Manifest, images: Tensor) -> None:
    assert difference(augment(tiny), images) < 1e-3


def test_brightness_is_torchvisions(tiny: Manifest, images: Tensor) -> None:
    value = colours(tiny, jitter=1, brightness=0.6)[2]
    expected = [tv.adjust_brightness(image, float(v)) for image, v in zip(images, value)]
    assert difference(augment(tiny, jitter=1, brightness=0.6), expected) < 0.7  # torchvision truncates to integers


def test_contrast_is_about_the_grey_mean(tiny: Manifest, images: Tensor) -> None:
    factor = colours(tiny, jitter=1, contrast=0.6)[2]
    found = augment(tiny, jitter=1, contrast=0.6)
    expected = [tv.adjust_contrast(image, float(v)) for image, v in zip(images, factor)]
    assert difference(found, expected) < 0.9
    about_128 = (images.float() - 128) * torch.from_numpy(factor)[:, None, None, None] + 128
    assert difference(found, about_128.clamp(0, 255)) > 2  # what DALI does unless told otherwise


def test_saturation_is_torchvisions(tiny: Manifest, images: Tensor) -> None:
    factor = colours(tiny, jitter=1, saturation=0.6)[1]
    expected = [tv.adjust_saturation(image, float(v)) for image, v in zip(images, factor)]
    assert difference(augment(tiny, jitter=1, saturation=0.6), expected) < 0.9


def test_hue_turns_as_far_and_the_same_way_as_torchvisions(tiny: Manifest, images: Tensor) -> None:
    degrees = colours(tiny, jitter=1, hue=0.1)[0]
    found = augment(tiny, jitter=1, hue=0.1)
    assert np.abs(degrees).max() == pytest.approx(36, abs=3)
    same = [tv.adjust_hue(image, float(v) / 360) for image, v in zip(images, degrees)]
    opposite = [tv.adjust_hue(image, -float(v) / 360) for image, v in zip(images, degrees)]
    assert difference(found, same) < 12  # a turn in YIQ is not one in HSV
    assert difference(found, same) < 0.5 * difference(found, opposite)


def test_all_four_together_are_like_torchvision_in_any_order(tiny: Manifest, images: Tensor) -> None:
    how = {"jitter": 1, "brightness": 0.4, "contrast": 0.4, "saturation": 0.4}
    _, saturation, value, share = map(torch.from_numpy, colours(tiny, **how))
    brightness = value + share  # b = b c + b (1 - c)
    contrast = value / brightness

    def jitter(image: Tensor, number: int) -> Tensor:
        image = tv.adjust_contrast(image, contrast[number].item())
        image = tv.adjust_brightness(image, brightness[number].item())
        return tv.adjust_saturation(image, saturation[number].item())

    expected = [jitter(image, number) for number, image in enumerate(images)]
    assert difference(augment(tiny, **how), expected) < 4.0  # torchvision clamps on the way


def test_grayscale_is_torchvisions(tiny: Manifest, images: Tensor) -> None:
    expected = [tv.rgb_to_grayscale(image, num_output_channels=3) for image in images]
    assert difference(augment(tiny, grayscale=1), expected) < 0.7


def test_jitter_values_stay_pixel_values(tiny: Manifest) -> None:
    found = augment(tiny, jitter=1, brightness=1.5, contrast=1.5, saturation=1.5, hue=0.5)
    assert found.min() >= 0
    assert found.max() <= 255.001


@pytest.mark.parametrize(("size", "window", "tolerance"), [(32, 13, 0.3), (64, 13, 0.3), (96, 13, 0.3), (224, 23, 0.3)])
def test_blur_has_torchvisions_kernel(
    tmp_path: Path, make_shards: Callable[..., Manifest], size: int, window: int, tolerance: float
) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (2, size, size, 3), dtype=np.uint8)
    sharp = [Image.fromarray(image) for image in noise]
    manifest = make_shards(tmp_path, [encode(image) for image in sharp], [0, 0])
    found = augment(manifest, size, blur=1, blur_sigma=(1.7, 1.7))  # three sigma: 13 pixels
    expected = [tv.gaussian_blur(image, [window, window], [1.7, 1.7]) for image in stacked(sharp)]
    assert difference(found, expected) < tolerance


def test_blur_windows_are_a_tenth_of_the_side_and_hold_three_sigma() -> None:
    assert [blur_window(size, 2.0) for size in (16, 32, 64, 96, 128, 224)] == [13, 13, 13, 13, 13, 23]
    assert blur_window(32, 0.5) == 5
    assert blur_window(4, 2.0) == 7  # the reflected border of 4 pixels


def test_blur_spreads_a_point_as_far_as_its_sigma_at_32_pixels() -> None:
    """PIL's blur of radius r has the standard deviation r, which ReSSL's and MoCo's code use at 32 px too."""
    for sigma in (1.0, 1.5, 2.0):
        how = Augmentation(blur=1, blur_sigma=(sigma, sigma))
        row, _ = draw_kernels(how, blur_window(32, 2.0), 5, 0, 1)
        offsets = np.arange(row.size) - row.size // 2
        assert np.sqrt((row.ravel() * offsets**2).sum()) == pytest.approx(sigma, rel=0.04)


def test_blur_draws_its_sigma_evenly() -> None:
    kernels, _ = draw_kernels(Augmentation(blur=1), 3, 5, 0, 20_000)
    assert kernels.sum(axis=(1, 2)) == pytest.approx(1, abs=1e-5)
    ratio = kernels[:, 0, 1] / kernels[:, 0, 0]  # exp(1 / (2 sigma^2))
    sigma = (2 * np.log(ratio[np.isfinite(ratio)])) ** -0.5
    assert np.quantile(sigma, [0.25, 0.5, 0.75, 1]) == pytest.approx([0.575, 1.05, 1.525, 2.0], abs=0.04)


def test_solarize_inverts_from_128_on(tiny: Manifest, images: Tensor) -> None:
    assert difference(augment(tiny, solarize=1), tv.solarize(images, 128)) < 1e-3


def test_flip_mirrors_left_and_right(tiny: Manifest, images: Tensor) -> None:
    assert difference(augment(tiny, flip=1), images.flip(-1)) < 1e-3


@pytest.mark.parametrize("interpolation", ["linear", "cubic"])
def test_a_center_crop_is_torchvisions(
    tmp_path: Path, make_shards: Callable[..., Manifest], interpolation: Any
) -> None:
    # Width and height; where the margins are odd, torchvision and DALI may differ by one pixel in where they cut.
    sides = [(64, 48), (40, 49), (30, 30), (70, 45)]
    shaped = [_smooth(width, height) for width, height in sides]
    manifest = make_shards(tmp_path, [encode(image) for image in shaped], [0] * 4)
    view = View(size=32, crop="center", resize=36, interpolation=interpolation, augmentation=POLICIES["none"])
    found = render(manifest, {"view": view})["view"][0]
    mode = {"linear": InterpolationMode.BILINEAR, "cubic": InterpolationMode.BICUBIC}[interpolation]
    transform: Any = transforms.Compose(
        [transforms.Resize(36, mode), transforms.CenterCrop(32), transforms.PILToTensor()]
    )
    for number, image in enumerate(shaped):
        assert difference(found[number], transform(image)) < 1.0, sides[number]


def center_cropped(image: np.ndarray, interpolation: Any) -> list[np.ndarray]:
    """Return the center crop of an image, the same without a region, and the sides of the region."""
    view = View(size=32, crop="center", resize=36, interpolation=interpolation)
    graph: Any = pipeline_def

    @graph(batch_size=1, num_threads=1, device_id=None, prefetch_queue_depth=1)
    def both() -> Any:
        picture: Any = fn.external_source(source=lambda: [image], layout="HWC")
        whole: Any = fn.resize(picture, resize_shorter=36, interp_type=pipeline.INTERPOLATION[interpolation])
        start, end = pipeline._middle(picture)
        return pipeline._crop(picture, view, 0), fn.crop(whole, crop=(32, 32)), end - start

    return [np.array(output.at(0)) for output in both().run()]


@pytest.mark.parametrize("interpolation", ["linear", "cubic"])
@pytest.mark.parametrize(("width", "height"), [(64, 48), (333, 127), (7, 9), (10, 80), (999, 125)])
def test_images_that_are_not_narrow_are_cropped_as_without_a_region(
    width: int, height: int, interpolation: Any
) -> None:
    with_region, without, sides = center_cropped(np.asarray(_smooth(width, height)), interpolation)
    np.testing.assert_array_equal(with_region, without)
    assert sides.tolist() == [height, width]


@pytest.mark.parametrize(("width", "height"), [(6000, 20), (9, 3001)])
def test_only_the_middle_of_a_strip_is_enlarged(width: int, height: int) -> None:
    strip = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    strip[:, :, 0] = np.linspace(0, 255, max(width, height)).reshape((1, -1) if width > height else (-1, 1))
    with_region, without, sides = center_cropped(strip, "linear")
    assert sorted(sides.tolist()) == [min(width, height), 8 * min(width, height)]
    assert np.abs(with_region.astype(int) - without).mean() < 3  # they begin at other fractions of a pixel


def test_random_crops_have_torchvisions_areas_and_ratios(tmp_path: Path, make_shards: Callable[..., Manifest]) -> None:
    count, side = 1000, 128
    ramp = np.arange(side, dtype=np.uint8) * 2
    coordinates = np.stack([np.tile(ramp, (side, 1)), np.tile(ramp[:, None], (1, side)), np.zeros((side, side))], -1)
    encoded = encode(Image.fromarray(coordinates.astype(np.uint8)))
    manifest = make_shards(tmp_path, [encoded] * count, [0] * count, per_shard=count)
    found = render(manifest, {"view": View(size=64, area=(0.2, 0.8), augmentation=POLICIES["none"])})["view"][0]
    # Red is twice the column, green twice the row: their steps say how wide and high a crop was.
    width = (found[:, 0, 32, 48] - found[:, 0, 32, 16]) / 2 * 64 / 32
    height = (found[:, 1, 48, 32] - found[:, 1, 16, 32]) / 2 * 64 / 32
    image = torch.zeros(3, side, side)
    draw = functools.partial(transforms.RandomResizedCrop.get_params, scale=[0.2, 0.8], ratio=[3 / 4, 4 / 3])
    boxes = [draw(image) for _ in range(count)]
    expected = torch.tensor([[width, height] for _, _, height, width in boxes]).float().T
    limit = 1.63 * (2 / count) ** 0.5  # Kolmogorov-Smirnov at 1 %
    assert _distance(width * height, expected[0] * expected[1]) < limit
    assert _distance(width / height, expected[0] / expected[1]) < limit
    assert _distance(found[:, 0, 32, 32] / 2 - width / 2, _offsets(expected[0], side)) < 1.5 * limit


def test_a_region_is_all_that_a_crop_sees(tiny: Manifest, pictures: list[Image.Image]) -> None:
    whole = {"area": (1.0, 1.0), "ratio": (1.0, 1.0), "augmentation": Augmentation(flip=0.0)}  # pixels as they are
    corners = {"top_right": (0.5, 0.0, 1.0, 0.5), "bottom_left": (0.0, 0.25, 0.75, 1.0)}
    views = {
        name: View(size=round(32 * (region[2] - region[0])), region=region, **whole) for name, region in corners.items()
    }
    found, images = render(tiny, views), stacked(pictures)
    assert difference(found["top_right"][0], images[:, :, :16, 16:]) < 0.01
    assert difference(found["bottom_left"][0], images[:, :, 8:, :24]) < 0.01


def test_jitter_draws_torchvisions_factors() -> None:
    how = Augmentation(jitter=0.8, brightness=0.4, saturation=1.5, hue=0.1, grayscale=0.2)
    hue, saturation, brightness, share = draw_colours(how, 5, 0, 20_000)
    assert np.all(share == brightness * 0)  # contrast was not asked for
    jittered = brightness != 1
    assert jittered.mean() == pytest.approx(0.8, abs=0.01)
    assert np.all((hue != 0) == jittered)  # one coin for all four, as in RandomApply([ColorJitter])
    for drawn, low, high in ((brightness, 0.6, 1.4), (hue, -36, 36)):
        quantiles = np.quantile(drawn[jittered], [0, 0.25, 0.5, 0.75, 1])
        assert quantiles == pytest.approx(np.linspace(low, high, 5), abs=0.02 * (high - low))
    assert (saturation == 0).mean() == pytest.approx(0.2, abs=0.01)  # grayscale, with a coin of its own
    assert (saturation == 0)[~jittered].mean() == pytest.approx(0.2, abs=0.02)
    assert saturation.max() == pytest.approx(2.5, abs=0.01)  # from max(0, 1 - 1.5)


def test_jittered_images_are_distributed_like_torchvisions(tiny: Manifest, pictures: list[Image.Image]) -> None:
    how = {"jitter": 0.8, "brightness": 0.4, "contrast": 0.4, "saturation": 0.4, "hue": 0.1, "grayscale": 0.2}
    view = View(count=4, size=32, crop="center", augmentation=Augmentation.model_validate({"flip": 0.0, **how}))
    found = torch.cat([_moments(images) for images in render(tiny, {"view": view})["view"]])
    transform: Any = transforms.Compose(
        [
            transforms.RandomApply([transforms.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8),
            transforms.RandomGrayscale(0.2),
            transforms.PILToTensor(),
        ]
    )
    torch.manual_seed(0)
    expected = torch.cat([_moments(torch.stack([transform(image) for image in pictures]).float()) for _ in range(4)])
    # Mean brightness, contrast and colourfulness of images: their averages over the set agree within sampling error.
    error = (found.std(0) ** 2 / len(found) + expected.std(0) ** 2 / len(expected)).sqrt()
    assert ((found.mean(0) - expected.mean(0)).abs() < 4 * error).all()


@pytest.mark.parametrize("operation", ["flip", "grayscale", "blur", "solarize"])
def test_probabilities_are_honoured(tiny: Manifest, images: Tensor, operation: str) -> None:
    options = {"blur_sigma": (2.0, 2.0)} if operation == "blur" else {}
    how = Augmentation.model_validate({"flip": 0.0, operation: 0.3, **options})
    view = View(count=10, size=32, crop="center", augmentation=how)
    found = torch.stack(render(tiny, {"view": view})["view"])
    changed = (found - images).abs().mean(dim=(2, 3, 4)) > 0.02
    assert changed.float().mean().item() == pytest.approx(0.3, abs=4 * (0.21 / changed.numel()) ** 0.5)


def test_views_of_a_group_differ_and_another_view_changes_none(tiny: Manifest) -> None:
    strong = View(count=2, size=24, augmentation=POLICIES["contrastive"])
    alone = render(tiny, {"student": strong})
    assert difference(alone["student"][0], alone["student"][1]) > 10
    more = render(tiny, {"first": View(size=16, augmentation=POLICIES["byol_second"]), "student": strong})
    assert torch.equal(alone["student"][0], more["student"][0])
    assert torch.equal(alone["student"][1], more["student"][1])
    three = render(tiny, {"student": strong.model_copy(update={"count": 3})})
    assert torch.equal(alone["student"][1], three["student"][1])
    assert difference(alone["student"][0], render(tiny, {"student": strong}, seed=SEED + 1)["student"][0]) > 10


def test_randaugment_applies_each_of_its_operations_half_the_time(tiny: Manifest, images: Tensor) -> None:
    how = Augmentation(flip=0.0, randaugment=1)
    found = torch.stack(render(tiny, {"view": View(count=8, size=32, crop="center", augmentation=how)})["view"])
    untouched = ((found - images).abs().mean(dim=(2, 3, 4)) < 1e-3).float().mean().item()
    # One of 14 is the identity, and autocontrast and others leave some images as they are.
    assert 0.5 < untouched < 0.66
    five = torch.stack(
        render(
            tiny, {"view": View(count=2, size=32, crop="center", augmentation=Augmentation(flip=0.0, randaugment=5))}
        )["view"]
    )
    assert ((five - images).abs().mean(dim=(2, 3, 4)) < 1e-3).float().mean().item() < 0.15


def _clsa_references(image: Image.Image, magnitude: int, sign: int) -> list[Image.Image]:
    """Apply FixMatch's fourteen operations (kekmodel's PIL code, which CLSA took) at a magnitude from 0 to 10."""
    side = image.width
    factor, shear, shift = 0.05 + 0.09 * magnitude, sign * 0.03 * magnitude, sign * int(0.03 * magnitude * side)

    def affine(*matrix: float) -> Image.Image:
        return image.transform(image.size, Image.Transform.AFFINE, matrix)

    return [
        ImageOps.autocontrast(image),
        ImageEnhance.Brightness(image).enhance(factor),
        ImageEnhance.Color(image).enhance(factor),
        ImageEnhance.Contrast(image).enhance(factor),
        _equalized(image),
        image,
        ImageOps.posterize(image, int(0.4 * magnitude) + 4),
        image.rotate(sign * 3 * magnitude),
        ImageEnhance.Sharpness(image).enhance(factor),
        affine(1, shear, 0, 0, 1, 0),
        affine(1, 0, 0, shear, 1, 0),
        ImageOps.solarize(image, 256 - int(25.6 * magnitude)),
        affine(1, 0, -shift, 0, 1, 0),
        affine(1, 0, 0, 0, 1, -shift),
    ]


def _equalized(image: Image.Image) -> Image.Image:
    """Equalize each channel exactly, as OpenCV and DALI do; PIL's integer step is up to a third off at 32 px."""
    channels = []
    for channel in np.moveaxis(np.asarray(image), -1, 0):
        below = np.bincount(channel.ravel(), minlength=256).cumsum()
        lowest = below[channel.min()]
        channels.append(np.round((below[channel] - lowest) * 255 / (channel.size - lowest)))
    return Image.fromarray(np.stack(channels, -1).astype(np.uint8))


def test_randaugments_operations_are_fixmatchs(pictures: list[Image.Image]) -> None:
    magnitude, chosen, pool = 5, pictures[:6], clsa_pool(32)
    batch = np.stack([np.asarray(image) for image in chosen])

    @pipeline_def(enable_conditionals=True)
    def every_operation(sign: int) -> tuple[Any, ...]:
        image: Any = fn.external_source(source=lambda: batch, batch=True, layout="HWC")
        image = image.gpu() if DEVICE == "cuda" else image
        negative: Any = fn.random.coin_flip(probability=float(sign < 0), seed=1)
        strength = pipeline.signed_bin(magnitude, negative)
        return tuple(apply_operation(operation, image, strength) for operation in pool)

    device_id = 0 if DEVICE == "cuda" else None
    for sign in (1, -1):
        graph = every_operation(sign, batch_size=len(chosen), num_threads=1, device_id=device_id)  # pyright: ignore[reportCallIssue]
        graph.build()
        found = [torch.from_dlpack(output.as_tensor()).cpu().permute(0, 3, 1, 2) for output in graph.run()]
        references = [_clsa_references(image, magnitude, sign) for image in chosen]
        mirrored = [_clsa_references(image, magnitude, -sign) for image in chosen]
        for index, operation in enumerate(pool):
            expected = [tv.pil_to_tensor(reference[index]) for reference in references]
            # A geometric operation's sign is drawn with equal odds, so which way is plus does not matter.
            other = [tv.pil_to_tensor(reference[index]) for reference in mirrored]
            error = min(difference(found[index], expected), difference(found[index], other))
            assert error < 0.6, f"{operation.name}: {error:.2f}"  # torchvision truncates, DALI rounds


@pytest.mark.parametrize("policy", ["none", "byol_second", "strong"])
def test_the_graph_for_gpus_can_be_made_without_one(policy: str) -> None:
    views = {"a": View(size=32, augmentation=POLICIES[policy]), "b": View(size=32, crop="center", resize=36)}
    plan = Plan(
        tars=("x.tar",), indices=("x.idx",), views=views, mean=(0.5,) * 3, std=(0.2,) * 3, seed=0, shuffle_buffer=9,
        gpu=True,
    )  # fmt: skip
    blob = pipeline.serialize(plan, batch_size=4)
    assert b"mixed" in blob
    assert b"gpu" in blob
    assert b"test_pipeline" not in blob  # no stack traces, or line numbers would decide whether a state fits


def test_pictures_turned_by_exif_and_grey_ones_are_read_as_seen(
    tmp_path: Path, make_shards: Callable[..., Manifest], pictures: list[Image.Image]
) -> None:
    picture = pictures[0].resize((64, 64))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned by 90 degrees
    turned = encode(picture, "JPEG", quality=95, exif=exif)
    grey = encode(picture.convert("L"), "JPEG", quality=95)
    manifest = make_shards(tmp_path, [turned, grey], [0, 0])
    found = augment(manifest, 64)
    assert difference(found[0], tv.pil_to_tensor(picture.rotate(-90))) < 5
    assert difference(found[1], tv.rgb_to_grayscale(tv.pil_to_tensor(picture), 3)) < 5


def _smooth(width: int, height: int) -> Image.Image:
    noise = np.random.default_rng(width * height).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)


def _moments(images: Tensor) -> Tensor:
    """Return brightness, contrast and colourfulness of each image."""
    grey = images.mean(dim=1)
    return torch.stack([grey.mean(dim=(1, 2)), grey.std(dim=(1, 2)), images.std(dim=1).mean(dim=(1, 2))], dim=1)


def _distance(first: Tensor, second: Tensor) -> float:
    """Return the Kolmogorov-Smirnov distance of two samples."""
    points = torch.cat([first, second]).sort().values
    shares = [torch.searchsorted(sample.sort().values, points, right=True) / len(sample) for sample in (first, second)]
    return (shares[0] - shares[1]).abs().max().item()


def _offsets(widths: Tensor, side: int) -> Tensor:
    torch.manual_seed(0)
    return torch.rand(len(widths)) * (side - widths)
