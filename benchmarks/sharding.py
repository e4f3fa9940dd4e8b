"""Sharding: images/s and memory against webdataset's writer and a plain copy, and their growth with the data.

Peers: `copy` writes every file's bytes once more, which is the limit of the disk; `writer` passes the unread bytes to
`webdataset.ShardWriter`; `pil` passes decoded images, as in webdataset's documentation, which are encoded again. Our
side decodes every image, keeps its bytes, hashes shards and writes DALI's index. All sides read the same folder of
files from a warm page cache, in turns, each in its own process. The peers use one process, as in their documentation;
our side has `--workers`.

`--against` compares the sharding of the working tree with that of a git revision instead, in turns: the ratios of the
medians of wall time and of processor time.

    python benchmarks/sharding.py --output sharding.json
    python benchmarks/sharding.py --against v0.1 --sets cifar10_png imagenet --repeats 5
    python benchmarks/sharding.py --sets imagenet --copies 50
    python benchmarks/sharding.py --growth 10000 100000 1000000
"""

import argparse
import contextlib
import io
import itertools
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from memory import peak_bytes  # pyright: ignore[reportMissingImports]
from PIL import Image

from ssl_core.files import write_text

ROOT = Path(__file__).parent.parent
SETS = {  # archive, side of its images in px, number of synthetic images without the archive
    "cifar10": ("cifar10.tar.gz", 32, 60_000),
    "cifar10_png": ("cifar10.tar.gz", 32, 60_000),
    "imagenet": ("imagenet-sample.tar", 224, 240),
}
IMAGES = (".jpg", ".jpeg", ".png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="of the archives; else synthetic")
    parser.add_argument("--sets", nargs="*", choices=SETS, default=["cifar10", "imagenet"])
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--copies", type=int, default=1, help="of each image, for a larger set")
    parser.add_argument("--growth", type=int, nargs="*", default=[], metavar="N", help="also shard N synthetic images")
    parser.add_argument("--images", type=int, help="at most so many of an archive")
    parser.add_argument("--against", metavar="REVISION", help="compare with a git revision instead of the peers")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)  # one measurement, as JSON
    parser.add_argument("--source", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side:
        print(json.dumps(measure(arguments.side, arguments.source, arguments.workers)))
        return
    results: dict[str, Any] = {"workers": arguments.workers, "sets": {}, "growth": {}}
    with tempfile.TemporaryDirectory(prefix="ssl-core-benchmark-") as folder, contextlib.ExitStack() as stack:
        if arguments.against:
            results["against"] = arguments.against
            base = stack.enter_context(checkout(arguments.against))
        else:
            base = None
            print(f"{'set':<10}{'side':<10}{'images/s':>10}{'MB':>8}{'ours is':>10}")
        for name in arguments.sets:
            source = Path(folder) / name
            unpack(name, arguments.data, source / "1", arguments.images)
            for number in range(2, arguments.copies + 1):
                shutil.copytree(source / "1", source / str(number))
            if base is None:
                results["sets"][name] = compare(name, source, arguments)
            else:
                results["sets"][name] = compare_revisions(name, source, base, arguments)
        for count in arguments.growth:
            source = Path(folder) / f"{count}.tar"
            write_archive(source, count)
            results["growth"][str(count)] = row = in_own_process("archive", source, arguments.workers)
            source.unlink()
            speed = f"{row['images_per_second']:.0f} a second"
            print(f"{count:>10} images: {row['seconds']:.1f} s, {speed}, {row['mb']:.0f} MB", flush=True)
    if arguments.output:
        write_text(arguments.output, json.dumps(results, indent=2) + "\n")


def compare(name: str, source: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Let all sides take turns on one folder; print and return the medians."""
    turns: dict[str, list[dict[str, float]]] = {side: [] for side in PEERS}
    in_own_process("copy", source, arguments.workers)  # warms the page cache
    for _ in range(arguments.repeats):
        for side in PEERS:
            turns[side].append(in_own_process(side, source, arguments.workers))
    rows = {}
    for side in PEERS:
        speeds = [turn["images_per_second"] for turn in turns[side]]
        ratios = [own["images_per_second"] / speed for own, speed in zip(turns["ours"], speeds, strict=True)]
        rows[side] = {
            "images_per_second": speeds,
            "mb": max(turn["mb"] for turn in turns[side]),
            "ours_is": statistics.median(ratios),
        }
        speed, times = statistics.median(speeds), rows[side]["ours_is"]
        print(f"{name:<10}{side:<10}{speed:>10.0f}{rows[side]['mb']:>8.0f}{times:>9.2f}x", flush=True)
    return rows


@contextlib.contextmanager
def checkout(revision: str) -> Iterator[Path]:
    """Yield a folder with the files of a git revision."""
    with tempfile.TemporaryDirectory(prefix="ssl-core-revision-") as folder:
        archive = subprocess.run(["git", "archive", revision], cwd=ROOT, check=True, stdout=subprocess.PIPE).stdout
        with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
            tar.extractall(folder, filter="data")
        yield Path(folder)


def compare_revisions(name: str, source: Path, base: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Let both revisions take turns on one folder, the first run unmeasured; print and return the ratios."""
    trees = {"before": base, "now": ROOT}
    turns: dict[str, list[dict[str, float]]] = {side: [] for side in trees}
    for repeat in range(arguments.repeats + 1):
        for side in sorted(trees, reverse=repeat % 2 > 0):
            turn = in_own_process("ours", source, arguments.workers, trees[side])
            if repeat > 0:
                turns[side].append(turn)
    result: dict[str, Any] = dict(turns)
    for measure in ("seconds", "processor_seconds"):
        before, now = (statistics.median(turn[measure] for turn in turns[side]) for side in trees)
        result[f"ratio_of_{measure}"] = now / before
        print(f"{name}: {now:.2f} {measure} now, {before:.2f} before, ratio {now / before:.3f}", flush=True)
    return result


def in_own_process(side: str, source: Path, workers: int, tree: Path = ROOT) -> dict[str, float]:
    command = [sys.executable, __file__, "--side", side, "--source", str(source), "--workers", str(workers)]
    environment = {**os.environ, "PYTHONPATH": str(tree)}
    run = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    return json.loads(run.stdout.splitlines()[-1])


def measure(side: str, source: Path, workers: int) -> dict[str, float]:
    """Time one side without its imports; memory is the peak of the largest process, workers included."""
    with tempfile.TemporaryDirectory(dir=source.parent) as folder:
        work = SIDES[side](source, Path(folder), workers)
        start, processor_start = time.perf_counter(), processor_seconds()
        images = work()
        seconds = time.perf_counter() - start
        of_processor = processor_seconds() - processor_start
    peak = max(peak_bytes() / 1024, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
    return {
        "seconds": seconds,
        "processor_seconds": of_processor,
        "images_per_second": images / seconds,
        "mb": peak / 1024,
    }


def processor_seconds() -> float:
    """Return the processor time of this process and of its workers that have ended."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def copy(source: Path, target: Path, workers: int) -> Callable[[], int]:
    def work() -> int:
        files = list_images(source)
        for number, file in enumerate(files):
            (target / f"{number}{file.suffix}").write_bytes(file.read_bytes())
        return len(files)

    return work


def writer(source: Path, target: Path, workers: int) -> Callable[[], int]:
    from webdataset.writer import ShardWriter

    def work() -> int:
        files = list_images(source)
        with ShardWriter(str(target / "%06d.tar"), maxcount=2000, verbose=0) as sink:
            for number, file in enumerate(files):
                sink.write({"__key__": f"{number:08d}", "jpg": file.read_bytes(), "cls": 0})
        return len(files)

    return work


def pil(source: Path, target: Path, workers: int) -> Callable[[], int]:
    from webdataset.writer import ShardWriter

    def work() -> int:
        files = list_images(source)
        with ShardWriter(str(target / "%06d.tar"), maxcount=2000, verbose=0) as sink:
            for number, file in enumerate(files):
                sink.write({"__key__": f"{number:08d}", "jpg": Image.open(file).convert("RGB"), "cls": 0})
        return len(files)

    return work


def ours(source: Path, target: Path, workers: int) -> Callable[[], int]:
    return _shard({"type": "image_folder", "path": str(source), "splits": {"train": {}}}, target, workers)


def archive(source: Path, target: Path, workers: int) -> Callable[[], int]:
    return _shard({"type": "image_tar", "path": str(source), "splits": {"train": {}}}, target, workers)


def _shard(source: dict[str, Any], target: Path, workers: int) -> Callable[[], int]:
    from ssl_core.stages import shard

    card = target / "set.yaml"
    card.write_text(yaml.safe_dump({"name": "set", "image_size": 32, "source": source}))

    def work() -> int:
        shard.run(card, target / "shards", threads=workers)
        manifest = json.loads((target / "shards" / "manifest.json").read_text())
        return manifest["splits"]["train"]["images"]

    return work


PEERS = ("ours", "copy", "writer", "pil")
SIDES = {"ours": ours, "archive": archive, "copy": copy, "writer": writer, "pil": pil}


def list_images(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGES)


def unpack(name: str, data: Path, folder: Path, most: int | None) -> None:
    """Write a set's images as files, real ones if the archive is available."""
    archive, size, count = SETS[name]
    folder.mkdir(parents=True)
    if (data / archive).exists():
        with tarfile.open(data / archive) as tar:
            images = (member for member in tar if member.isfile() and Path(member.name).suffix.lower() in IMAGES)
            tar.extractall(folder, itertools.islice(images, most), filter="data")
        if name.endswith("_png"):
            for path in list_images(folder):
                Image.open(path).save(path.with_suffix(".png"))
                path.unlink()
        return
    from images import synthetic_images  # pyright: ignore[reportMissingImports]

    (folder / "all").mkdir()
    for number, image in enumerate(synthetic_images(count, size)):
        (folder / "all" / f"{number:08d}.jpg").write_bytes(image)


def write_archive(path: Path, count: int) -> None:
    """Write a tar of `count` small PNGs, a thousand different ones."""
    generator = np.random.default_rng(0)
    images = []
    for _ in range(1000):
        file = io.BytesIO()
        Image.fromarray(generator.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(file, "PNG")
        images.append(file.getvalue())
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for number in range(count):
            image = images[number % len(images)]
            member = tarfile.TarInfo(f"all/{number:08d}.png")
            member.size = len(image)
            tar.addfile(member, io.BytesIO(image))
            tar.members = []  # pyright: ignore[reportAttributeAccessIssue] - or a million pile up


if __name__ == "__main__":
    main()
