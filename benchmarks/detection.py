"""Images per second of our detection, in training and in evaluation, beside a plain loop over torchvision's detector.

Both sides read the same shards, use one thread, the same network, sizes and proposals, and take turns in one process; a
ratio is the median over the turns. The plain loop decodes, resizes and flips in the loop's own thread.

    python benchmarks/detection.py --output detection.json
"""

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import machine  # pyright: ignore[reportMissingImports]
import torch

from ssl_core.config import Backbone, Dataset
from ssl_core.data.card import load_card
from ssl_core.data.detection_loader import DetectionLoader, Transform
from ssl_core.data.sharding import write_shards
from ssl_core.data.shards import Manifest
from ssl_core.evaluations.detection import Config
from ssl_core.networks.backbones import build_backbone
from ssl_core.networks.detectors import build_detector
from ssl_core.training.detection import DetectionTrainer

NORMALISATION: dict[str, Any] = {"mean": [0.5] * 3, "std": [0.25] * 3}


def detector(name: str, classes: int, config: Config) -> Any:
    """Build the network with the same weights for both sides."""
    torch.manual_seed(0)
    options: dict[str, Any] = {"regions": config.regions, "train_proposals": config.train_proposals}
    backbone = build_backbone(Backbone(name=name), 224)
    return build_detector(
        backbone, name, "fpn", classes, masks=False, **NORMALISATION, **options, test_proposals=config.test_proposals
    )


def train_ours(trainer: DetectionTrainer, steps: int) -> float:
    """Return the images per second of our loop."""
    started = time.perf_counter()
    trainer.total_steps = trainer.step + steps
    trainer.run(save=lambda: None, log=lambda row: None)
    return steps * trainer.training.batch_size / (time.perf_counter() - started)


def train_plain(model: Any, optimizer: torch.optim.Optimizer, loader: DetectionLoader, steps: int) -> float:
    """Return the images per second of a plain loop."""
    started = time.perf_counter()
    model.train()
    for _ in range(steps):
        first = loader.step * loader.batch_size
        samples = [loader._draw(position) for position in range(first, first + loader.batch_size)]
        loader.step += 1
        losses = model([image / 255 for image, *_ in samples], [target for _, target, *_ in samples])
        optimizer.zero_grad()
        torch.stack(list(losses.values())).sum().backward()
        optimizer.step()
    return steps * loader.batch_size / (time.perf_counter() - started)


@torch.no_grad()
def evaluate(model: Any, loader: DetectionLoader, images: int, *, ahead: bool) -> float:
    """Return the images per second of detection, with images prepared ahead or not."""
    model.eval()
    started = time.perf_counter()
    if ahead:
        for number, batch in enumerate(loader.epoch(), start=1):
            model([image / 255 for image in batch.images])
            if number == images:
                break
    else:
        for number in range(images):
            image = loader._read(number, loader.transform.short_sides[0], False, 0)[0]
            model([image / 255])
    return images / (time.perf_counter() - started)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--coco128", type=Path, default=Path("../shared/data/coco128.tar"))
    parser.add_argument("--backbone", default="mobilenet_v2")
    parser.add_argument("--steps", type=int, default=10, help="of each side per turn")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    about = machine.describe()
    if not arguments.coco128.exists():
        print(f"skipped: {arguments.coco128} (COCO128 as one tar) is not there")
        return
    torch.set_num_threads(1)
    os.environ["COCO128_TAR"] = str(arguments.coco128.absolute())
    with tempfile.TemporaryDirectory(prefix="ssl-core-benchmark-") as folder:
        write_shards(load_card(Path("datasets/coco128.yaml")), Path(folder), threads=1)
        results = compare(Manifest.load(Path(folder) / "manifest.json"), arguments)
    print(f"waiting for data: {results['wait_percent']:.1f} % of the training")
    machine.write(arguments.output, about, {"backbone": arguments.backbone, **results})


def compare(manifest: Manifest, arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure both sides in turn; print and return the medians of their images per second and of their ratios."""
    dataset = Dataset(name=manifest.dataset, split=next(iter(manifest.splits)))
    config = Config(dataset=dataset, warmup_iterations=0, learning_rate=1e-3, precision="fp32")
    transform = Transform(short_sides=config.short_sides, longest=config.longest, flip=config.flip)
    test = Transform(short_sides=(config.test_side,), longest=config.longest)
    training: dict[str, Any] = {"batch_size": config.batch_size, "training": True, "masks": False}
    testing: dict[str, Any] = {"batch_size": 1, "training": False, "masks": False}
    ours, plain = (detector(arguments.backbone, len(manifest.classes or ()), config) for _ in range(2))
    optimizer = torch.optim.SGD(
        plain.parameters(), lr=config.learning_rate, momentum=config.momentum, weight_decay=config.weight_decay
    )
    speeds: dict[str, list[float]] = {"train": [], "plain train": [], "test": [], "plain test": []}
    steps = arguments.steps
    with (
        DetectionLoader(manifest, dataset, transform, **training) as loader,
        DetectionLoader(manifest, dataset, transform, **training) as other,
        DetectionLoader(manifest, dataset, test, **testing) as tested,
    ):
        schedule, device = config.schedule(), torch.device("cpu")
        trainer = DetectionTrainer(ours, loader, config.training(), schedule, task="detection", device=device)
        train_ours(trainer, steps)  # both sides warm up
        train_plain(plain, optimizer, other, steps)
        trainer.waited = trainer.seconds = 0.0
        for _ in range(arguments.turns):
            speeds["train"].append(train_ours(trainer, steps))
            speeds["plain train"].append(train_plain(plain, optimizer, other, steps))
            speeds["test"].append(evaluate(ours, tested, steps, ahead=True))
            speeds["plain test"].append(evaluate(plain, tested, steps, ahead=False))
    results: dict[str, Any] = {"wait_percent": 100 * trainer.waited / trainer.seconds}
    for name in ("train", "test"):
        ratios = [mine / peer for mine, peer in zip(speeds[name], speeds[f"plain {name}"], strict=True)]
        mine, peer = statistics.median(speeds[name]), statistics.median(speeds[f"plain {name}"])
        results[name] = {"ours": mine, "plain": peer, "ratio": statistics.median(ratios)}
        print(f"{name}: {mine:.2f} images/s, plain loop {peer:.2f}, ratio {statistics.median(ratios):.2f}", flush=True)
    return results


if __name__ == "__main__":
    main()
