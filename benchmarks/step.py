"""A training step with data loading: ours, lightly's, and ours beside the floor, which is a fixed batch.

Images, network, heads, batch and threads are equal. lightly runs as in its documentation: its transforms and losses, a
plain PyTorch loop, a DataLoader with workers. Every side is a process that stays alive; sides take turns, and each turn
starts with untimed steps, so that no side profits from batches made while others ran. Memory is measured in separate
processes that run alone, since measuring slows the steps and processes at the same time share the pages of libraries.

    python benchmarks/step.py --output step.json               # defaults of each side: ours in bf16 if possible
    python benchmarks/step.py --precision bf16                 # both sides in bf16
    python benchmarks/step.py --methods all                    # also methods without a peer here
    python benchmarks/step.py --isa AVX2 AVX512_CORE           # limited to these instructions, without bfloat16
    python benchmarks/step.py --neighbours 0 1 4               # beside this number of busy processes
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import machine  # pyright: ignore[reportMissingImports]
import psutil
import torch
from images import read_images, write_shards  # pyright: ignore[reportMissingImports]

SIDES = ("ours", "lightly")
NETWORKS = {  # name and side in px -> backbone, archive
    "resnet18 32": ({"name": "resnet18", "stem": "small"}, "cifar10.tar.gz"),
    "resnet18 64": ({"name": "resnet18", "stem": "tiny"}, "tiny-imagenet-200-subset.tar.gz"),
    "mobilenet_v2 64": ({"name": "mobilenet_v2", "stem": "tiny"}, "tiny-imagenet-200-subset.tar.gz"),
}
LOCALS = {"num_locals": 6, "area": [0.4, 1.0], "local_area": [0.05, 0.4]}  # local views of half the side
METHODS: dict[str, dict[str, Any]] = {  # heads and views as lightly's
    "ressl": {
        "name": "ressl", "projector_hidden": 512, "embedding_dim": 128, "predictor": False, "queue_size": 4096,
        "batchnorm_splits": 1,
    },
    "moco": {
        "name": "moco", "preset": "moco_v2", "projector_hidden": 512, "queue_size": 4096, "batchnorm_splits": 1,
    },
    "simclr": {"name": "simclr", "projector_hidden": 512},
    "dino": {
        "name": "dino", "head_hidden": 512, "bottleneck_dim": 64, "num_outputs": 2048, "head_batchnorm": False,
        "first_augmentation": "dino_global_first", "second_augmentation": "dino_global_second",
        "local_augmentation": "dino_local", **LOCALS,
    },
}  # fmt: skip
PEERS = tuple(METHODS)  # methods with a peer; the others have only a floor
METHODS |= {
    "npid": {"name": "npid"},
    "cao_wu": {"name": "npid", "preset": "code", "embedding_dim": 128, "batchnorm_splits": 1},
    "pid": {"name": "pid"},
    "byol": {"name": "byol", "projector_hidden": 512, "predictor_hidden": 512},
    "simsiam": {"name": "simsiam", "embedding_dim": 512, "predictor_hidden": 128},
    "swav": {"name": "swav", "num_prototypes": 512, "queue_size": 0, "projector_hidden": 512},
    "jigclu": {"name": "jigclu"},
    "seed": {"name": "seed", "queue_size": 4096},
}
IMAGES = 8192
WARM_STEPS = 3  # more than either side's queue of finished batches


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="of the archives; else synthetic")
    parser.add_argument("--methods", nargs="+", choices=[*METHODS, "all"], default=list(PEERS))
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--threads", type=int, default=2, help="of torch; lightly's loader has as many workers")
    parser.add_argument("--precision", choices=("default", "bf16", "fp32"), default="default", help="of both sides")
    parser.add_argument("--steps", type=int, default=6, help="timed a turn")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--pairs", type=int, default=30, help="of a step on new and one on fixed images, for the floor")
    parser.add_argument("--images", type=int, default=IMAGES, help="of the data set")
    parser.add_argument("--isa", nargs="+", choices=machine.INSTRUCTIONS, help="instruction sets; else the widest")
    parser.add_argument("--neighbours", type=int, nargs="+", default=[0], help="busy processes beside the timed steps")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)  # one side, controlled through stdin
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side:
        serve(arguments)
        return
    if "all" in arguments.methods:
        arguments.methods = list(METHODS)
    about = machine.describe()
    conditions = [(limit, count) for limit in instruction_sets(arguments) for count in arguments.neighbours]
    print(f"batch {arguments.batch}, {arguments.threads} threads, precision {arguments.precision}")
    print("images/s: median (min-max) over turns; of floor and wait: ours; MB: peak of ours, of lightly's, their ratio")
    heading = f"{'instructions + neighbours':<27}{'method':<8}{'network':<17}{'ours':>16}{'lightly':>16}{'ratio':>7}"
    print(f"{heading}{'of floor':>10}{'wait':>7}{'MB':>21}")
    rows = []
    for network in arguments.networks:
        with tempfile.TemporaryDirectory(prefix="ssl-core-benchmark-") as folder:
            size, archive = int(network.split()[1]), NETWORKS[network][1]
            images = read_images(arguments.data / archive, arguments.images, size)
            write_shards(Path(folder) / "shards", images, size)
            write_files(Path(folder) / "files" / "all", images)
            for method in arguments.methods:
                for limit, count in conditions:
                    rows.append(compare(method, network, folder, arguments, limit, count))
                    print(line(rows[-1]), flush=True)
    settings = {name: getattr(arguments, name) for name in ("batch", "threads", "precision", "steps", "turns", "pairs")}
    machine.write(arguments.output, about, {**settings, "rows": rows})


def instruction_sets(arguments: argparse.Namespace) -> list[str | None]:
    """Return the sets to measure; those that the processor lacks, or that lack the precision, are left out."""
    if arguments.isa is None:
        return [None]
    usable: list[str | None] = []
    for name in arguments.isa:
        if not machine.supports(name):
            print(f"{name}: left out, the processor does not have it", file=sys.stderr)
        elif arguments.precision == "bf16" and name != "AVX512_CORE_BF16":
            print(f"{name}: left out, it has no bfloat16", file=sys.stderr)
        else:
            usable.append(name)
    return usable


@contextmanager
def busy_processes(count: int) -> Iterator[None]:
    """Keep `count` processes busy, as other work on the machine would."""
    processes = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def write_files(folder: Path, images: list[bytes]) -> None:
    """Write one file per image for lightly's data set."""
    folder.mkdir(parents=True)
    for number, image in enumerate(images):
        (folder / f"{number:08d}.jpg").write_bytes(image)


def compare(
    method: str, network: str, folder: str, arguments: argparse.Namespace, limit: str | None, neighbours: int
) -> dict[str, Any]:
    """Let the sides take turns; return their images/s, memory and our share of waiting for data.

    Beside busy processes only the turns are measured.
    """
    command = [sys.executable, __file__, "--methods", method, "--networks", network, "--folder", folder]
    for name in ("batch", "threads", "precision", "steps", "pairs"):
        command += [f"--{name}", str(getattr(arguments, name))]
    environment = machine.environment(limit)

    def begin(side: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [*command, "--side", side], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        ask(process, "start")
        return process

    row: dict[str, Any] = {"method": method, "network": network, "neighbours": neighbours, "memory_mb": {}}
    compared = [side for side in SIDES if side != "lightly" or method in PEERS]
    if not neighbours:
        for side in compared:
            alone = begin(side)
            row["memory_mb"][side] = ask(alone, "memory")["memory_mb"]
            alone.communicate()
    sides = {side: begin(side) for side in compared}  # started one after the other; idle afterwards
    row["instructions"] = ask(sides["ours"], "instructions")["instructions"]
    answers: dict[str, list[dict[str, Any]]] = {side: [] for side in sides}
    with busy_processes(neighbours):
        for _ in range(arguments.turns):
            for side in sides:
                answers[side].append(ask(sides[side], "time"))
    if not neighbours:
        row["of_floor"] = ask(sides["ours"], "floor")["of_floor"]
    for process in sides.values():
        process.communicate()
    speed = {side: [answer["images_per_second"] for answer in answers[side]] for side in sides}
    row["images_per_second"] = speed
    row["wait_share"] = statistics.median(answer["wait_share"] for answer in answers["ours"])
    if "lightly" in sides:
        row["ratio"] = median_ratio(speed["ours"], speed["lightly"])
        if row["memory_mb"]:
            row["memory_ratio"] = row["memory_mb"]["ours"] / row["memory_mb"]["lightly"]
    return row


def median_ratio(own: list[float], others: list[float]) -> float:
    return statistics.median(one / other for one, other in zip(own, others, strict=True))


def ask(process: subprocess.Popen[str], request: str) -> dict[str, Any]:
    """Send a request (`start`, `instructions`, `time`, `memory` or `floor`) to a side and return its answer."""
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(f"{request}\n")
    process.stdin.flush()
    answer = process.stdout.readline()
    if not answer:
        sys.exit("error: a side ended early; see its message above")
    return json.loads(answer)


def line(row: dict[str, Any]) -> str:
    speed, memory = row["images_per_second"], row["memory_mb"]
    both = "".join(
        f"{statistics.median(speed[side]):.0f} ({min(speed[side]):.0f}-{max(speed[side]):.0f})".rjust(16)
        if side in speed
        else "–".rjust(16)
        for side in SIDES
    )
    ratio, memory_ratio = (f"{row[name]:.2f}" if name in row else "–" for name in ("ratio", "memory_ratio"))
    megabytes = "".join(f"{memory[side]:.0f}".rjust(7) if side in memory else "–".rjust(7) for side in SIDES)
    of_floor = f"{row['of_floor']:.3f}" if "of_floor" in row else "–"
    condition = f"{row['instructions']} + {row['neighbours']}"
    return (
        f"{condition:<27}{row['method']:<8}{row['network']:<17}{both}{ratio:>7}{of_floor:>10}"
        f"{100 * row['wait_share']:>6.1f}%{megabytes}{memory_ratio:>7}"
    )


def serve(arguments: argparse.Namespace) -> None:
    """Serve as one side: run a turn for each line of stdin."""
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    (method,), (network,) = arguments.methods, arguments.networks
    # Each side imports only its libraries, as a user's process would.
    if arguments.side == "lightly":
        import peers  # pyright: ignore[reportMissingImports]

        run = peers.training(
            METHODS[method], NETWORKS[network][0], arguments.folder / "files", size=int(network.split()[1]),
            batch_size=arguments.batch, workers=arguments.threads, bf16=arguments.precision == "bf16",
        )  # fmt: skip
    else:
        import ours  # pyright: ignore[reportMissingImports]

        training = {"batch_size": arguments.batch}
        if arguments.precision != "default":
            training["precision"] = arguments.precision
        run = ours.Training(METHODS[method], NETWORKS[network][0], arguments.folder, training)
    for request in map(str.strip, sys.stdin):
        if request == "instructions":
            print(json.dumps({"instructions": machine.instructions()}), flush=True)
            continue
        run(WARM_STEPS)
        if request == "start":
            answer = {}
        elif request == "time":
            start, waited = time.perf_counter(), getattr(run, "waited", 0.0)
            run(arguments.steps)
            seconds = time.perf_counter() - start
            wait_share = (getattr(run, "waited", 0.0) - waited) / seconds
            answer = {"images_per_second": arguments.steps * arguments.batch / seconds, "wait_share": wait_share}
        elif request == "floor":
            answer = {"of_floor": run.of_floor(arguments.pairs)}  # pyright: ignore[reportFunctionMemberAccess]
        else:
            with Memory() as memory:
                run(arguments.steps)
            answer = {"memory_mb": memory.peak / 2**20}
        print(json.dumps(answer), flush=True)


class Memory:
    """Peak proportional set size of a process and its children, sampled ten times per second."""

    def __init__(self) -> None:
        self.peak = 0
        self._process = psutil.Process()
        self._over = threading.Event()
        self._watcher = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Self:
        self._watcher.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._watcher.join()

    def _watch(self) -> None:
        while not self._over.wait(0.1):
            used = 0
            for process in [self._process, *self._process.children(recursive=True)]:
                try:
                    used += process.memory_full_info().pss
                except psutil.Error:  # the process has ended
                    continue
            self.peak = max(self.peak, used)


if __name__ == "__main__":
    main()
