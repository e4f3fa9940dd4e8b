"""What views cost: DALI against torchvision v2 on PIL images, and the loader's share of a ResNet-18 training step.

The unit is CPU microseconds a sample (getrusage), which a busy machine distorts less than wall-clock. torchvision is
timed at its best: bytes in memory, one thread, no worker processes. Repeats alternate, ratios are medians over them.

    python benchmarks/loader.py --output loader.json
"""

import argparse
import io
import json
import resource
import statistics
import tarfile
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn
from torchvision.models import resnet18
from torchvision.transforms import InterpolationMode, v2

from ssl_core.config import Dataset
from ssl_core.data.loader import Loader
from ssl_core.data.shards import Manifest, Split, new_shard
from ssl_core.data.views import POLICIES, View, Views
from ssl_core.files import write_text

# Side in px, archive, how many of its images (whole batches, else DALI also makes what an epoch drops), DALI's batch,
# samples a repeat, and how many times cheaper it has to be.
SIZES = [
    (32, "cifar10.tar.gz", 4096, 256, 4096, 8.0),
    (64, "tiny-imagenet-200-subset.tar.gz", 2048, 128, 2048, 4.0),
    (224, "imagenet-sample.tar", 240, 24, 240, 2.5),
]
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--data", type=Path, default=Path("../shared/data"), help="of the archives; else synthetic images"
    )
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2, help="of the training step")
    parser.add_argument("--sizes", type=int, nargs="+", default=[32, 64, 224])
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    results: dict[str, Any] = {"views": {}}
    print(f"weak + strong view, CPU us a sample, median of {arguments.repeats} alternating repeats")
    print(f"{'px':>5} {'DALI':>8} {'torchvision':>12} {'ratio':>7} {'goal':>6}")
    with tempfile.TemporaryDirectory(prefix="ssl-core-benchmark-") as folder:
        for size, archive, count, batch_size, samples, goal in SIZES:
            if size in arguments.sizes:
                images = read_images(arguments.data / archive, count, size)
                manifest = write_shards(Path(folder) / str(size), images, size)
                row = compare(manifest, images, size, batch_size, samples, arguments.repeats)
                results["views"][str(size)] = {**row, "goal": goal}
                print(f"{size:>5} {row['dali']:>8.0f} {row['torchvision']:>12.0f} {row['ratio']:>7.1f} {goal:>6.1f}")
        manifest = write_shards(Path(folder) / "step", read_images(arguments.data / SIZES[0][1], 4000, 32), 32)
        results["step"] = step_share(manifest, arguments.repeats, arguments.threads)
    step = results["step"]
    print(
        f"ResNet-18, small stem, 32 px, batch 64: {step['step']:.0f} CPU us a sample, loader {step['loader']:.0f} = "
        f"{step['share_percent']:.2f} % (goal 2 %); waiting for data {step['wait_percent']:.2f} % of the wall-clock"
    )
    if arguments.output:
        write_text(arguments.output, json.dumps(results, indent=2) + "\n")


def read_images(archive: Path, count: int, size: int) -> list[bytes]:
    """Return `count` encoded images of an archive, or synthetic ones if there is none."""
    if not archive.exists():
        return synthetic_images(count, size)
    images: list[bytes] = []
    with tarfile.open(archive) as tar:
        for member in tar:
            file = tar.extractfile(member) if member.name.lower().endswith((".jpg", ".jpeg")) else None
            if file is not None:
                images.append(file.read())
            if len(images) == count:
                break
    return images


def synthetic_images(count: int, size: int) -> list[bytes]:
    """Return `count` JPEGs of smooth noise; where photographs would be used they have a photograph's size."""
    width, height = (500, 375) if size == 224 else (size, size)
    generator = np.random.default_rng(0)
    images = []
    for _ in range(count):
        noise = Image.fromarray(generator.integers(0, 256, (12, 16, 3), dtype=np.uint8))
        file = io.BytesIO()
        noise.resize((width, height), Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
        images.append(file.getvalue())
    return images


def write_shards(folder: Path, images: list[bytes], size: int) -> Manifest:
    """Write one shard and return its manifest."""
    path = folder / "train-000000.tar"
    path.parent.mkdir(parents=True)
    with new_shard(path) as writer:
        for number, image in enumerate(images):
            writer.add(number, "jpg", image, -1)
        shard = writer.close().model_copy(update={"file": path.name})
    split = Split(
        images=len(images), labelled=False, bytes=shard.bytes, class_counts=None, shards=(shard,), rejected=()
    )
    manifest = Manifest(
        dataset="benchmark", image_size=size, mean=MEAN, std=STD, classes=None, avoid=(), splits={"train": split}
    )
    write_text(folder / "manifest.json", manifest.model_dump_json())
    return Manifest.load(folder / "manifest.json")


def make_views(size: int) -> Views:
    return {
        "student": View(size=size, augmentation=POLICIES["contrastive"]),
        "teacher": View(size=size, augmentation=POLICIES["weak"]),
    }


def compare(
    manifest: Manifest, images: list[bytes], size: int, batch_size: int, samples: int, repeats: int
) -> dict[str, float]:
    """Measure both sides in turn; return the medians of their costs and of their ratio."""
    costs: list[tuple[float, float]] = []
    transform = torchvision_views(size)
    few = min(samples, 480)  # photographs differ in size, so both sides see them all
    with make_loader(manifest, size, batch_size) as loader:
        cpu_microseconds(loader.next, 4)  # fills the shuffle buffer and the queue
        for _ in range(repeats):
            dali = cpu_microseconds(loader.next, samples // batch_size) / batch_size
            start = np.random.default_rng(len(costs)).integers(len(images))
            chosen = [images[(start + k) % len(images)] for k in range(few)]
            torchvision = cpu_microseconds(lambda chosen=chosen: transform(chosen), 1) / few
            costs.append((dali, torchvision))
    dali, torchvision = (statistics.median(column) for column in zip(*costs, strict=True))
    return {"dali": dali, "torchvision": torchvision, "ratio": statistics.median(tv / own for own, tv in costs)}


def make_loader(manifest: Manifest, size: int, batch_size: int) -> Loader:
    return Loader(manifest, Dataset(name="benchmark"), make_views(size), batch_size=batch_size, seed=0)


def torchvision_views(size: int) -> Callable[[list[bytes]], tuple[torch.Tensor, torch.Tensor]]:
    """Return what decodes images with PIL and stacks their two views, with torchvision's own operators."""
    window = {32: 3, 64: 7, 224: 23}[size]
    crop = v2.RandomResizedCrop(size, scale=(0.2, 1.0), interpolation=InterpolationMode.BILINEAR)
    end = [v2.RandomHorizontalFlip(), v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)]
    colour = [
        v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8),
        v2.RandomGrayscale(p=0.2),
        v2.RandomApply([v2.GaussianBlur(window, sigma=(0.1, 2.0))], p=0.5),
    ]
    strong, weak = v2.Compose([crop, *colour, *end]), v2.Compose([crop, *end])

    def views(encoded: list[bytes]) -> tuple[torch.Tensor, torch.Tensor]:
        decoded = [Image.open(io.BytesIO(image)).convert("RGB") for image in encoded]
        return torch.stack([strong(image) for image in decoded]), torch.stack([weak(image) for image in decoded])

    return views


def step_share(manifest: Manifest, repeats: int, threads: int) -> dict[str, float]:
    """Measure a training step on one view a sample while the loader makes two, and what of it is the loader's."""
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
    with make_loader(manifest, 32, batch_size) as loader:
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
    """Return the process's CPU time of one call, all threads together, with what DALI then still does ahead of need."""
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
