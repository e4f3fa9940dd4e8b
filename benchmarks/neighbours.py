"""Images per second of a training beside busy processes: with two threads, with one, and as two processes.

ReSSL with ResNet-18 at 32 px. Each way runs alone, and all numbers of neighbours are tried in it. The fair share is
cores / (cores + neighbours) of the fastest way on the free machine, at most all of it.

    python benchmarks/neighbours.py --output neighbours.json
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import machine  # pyright: ignore[reportMissingImports]
import torch
from images import read_images, write_shards  # pyright: ignore[reportMissingImports]
from step import busy_processes  # pyright: ignore[reportMissingImports]

from ssl_core.blocks import distributed
from ssl_core.data.loader import Loader
from ssl_core.data.shards import Manifest
from ssl_core.methods.base import build, resolve, views_of
from ssl_core.networks.batchnorm import synchronise_batchnorm
from ssl_core.stages.pretrain import start_process
from ssl_core.stages.ranks import start_ranks
from ssl_core.training.loop import Trainer

BATCH, UNTIMED = 64, 3
WAYS = {"two threads": (2, 1, {}), "two threads, passive": (2, 1, {"OMP_WAIT_POLICY": "passive"})}
WAYS |= {"one thread": (1, 1, {}), "two processes": (2, 2, {})}  # threads, processes, environment
METHOD = {"name": "ressl", "projector_hidden": 512, "queue_size": 4096, "predictor": False, "batchnorm_splits": 1}


@dataclass(frozen=True)
class Job:
    """One way; `start_ranks` sends it to each process."""

    folder: Path
    threads: int
    processes: int
    precision: str
    neighbours: list[int]
    seconds: float
    output: Path


def work(job: Job) -> None:
    """Train in this process and write the images per second of all processes for each number of neighbours."""
    training = {"epochs": 100, "batch_size": BATCH, "gpus": job.processes, "precision": job.precision}
    backbone = {"name": "resnet18", "stem": "tiny"}
    resolved = resolve({"dataset": {"name": "benchmark"}, "backbone": backbone, "method": METHOD, "training": training})
    device = start_process(resolved.training, job.threads)
    views = views_of(resolved, 32)
    rank, processes = distributed.rank(), job.processes
    options: dict[str, Any] = {"batch_size": BATCH // processes, "seed": 0, "rank": rank, "world_size": processes}
    with Loader(Manifest.load(job.folder / "manifest.json"), resolved.dataset, views, **options) as loader:
        method = build(resolved, 32, views, num_images=loader.num_images)
        if distributed.is_distributed():
            synchronise_batchnorm(method, cuda=False)
        trainer = Trainer(method, loader, resolved.training, device=device)
        trainer.method.train()
        rates = {}
        for neighbours in job.neighbours:
            with busy_processes(neighbours if rank == 0 else 0):
                rates[neighbours] = images_per_second(trainer, job.seconds)
    if rank == 0:
        job.output.write_text(json.dumps(rates), encoding="utf-8")
    if distributed.is_distributed():
        torch.distributed.destroy_process_group()


def images_per_second(trainer: Trainer, seconds: float) -> float:
    """Train for this time, after a few untimed steps."""
    steps, start = -UNTIMED, time.monotonic()
    while steps < 1 or not distributed.agree(time.monotonic() - start > seconds, trainer.device):
        if steps == 0:
            start = time.monotonic()
        trainer._one_step()
        trainer.step += 1
        steps += 1
    return BATCH * steps / (time.monotonic() - start)


def run(way: str, folder: Path, arguments: argparse.Namespace) -> dict[int, float]:
    """Measure one way in processes of its own."""
    output = folder / "rates.json"
    command = [sys.executable, __file__, "--way", way, "--folder", str(folder), "--precision", arguments.precision]
    command += ["--seconds", str(arguments.seconds), "--neighbours", *map(str, arguments.neighbours)]
    subprocess.run([*command, "--output", str(output)], check=True, env={**os.environ, **WAYS[way][2]})
    return {int(count): rate for count, rate in json.loads(output.read_text(encoding="utf-8")).items()}


def main() -> None:
    """Measure all ways in turn and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--neighbours", type=int, nargs="+", default=[0, 1, 4])
    parser.add_argument("--precision", choices=("auto", "fp32", "bf16"), default="auto")
    parser.add_argument("--seconds", type=float, default=6.0, help="of each measurement")
    parser.add_argument("--turns", type=int, default=2, help="the better of them counts")
    parser.add_argument("--images", type=int, default=8192)
    parser.add_argument("--data", type=Path, default=Path(__file__).parents[2] / "shared" / "data")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)  # one way, started by the others' process
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.way:
        threads, processes, _ = WAYS[arguments.way]
        measured = (arguments.precision, arguments.neighbours, arguments.seconds, arguments.output)
        start_ranks(work, Job(arguments.folder / "shards", threads, processes, *measured), "neighbours", processes)
        return
    about = machine.describe()
    with tempfile.TemporaryDirectory(prefix="ssl-core-benchmark-") as temporary:
        folder = Path(temporary)
        write_shards(folder / "shards", read_images(arguments.data / "cifar10.tar.gz", arguments.images, 32), 32)
        turns = [{way: run(way, folder, arguments) for way in arguments.ways} for _ in range(arguments.turns)]
    best = {way: {n: max(turn[way][n] for turn in turns) for n in arguments.neighbours} for way in arguments.ways}
    free = max(rates.get(0, 0.0) for rates in best.values())
    cores = os.cpu_count() or 1
    share = {count: free * min(1.0, cores / (cores + count)) for count in arguments.neighbours}
    for name, rates in [*best.items(), ("fair share", share)]:
        print(f"{name:<22}" + "".join(f"{rate:>10.1f} ({count})" for count, rate in rates.items()))
    print("images/s (busy neighbours)")
    machine.write(arguments.output, about, {"images_per_second": best, "fair_share": share, "turns": turns})


if __name__ == "__main__":
    import neighbours  # processes import the file by this name

    neighbours.main()
