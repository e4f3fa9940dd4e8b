"""Cost of the views: DALI against torchvision v2 and lightly on PIL images, samples/s, and the share of a step.

The unit is CPU microseconds per sample (getrusage), which a busy machine distorts less than wall-clock. The peers run
under their best conditions: bytes in memory, one thread, no worker processes. Repeats alternate; ratios are medians.
Samples/s are wall-clock with all threads and nothing else running; the share is that of a ResNet-18 step.

    python benchmarks/loader.py --output loader.json
"""

import argparse
import io
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import machine  # pyright: ignore[reportMissingImports]
import numpy as np
import torch
from images import MEAN, STD, read_images, write_shards  # pyright: ignore[reportMissingImports]
from PIL import Image
from torch import nn
from torchvision.models import resnet18
from torchvision.transforms import v2

from ssl_core.config import Dataset
from ssl_core.data.loader import Loader
from ssl_core.data.pipeline import blur_window
from ssl_core.data.shards import Manifest
from ssl_core.data.views import POLICIES, View, Views


class Size(NamedTuple):
    """Images of one size, and the goals for a weak and a strong view: ratio to torchvision, samples/s."""

    px: int
    archive: str
    images: int  # a multiple of the batch, since DALI also makes the dropped samples of an epoch; samples per repeat
    batch_size: int
    local_px: int
    ratio: float
    samples_per_second: int


SIZES = [
    Size(32, "cifar10.tar.gz", 4096, 256, 16, 8.0, 15_000),
    Size(64, "tiny-imagenet-200-subset.tar.gz", 2048, 128, 32, 4.0, 5_000),
    Size(224, "imagenet-sample.tar", 240, 24, 96, 2.5, 350),
]
KINDS = ("one", "weak + strong", "2 + 6")  # 2 + 6: DINO's


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--data", type=Path, default=Path("../shared/data"), help="of the archives; else synthetic images"
    )
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2, help="of the training step, and of the loader alone")
    parser.add_argument("--sizes", type=int, nargs="+", default=[32, 64, 224])
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    about = machine.describe()
    results: dict[str, Any] = {"views": []}
    print(f"CPU us a sample, median of {arguments.repeats} alternating repeats; ratios: peer / DALI; samples a second")
    heading = f"{'px':>5}  {'views':<14}{'DALI':>8}{'torchvision':>13}{'lightly':>10}"
    print(f"{heading}{'ratio':>8}{'ratio':>8}{'samples/s':>11}")
    with tempfile.TemporaryDirectory(prefix="ssl-core-benchmark-") as folder:
        for size in SIZES:
            if size.px in arguments.sizes:
                images = read_images(arguments.data / size.archive, size.images, size.px)
                manifest = write_shards(Path(folder) / str(size.px), images, size.px)
                for kind in KINDS:
                    row = compare(manifest, images, size, kind, arguments)
                    results["views"].append(row)
                    print(line(row), flush=True)
        manifest = write_shards(Path(folder) / "step", read_images(arguments.data / SIZES[0].archive, 4000, 32), 32)
        results["step"] = step_share(manifest, arguments.repeats, arguments.threads)
    step = results["step"]
    print(
        f"ResNet-18, small stem, 32 px, batch 64: {step['step']:.0f} CPU us a sample, loader {step['loader']:.0f} = "
        f"{step['share_percent']:.2f} % (goal 2 %); waiting for data {step['wait_percent']:.2f} % of the wall-clock"
    )
    machine.write(arguments.output, about, results)


def make_views(size: Size, kind: str) -> Views:
    """Return the views of a kind that lightly has too."""
    strong = View(size=size.px, augmentation=POLICIES["contrastive"])
    if kind == "one":
        return {"student": strong}
    if kind == "weak + strong":
        return {"student": strong, "teacher": View(size=size.px, augmentation=POLICIES["weak"])}
    large, small = {"size": size.px, "area": (0.4, 1.0)}, {"size": size.local_px, "area": (0.05, 0.4)}
    return {
        "first": View(**large, augmentation=POLICIES["dino_global_first"]),
        "second": View(**large, augmentation=POLICIES["dino_global_second"]),
        "local": View(**small, count=6, augmentation=POLICIES["dino_local"]),
    }


def compare(
    manifest: Manifest, images: list[bytes], size: Size, kind: str, arguments: argparse.Namespace
) -> dict[str, Any]:
    """Measure all sides in turn; return the medians of their costs and of their ratios."""
    views = make_views(size, kind)
    peers = {"torchvision": torchvision_views(views), "lightly": lightly_views(kind, size)}
    costs: dict[str, list[float]] = {side: [] for side in ("dali", *peers)}
    few = min(size.images, 480)  # photographs differ in size, so all sides use all of them
    with make_loader(manifest, views, size.batch_size) as loader:
        cpu_microseconds(loader.next, 4)  # fills the shuffle buffer and the queue
        for repeat in range(arguments.repeats):
            batches = size.images // size.batch_size
            costs["dali"].append(cpu_microseconds(loader.next, batches) / size.batch_size)
            start = np.random.default_rng(repeat).integers(len(images))
            chosen = [images[(start + k) % len(images)] for k in range(few)]
            for side, transform in peers.items():
                costs[side].append(cpu_microseconds(partial(transform, chosen), 1) / few)
    ratios = {
        f"{side}_ratio": statistics.median(cost / own for own, cost in zip(costs["dali"], costs[side], strict=True))
        for side in peers
    }
    return {
        "px": size.px,
        "views": kind,
        **{side: statistics.median(values) for side, values in costs.items()},
        **ratios,
        "samples_per_second": throughput(manifest, views, size, arguments),
        **({"ratio_goal": size.ratio, "samples_goal": size.samples_per_second} if kind == "weak + strong" else {}),
    }


def line(row: dict[str, Any]) -> str:
    goals = f"   goals {row['ratio_goal']:g}, {row['samples_goal']:,}" if "ratio_goal" in row else ""
    return (
        f"{row['px']:>5}  {row['views']:<14}{row['dali']:>8.0f}{row['torchvision']:>13.0f}{row['lightly']:>10.0f}"
        f"{row['torchvision_ratio']:>8.1f}{row['lightly_ratio']:>8.1f}{row['samples_per_second']:>11,.0f}{goals}"
    )


def make_loader(manifest: Manifest, views: Views, batch_size: int, threads: int = 1, device: str = "cpu") -> Loader:
    dataset = Dataset(name="benchmark")
    return Loader(manifest, dataset, views, batch_size=batch_size, seed=0, threads=threads, device=device)


def throughput(manifest: Manifest, views: Views, size: Size, arguments: argparse.Namespace) -> float:
    """Return samples/s of the loader alone in wall-clock time: median of the repeats."""
    found = []
    with make_loader(manifest, views, size.batch_size, arguments.threads) as loader:
        batches = 2 * size.images // size.batch_size
        for _ in range(1 + arguments.repeats):  # the first only fills the queue
            start = time.perf_counter()
            for _ in range(batches):
                loader.next()
            found.append(batches * size.batch_size / (time.perf_counter() - start))
    return statistics.median(found[1:])


def torchvision_views(views: Views) -> Callable[[list[bytes]], list[torch.Tensor]]:
    """Return a function that decodes images with PIL and stacks torchvision's views."""
    transforms = [torchvision_transform(view) for view in views.values() for _ in range(view.count)]
    return lambda encoded: stacked([[transform(image) for transform in transforms] for image in decoded(encoded)])


def torchvision_transform(view: View) -> v2.Compose:
    how = view.augmentation
    operators: list[Any] = [v2.RandomResizedCrop(view.size, scale=view.area)]
    if how.jitter:
        jitter = v2.ColorJitter(how.brightness, how.contrast, how.saturation, how.hue)
        operators += [v2.RandomApply([jitter], p=how.jitter), v2.RandomGrayscale(how.grayscale)]
    if how.blur:
        window = blur_window(view.size, how.blur_sigma[1])
        operators.append(v2.RandomApply([v2.GaussianBlur(window, sigma=how.blur_sigma)], p=how.blur))
    if how.solarize:
        operators.append(v2.RandomSolarize(128, p=how.solarize))
    operators += [v2.RandomHorizontalFlip(), v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True)]
    return v2.Compose([*operators, v2.Normalize(MEAN, STD)])


def lightly_views(kind: str, size: Size) -> Callable[[list[bytes]], list[torch.Tensor]]:
    """Return a function that decodes images with PIL and stacks lightly's views."""
    import peers  # pyright: ignore[reportMissingImports]

    transform = peers.views(kind, size.px, size.local_px)
    return lambda encoded: stacked([transform(image) for image in decoded(encoded)])


def decoded(encoded: list[bytes]) -> list[Image.Image]:
    return [Image.open(io.BytesIO(image)).convert("RGB") for image in encoded]


def stacked(samples: list[list[torch.Tensor]]) -> list[torch.Tensor]:
    return [torch.stack(view) for view in zip(*samples, strict=True)]


def step_share(manifest: Manifest, repeats: int, threads: int) -> dict[str, float]:
    """Measure a training step on one view per sample while the loader makes two, and the loader's share of it."""
    torch.set_num_threads(threads)
    batch_size, steps = 64, 2
    network = resnet18(num_classes=128)
    network.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    network.maxpool = nn.MaxPool2d(1)  # no pooling
    network = network.to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9)

    def train(images: torch.Tensor) -> None:
        network(images).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    rows: list[tuple[float, float]] = []
    with make_loader(manifest, make_views(SIZES[0], "weak + strong"), batch_size) as loader:
        images = loader.next().views["student"][0]
        cpu_microseconds(lambda: train(images), 1)
        for _ in range(repeats):
            step = cpu_microseconds(lambda: train(images), steps) / batch_size
            rows.append((step, cpu_microseconds(loader.next, 40) / batch_size))
        wait = waiting_share(loader, train, steps * repeats)
    step, own = (statistics.median(column) for column in zip(*rows, strict=True))
    return {
        "step": step,
        "loader": own,
        "share_percent": 100 * own / step,
        "wait_percent": 100 * wait,
        "threads": threads,
    }


def waiting_share(loader: Loader, train: Callable[[torch.Tensor], None], steps: int) -> float:
    """Return the share of a training loop's wall-clock in which it waits for the loader."""
    waited = total = 0.0
    for _ in range(steps):
        start = time.perf_counter()
        batch = loader.next()
        waited += time.perf_counter() - start
        train(batch.views["student"][0])
        total += time.perf_counter() - start
    return waited / total


def cpu_microseconds(work: Callable[[], Any], times: int) -> float:
    """Return the CPU time of one call over all threads, including DALI's work ahead."""
    start = cpu_seconds()
    for _ in range(times):
        work()
    while True:
        before = cpu_seconds()
        time.sleep(0.05)
        if cpu_seconds() - before < 0.002:
            return 1e6 * (cpu_seconds() - start) / times


def cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


if __name__ == "__main__":
    main()
