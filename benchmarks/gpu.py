"""The first numbers of a machine with a GPU, by one command that ends within nine minutes.

    python benchmarks/gpu.py --output docs/gpu.json && python benchmarks/gpu_page.py
    python benchmarks/gpu.py --only "dino.* 224"                # some rows again
    python benchmarks/gpu.py --device cpu --quick              # tiny sizes: to see that all of it runs

The parts, in this order: ten epochs of CIFAR-10; training steps on our loader, on one resident batch (the floor) and on
torchvision's transforms in worker processes; the cost of each operator of the views. A row that fails states its
error and the others go on; rows that the time does not allow are listed. The JSON is written after each row.
"""

import argparse
import re
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import loader as loaders  # pyright: ignore[reportMissingImports]
import machine  # pyright: ignore[reportMissingImports]
import ours  # pyright: ignore[reportMissingImports]
import torch
from images import read_images, write_shards  # pyright: ignore[reportMissingImports]
from step import METHODS  # pyright: ignore[reportMissingImports]
from torch.utils.data import DataLoader, Dataset
from torch.utils.flop_counter import FlopCounterMode, conv_flop_count

from ssl_core.data.batch import Batch
from ssl_core.data.shards import Manifest
from ssl_core.data.views import POLICIES, Augmentation, View, Views
from ssl_core.files import read_json
from ssl_core.stages import pretrain

ARCHIVES = {32: "cifar10.tar.gz", 64: "tiny-imagenet-200-subset.tar.gz", 224: "imagenet-sample.tar"}
STEMS = {32: "small", 64: "tiny", 224: "imagenet"}
CARD_TFLOPS = {"H100": 989, "H200": 989, "A100": 312}  # dense bfloat16, of the vendor's data sheets
EPOCHS = 200  # of CIFAR-10, extrapolated
GOAL_SECONDS = (300, 228)
JITTER = POLICIES["contrastive"].model_copy(update={"flip": 0.0, "grayscale": 0.0, "blur": 0.0})
OPERATORS: dict[str, Augmentation] = {  # each on a random crop, whose cost is the first row's
    "random crop": Augmentation(flip=0.0),
    "flip": Augmentation(flip=0.5),
    "jitter": JITTER,
    "grayscale": Augmentation(flip=0.0, grayscale=0.2),
    "blur": Augmentation(flip=0.0, blur=0.5),
    "solarize": Augmentation(flip=0.0, solarize=0.2),
    "one operation of RandAugment": Augmentation(flip=0.0, randaugment=1),
    "contrastive": POLICIES["contrastive"],
}


class Sizes(NamedTuple):
    """How much is measured."""

    images: dict[int, int]  # by px
    batches: dict[int, int]
    cifar_epochs: int
    cifar_batch: int
    operator_batches: tuple[int, ...]
    warm_steps: int
    seconds: float  # per timed side
    workers: int
    matrix: int


FULL = Sizes(
    images={32: 50_000, 64: 10_000, 224: 4_000},
    batches={32: 512, 64: 256, 224: 128},
    cifar_epochs=10,
    cifar_batch=256,
    operator_batches=(256, 1024),
    warm_steps=6,
    seconds=3.0,
    workers=16,
    matrix=8192,
)
QUICK = Sizes(
    images={32: 8, 64: 8, 224: 4},
    batches={32: 4, 64: 2, 224: 2},
    cifar_epochs=1,
    cifar_batch=4,
    operator_batches=(4,),
    warm_steps=1,
    seconds=0.0,
    workers=1,
    matrix=256,
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="of the archives; else synthetic")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: to see that all of it runs")
    parser.add_argument("--only", default="", help="rows whose part or name matches this regular expression")
    parser.add_argument("--minutes", type=float, default=8.5, help="after which no row is started")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch finds no GPU: run on a machine with one, or add `--device cpu --quick`")
    end = time.monotonic() + 60 * arguments.minutes
    sizes = QUICK if arguments.quick else FULL
    about = {**machine.describe(), "device": arguments.device, "quick": arguments.quick}
    results: dict[str, Any] = {"card": measure_card(sizes, arguments.device), "left_out": []}
    print(results["card"])
    with tempfile.TemporaryDirectory(prefix="ssl-core-benchmark-") as folder:
        for part, name, measure in rows(Path(folder), sizes, arguments, results["card"]):
            if not re.search(arguments.only, f"{part}: {name}"):
                continue
            if time.monotonic() > end:
                results["left_out"].append(f"{part}: {name}")
                continue
            row = {"name": name, **attempt(measure, arguments.device)}
            results.setdefault(part, []).append(row)
            print(f"{part}: {row}", flush=True)
            machine.write(arguments.output, about, results)
    print(f"left out: {', '.join(results['left_out']) or 'nothing'}")
    machine.write(arguments.output, about, results)


Measure = Callable[[], dict[str, Any]]


def rows(
    folder: Path, sizes: Sizes, arguments: argparse.Namespace, card: dict[str, Any]
) -> Iterator[tuple[str, str, Measure]]:
    """Iterate over all rows: the part, the row's name, and the function that measures it."""
    device = arguments.device
    sets = {px: make_set(folder / str(px), px, sizes, arguments) for px in ARCHIVES}
    yield "cifar10", "ReSSL, ResNet-18", lambda: measure_cifar(folder / "32", sizes)
    for px, images in sets.items():
        for method in ("ressl", "dino"):
            for network in ("resnet18", "mobilenet_v2"):
                backbone = {"name": network, "stem": STEMS[px]}
                case = Case(METHODS[method], backbone, folder / str(px), images, px, sizes, device, card["tflops"])
                yield "training", f"{method}, {network}, {px} px", case.measure
    for batch_size in sizes.operator_batches:
        for name in OPERATORS:
            yield (
                "operators",
                f"{name}, batch {batch_size}",
                lambda name=name, batch_size=batch_size: measure_operator(
                    folder / "32", name, batch_size, sizes, device
                ),
            )
    if device == "cuda":
        backbone = {"name": "resnet18", "stem": "small"}
        case = Case(METHODS["ressl"], backbone, folder / "32", sets[32], 32, sizes, device, card["tflops"])
        yield "compiled", "ressl, resnet18, 32 px", case.measure_compiled


def attempt(measure: Measure, device: str) -> dict[str, Any]:
    """Return the measurement, or its error: on a first run other rows must go on."""
    start = time.monotonic()
    try:
        row = measure()
    except Exception as error:
        row = {"error": f"{type(error).__name__}: {error}"}
    if device == "cuda":
        torch.cuda.empty_cache()
    return {**row, "took": round(time.monotonic() - start, 1)}


def make_set(folder: Path, px: int, sizes: Sizes, arguments: argparse.Namespace) -> list[bytes]:
    """Write the shards of a data set, its images repeated up to the number, and return the encoded images."""
    count = sizes.images[px]
    images = read_images(arguments.data / ARCHIVES[px], count, px)
    images = (images * -(-count // len(images)))[:count]
    write_shards(folder / "shards", images, px)
    return images


def measure_card(sizes: Sizes, device: str) -> dict[str, Any]:
    """Return the name of the card, its bfloat16 rate by its data sheet, and that of a large product of matrices."""
    name = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    matrix = torch.randn(sizes.matrix, sizes.matrix, device=device, dtype=torch.bfloat16)
    seconds = 1 / per_second(lambda: matrix @ matrix, sizes, device)
    measured = 2e-12 * sizes.matrix**3 / seconds
    listed = next((rate for key, rate in CARD_TFLOPS.items() if key in name), None)
    return {"name": name, "product_tflops": measured, "tflops": listed or measured, "listed": listed is not None}


def per_second(work: Callable[[], Any], sizes: Sizes, device: str) -> float:
    """Return how often per second `work` runs, after untimed runs."""
    for _ in range(sizes.warm_steps):
        work()
    synchronise(device)
    start, times = time.perf_counter(), 0
    while not times or time.perf_counter() - start < sizes.seconds:
        work()
        times += 1
        if times % 8 == 0:  # else the queue of the card would hide the time
            synchronise(device)
    synchronise(device)
    return times / (time.perf_counter() - start)


def synchronise(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def measure_cifar(folder: Path, sizes: Sizes) -> dict[str, Any]:
    """Run the whole stage for a few epochs; the start counts once, each further epoch as the mean of these."""
    training = {"epochs": sizes.cifar_epochs, "batch_size": sizes.cifar_batch, "warmup_epochs": 0}
    backbone = {"name": "resnet18", "stem": "small"}
    method = with_queue({"name": "ressl", "queue_size": 4096}, sizes.images[32])
    spec = {"dataset": {"name": "benchmark"}, "backbone": backbone, "method": method, "training": training}
    start = time.monotonic()
    pretrain.run(
        "cifar10",
        spec=spec,
        code="",
        manifest=folder / "shards" / "manifest.json",
        output=folder / "results",
        checkpoint=folder / "checkpoint.pt",
        threads=torch.get_num_threads(),
    )
    total = time.monotonic() - start
    cost = read_json(folder / "results" / "pretrain.json")["cost"]
    epoch = cost["seconds"] / sizes.cifar_epochs
    return {
        "epochs": sizes.cifar_epochs,
        "seconds": total,
        "seconds_of_all_epochs": total + (EPOCHS - sizes.cifar_epochs) * epoch,
        "goals": GOAL_SECONDS,
        **cost,
    }


def convolution_backward(output: Any, images: Any, weight: Any, *rest: Any, **_: Any) -> int:
    """Count the operations of a convolution's backward pass; torch's own count ignores groups."""
    transposed, gradients = rest[4], rest[7]
    return sum(gradients[:2]) * conv_flop_count(images, weight, output, transposed)


FLOPS = {torch.ops.aten.convolution_backward: convolution_backward}


class Case(NamedTuple):
    """Training of a method with a network on images of one size."""

    method: dict[str, Any]
    backbone: dict[str, Any]
    folder: Path
    images: list[bytes]
    px: int
    sizes: Sizes
    device: str
    tflops: float

    def measure(self) -> dict[str, Any]:
        """Return images/s of the three sides, and wait, memory and arithmetic of ours."""
        batch_size = self.sizes.batches[self.px]
        if self.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        run = self._training()
        trainer, real = run.trainer, run.trainer.loader
        start = time.monotonic()
        row = {"batch_size": batch_size, "ours": batch_size * self._steps_per_second(run)}
        row["wait_share"] = run.waited / (time.monotonic() - start)
        if self.device == "cuda":
            free, total = torch.cuda.mem_get_info()
            row["torch_peak_mb"] = torch.cuda.max_memory_allocated() / 2**20
            row["card_used_mb"] = (total - free) / 2**20  # with DALI's pools
        trainer.loader = ours.Fixed(trainer._to_device(real.next()))
        row["floor"] = batch_size * self._steps_per_second(run)
        row["of_floor"] = row["ours"] / row["floor"]
        with FlopCounterMode(display=False, custom_mapping=FLOPS) as counter:
            run(1)
        row["gflop_per_image"] = 1e-9 * counter.get_total_flops() / batch_size
        row["share_of_card"] = row["gflop_per_image"] * row["ours"] / (1000 * self.tflops)
        trainer.loader = Torchvision(self.images, real.views, batch_size, self.sizes.workers)
        row["torchvision"] = batch_size * self._steps_per_second(run)
        real.close()
        return row

    def measure_compiled(self) -> dict[str, Any]:
        """Return images/s with `training.compile`."""
        return {"ours": self.sizes.batches[self.px] * self._steps_per_second(self._training(compile=True))}

    def _training(self, **changes: Any) -> Any:
        training = {"batch_size": self.sizes.batches[self.px], "learning_rate_scaling": "none", **changes}
        return ours.Training(
            with_queue(self.method, len(self.images)), self.backbone, self.folder, training, device=self.device
        )

    def _steps_per_second(self, run: Any) -> float:
        return per_second(lambda: run(1), self.sizes, self.device)


def with_queue(method: dict[str, Any], images: int) -> dict[str, Any]:
    """Limit a method's queue, if it has one, to a part of a small data set."""
    if "queue_size" not in method:
        return method
    return {**method, "queue_size": max(1, min(method["queue_size"], images // 8))}


class Encoded(Dataset[list[torch.Tensor]]):
    """torchvision's views of encoded images."""

    def __init__(self, images: list[bytes], views: Views) -> None:
        self.images = images
        self.transform = loaders.torchvision_views(views)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, number: int) -> list[torch.Tensor]:
        return [view[0] for view in self.transform([self.images[number]])]


class Torchvision:
    """The batches of a `DataLoader` with workers, in place of our loader."""

    def __init__(self, images: list[bytes], views: Views, batch_size: int, workers: int) -> None:
        self.views = views
        self.batches = self._endless(
            DataLoader(
                Encoded(images, views),
                batch_size=batch_size,
                shuffle=True,
                drop_last=True,
                num_workers=workers,
                persistent_workers=True,
                pin_memory=torch.cuda.is_available(),
            )
        )

    def next(self) -> Batch:
        tensors = iter(next(self.batches))
        views = {group: [next(tensors) for _ in range(view.count)] for group, view in self.views.items()}
        count = len(next(iter(views.values()))[0])
        return Batch(views, torch.zeros(count, dtype=torch.int64), torch.arange(count))

    @staticmethod
    def _endless(batches: DataLoader[Any]) -> Iterator[Any]:
        while True:
            yield from batches


def measure_operator(folder: Path, name: str, batch_size: int, sizes: Sizes, device: str) -> dict[str, Any]:
    """Return the milliseconds of a batch of views with one operator, decoding included."""
    manifest = Manifest.load(folder / "shards" / "manifest.json")
    views = {"view": View(size=32, augmentation=OPERATORS[name])}
    with loaders.make_loader(manifest, views, batch_size, torch.get_num_threads(), device) as loader:
        return {"milliseconds": 1000 / per_second(loader.next, sizes, device)}


if __name__ == "__main__":
    main()
