"""Cost of size: start-up with up to 100 million images, NPID's checkpoint, 5,000 planned jobs, 10,000 tracked runs.

Data sets are synthetic: one shard of 2,000 images of 16 px with its index, hard-linked under as many names as the set
has shards, and a manifest of all. So the disk holds one shard, and files are read from a warm page cache. Each
measurement runs in a fresh process; one that exceeds `--limit` seconds or `--memory` GB of its own (without pages of
files) is ended and printed as such.

training    the stage `pretrain` until its first step, on unlabelled images; also `--against REVISION`
evaluation  the stage `evaluate` until the features of its first batch, on labelled images, and the reading of labels
checkpoint  NPID's checkpoint, written and read by the stage `pretrain`; sizes beyond `--bank` are computed
dry_run     Snakemake's plan of `--experiments` with ten evaluations each, and of as many jobs without our code
tracking    one stage's record, and the leaderboard's query, in a mlflow.db with and without `--runs`

    python benchmarks/scale.py --output scale.json
    python benchmarks/scale.py --parts training --images 1281167
"""

import argparse
import io
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

SIZES = {"ImageNet-1k": 1_281_167, "ImageNet-22k": 14_197_122, "100 million": 100_000_000}
PX, CLASSES = 16, 1000
BANK_DIM = 128
EVALUATIONS = 10  # of each experiment of the dry run
STAGES = 4  # recorded of each experiment: a pre-training and three evaluations
ROWS = 100  # of the history of a pre-training in MLflow, of eight metrics


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--images", type=int, nargs="+", default=list(SIZES.values()))
    parser.add_argument("--bank", type=int, default=SIZES["ImageNet-1k"], help="images of the measured checkpoint")
    parser.add_argument("--experiments", type=int, default=500, help="of the dry run")
    parser.add_argument("--runs", type=int, default=10_000, help="in mlflow.db")
    parser.add_argument("--limit", type=float, default=120, help="seconds of one measurement")
    parser.add_argument("--memory", type=float, default=10, help="GB of one measurement")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--measure", choices=MEASUREMENTS, help=argparse.SUPPRESS)  # one measurement, as JSON
    parser.add_argument("--arguments", type=json.loads, default={}, help=argparse.SUPPRESS)
    parser.add_argument("--started", type=float, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(MEASUREMENTS[arguments.measure](arguments.started, **arguments.arguments)))
        return
    import machine  # pyright: ignore[reportMissingImports] - not in the measured processes

    about = machine.describe()
    results: dict[str, Any] = {"limit_seconds": arguments.limit, "limit_gb": arguments.memory}
    with tempfile.TemporaryDirectory(prefix="ssl-core-benchmark-") as folder:
        for part in arguments.parts:
            results[part] = PARTS[part](Path(folder, part), arguments)
    machine.write(arguments.output, about, results)


def in_own_process(measurement: str, options: argparse.Namespace, folder: Path, **arguments: Any) -> dict[str, Any]:
    """Run one measurement in a fresh process within the limits; return its numbers, or its end as `error`."""
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, __file__, "--measure", measurement, "--arguments", json.dumps(arguments)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}
    bound = int(options.memory * 2**30)
    process = subprocess.Popen(
        [*command, "--started", str(time.time())],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_DATA, (bound, bound)),
    )
    try:
        output, errors = process.communicate(timeout=options.limit)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        return {"error": f"more than {options.limit:g} s"}
    if process.returncode == 0:
        return json.loads(output.splitlines()[-1])
    reason = (errors.strip() or f"exit code {process.returncode}").splitlines()[-1]
    out_of_memory = any(word in errors for word in ("bad_alloc", "MemoryError", "allocate memory", "out of memory"))
    return {"error": f"more than {options.memory:g} GB" if out_of_memory else reason}


def show(label: str, numbers: dict[str, Any]) -> dict[str, Any]:
    """Print one measurement as one line and return it."""
    words = [
        f"{name} {value:,.2f}" if isinstance(value, float) else f"{name} {value}" for name, value in numbers.items()
    ]
    print(f"{label:<44}{'; '.join(words)}", flush=True)
    return numbers


# Data sets


def write_data(folder: Path, images: int, *, labelled: bool) -> int:
    """Write the shards `folder`/manifest.json of at least so many images; return their number."""
    import numpy as np
    from PIL import Image

    from ssl_core.data.sharding import IMAGES_PER_SHARD
    from ssl_core.data.shards import Manifest, Split, new_shard
    from ssl_core.files import write_json

    folder.mkdir(parents=True)
    generator = np.random.default_rng(0)
    first = folder / "train-000000.tar"
    with new_shard(first) as writer:
        for number in range(IMAGES_PER_SHARD):
            file = io.BytesIO()
            Image.fromarray(generator.integers(0, 256, (PX, PX, 3), dtype=np.uint8)).save(file, "JPEG")
            writer.add(number, "jpg", file.getvalue(), number % CLASSES if labelled else -1)
        shard = writer.close().model_copy(update={"file": first.name})
    count = -(-images // IMAGES_PER_SHARD)
    shards = tuple(shard.model_copy(update={"file": f"train-{number:06d}.tar"}) for number in range(count))
    for entry in shards[1:]:
        tar = folder / entry.file
        os.link(first, tar)
        os.link(first.with_suffix(".idx"), tar.with_suffix(".idx"))
    total = count * IMAGES_PER_SHARD

    def split(part: tuple[Any, ...]) -> Split:
        number = len(part) * IMAGES_PER_SHARD
        counts = (number // CLASSES,) * CLASSES if labelled else None
        size = len(part) * shard.bytes
        return Split(images=number, labelled=labelled, bytes=size, class_counts=counts, shards=part, rejected=())

    splits = {"train": split(shards), **({"test": split(shards[:1])} if labelled else {})}
    half = (0.5, 0.5, 0.5)
    manifest = Manifest(dataset="benchmark", image_size=PX, mean=half, std=half, classes=None, avoid=(), splits=splits)
    write_json(folder / "manifest.json", manifest.content())
    return total


# Training


class Enough(BaseException):
    """Ends a stage that was measured far enough."""


def timed(owner: Any, name: str, label: str, seconds: dict[str, float]) -> None:
    """Replace a function by itself with its total time in `seconds`."""
    function = getattr(owner, name)

    def wrapper(*arguments: Any, **options: Any) -> Any:
        start = time.perf_counter()
        try:
            return function(*arguments, **options)
        finally:
            seconds[label] = seconds.get(label, 0.0) + time.perf_counter() - start

    setattr(owner, name, wrapper)


def measure_training(started: float, shards: str, method: dict[str, Any]) -> dict[str, Any]:
    """Return the seconds from the start of the process to the end of the first step, by part, and the peak memory.

    SIGTERM then ends the stage, which writes its checkpoint.
    """
    from memory import peak_bytes  # pyright: ignore[reportMissingImports]

    from ssl_core.experiments.processes import Stop
    from ssl_core.stages import pretrain
    from ssl_core.training.loop import Trainer

    os.environ["SSL_TRACKING"] = "off"
    seconds = {"imports": time.time() - started}
    timed(pretrain.Manifest, "load", "manifest", seconds)
    timed(pretrain, "verify", "indices", seconds)
    timed(pretrain, "_check_memory", "memory check", seconds)
    timed(pretrain, "_probe", "images of the online kNN", seconds)
    timed(pretrain, "draw_first_views", "picture of the views", seconds)
    timed(pretrain, "load_checkpoint", "reading the checkpoint", seconds)
    timed(pretrain, "save_checkpoint", "writing the checkpoint", seconds)
    timed(pretrain.Loader, "next", "first batch and the picture's", seconds)
    result: dict[str, Any] = {}
    step = Trainer._one_step

    def one_step(self: Trainer) -> None:
        step(self)
        result.update(seconds=time.time() - started, mb=peak_bytes() / 1e6)
        os.kill(os.getpid(), signal.SIGTERM)

    Trainer._one_step = one_step
    spec = {
        "dataset": {"name": "benchmark"},
        "backbone": {"name": "resnet18", "stem": "tiny"},
        "method": method,
        "training": {"epochs": 1, "batch_size": 256, "warmup_epochs": 0, "milestones": []},
    }
    with suppress(Stop):
        pretrain.run(
            "large",
            spec=spec,
            code="0",
            manifest=Path(shards, "manifest.json"),
            output=Path("results"),
            checkpoint=Path("checkpoints/large.pt"),
            threads=1,
        )
    checkpoint = Path("checkpoints/large.pt")
    return {**result, "checkpoint_mb": checkpoint.stat().st_size / 1e6, "parts": seconds}


def train(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Measure the start of a pre-training of each size."""
    results = {}
    for images in options.images:
        shards = folder / str(images)
        total = write_data(shards, images, labelled=False)
        method = {"name": "simclr"}
        numbers = in_own_process("training", options, folder / "run", shards=str(shards), method=method)
        results[str(total)] = show(f"training, {total:,} images", numbers)
        shutil.rmtree(shards)
        shutil.rmtree(folder / "run")
    return results


# Evaluation


def measure_evaluation(started: float, shards: str) -> dict[str, Any]:
    """Return the seconds until the features of the first batch, then those of reading the labels of all images."""
    import torch
    from memory import peak_bytes  # pyright: ignore[reportMissingImports]

    from ssl_core.config import Backbone
    from ssl_core.data.shards import read_labels
    from ssl_core.evaluations.parts import features
    from ssl_core.networks.backbones import build_backbone, save_backbone
    from ssl_core.stages import evaluate

    os.environ["SSL_TRACKING"] = "off"
    seconds = {"imports": time.time() - started}
    timed(evaluate.Manifest, "load", "manifest", seconds)
    timed(evaluate, "verify", "indices", seconds)
    timed(features.Loader, "next", "first batch", seconds)
    forward = features.forward
    result: dict[str, Any] = {}

    def first(*arguments: Any) -> Any:
        outputs = forward(*arguments)
        result["numbers_per_image"] = {name: rows.shape[1] for name, rows in outputs.items()}
        raise Enough

    features.forward = first
    torch.manual_seed(0)
    backbone = Backbone(name="resnet18", stem="tiny")
    metadata = {"seed": "0", "mean": "[0.5, 0.5, 0.5]", "std": "[0.5, 0.5, 0.5]"}
    save_backbone(Path("backbone.safetensors"), build_backbone(backbone, PX), backbone, PX, metadata)
    try:
        evaluate.run(
            "large",
            "knn",
            spec={"protocol": "knn", "dataset": {"name": "benchmark"}},
            backbone=Path("backbone.safetensors"),
            manifest=Path(shards, "manifest.json"),
            output=Path("knn.json"),
            code="0",
            threads=1,
        )
    except Enough:
        result.update(seconds=time.time() - started, mb=peak_bytes() / 1e6)
    start = time.perf_counter()
    read_labels(evaluate.Manifest.load(Path(shards, "manifest.json")), "train")
    seconds["labels"] = time.perf_counter() - start
    return {**result, "mb_with_labels": peak_bytes() / 1e6, "parts": seconds}


def evaluate_all(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Measure the start of an evaluation of each size, and compute the size of its features."""
    results = {}
    for images in options.images:
        shards = folder / str(images)
        total = write_data(shards, images, labelled=True)
        numbers = in_own_process("evaluation", options, folder / "run", shards=str(shards))
        if "numbers_per_image" in numbers:
            numbers["features_gb"] = total * 4 * sum(numbers["numbers_per_image"].values()) / 1e9
        results[str(total)] = show(f"evaluation, {total:,} images", numbers)
        shutil.rmtree(shards)
        shutil.rmtree(folder / "run")
    return results


# Checkpoint


def measure_checkpoints(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Measure NPID's checkpoint in two processes, of which the second continues; compute larger ones."""
    shards = folder / "shards"
    total = write_data(shards, options.bank, labelled=False)
    method = {"name": "npid", "embedding_dim": BANK_DIM}
    results = {}
    for label in ("start", "continued"):
        numbers = in_own_process("training", options, folder / "run", shards=str(shards), method=method)
        results[label] = show(f"NPID, {total:,} x {BANK_DIM}, {label}", numbers)
    for images in options.images:
        for dim in (BANK_DIM, 2048):
            gb = images * dim * 4 / 1e9
            results[f"{images} x {dim}, computed"] = show(f"NPID's bank, {images:,} x {dim}, computed", {"gb": gb})
    return results


# Dry run


def measure_snakemake(started: float, command: list[str], place: str) -> dict[str, Any]:
    """Return seconds, processor seconds and peak memory of a command; this process has imported little."""
    path = os.pathsep.join([str(Path(place, "bin")), str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = {**os.environ, "PYTHONPATH": place, "PATH": path}
    start = time.perf_counter()
    run = subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True)
    seconds = time.perf_counter() - start
    if run.returncode:
        sys.exit(run.stdout + run.stderr)
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    jobs = [line.split()[1] for line in run.stdout.splitlines() if line.startswith("total ")][-1]
    return {
        "seconds": seconds,
        "processor_seconds": usage.ru_utime + usage.ru_stime,
        "mb": usage.ru_maxrss * 1024 / 1e6,
        "jobs": int(jobs),
    }


def plan(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Measure the dry run of many experiments, and of as many jobs in a Snakefile without our code."""
    import copy

    from tests.workflow.conftest import CONFIG, make_project

    results = {}
    ours, bare = folder / "ours", folder / "bare"
    for place in (ours, bare):
        place.mkdir(parents=True)
    project = make_project(ROOT, ours)
    names = [f"large{number}" for number in range(options.experiments)]
    evaluations = {f"knn{k}": {"protocol": "knn", "k": k} for k in range(1, EVALUATIONS + 1)}
    base = CONFIG["experiments"]["first"]
    project.configure({"experiments": {name: copy.deepcopy(base) for name in names}, "evaluations": evaluations})
    (bare / "Snakefile").write_text(BARE.format(experiments=names, evaluations=list(evaluations)), encoding="utf-8")
    command = ["snakemake", "--cores", "2", "--nocolor", "-n", "--quiet", "rules"]
    for label, place in (("ours", ours), ("bare", bare)):
        numbers = in_own_process("snakemake", options, folder, command=command, place=str(place))
        results[label] = show(f"dry run, {options.experiments} x {EVALUATIONS}, {label}", numbers)
    return results


BARE = """EXPERIMENTS = {experiments}
EVALUATIONS = {evaluations}
PICTURES = ("views", "curves")
RESULTS = expand("results/{{experiment}}/{{evaluation}}.json", experiment=EXPERIMENTS, evaluation=EVALUATIONS)
rule all:
    input: RESULTS, expand("results/{{e}}/{{p}}.png", e=EXPERIMENTS, p=PICTURES), "results/table.csv"
rule shard:
    output: "shards/tiny/manifest.json"
    shell: "touch {{output}}"
rule pretrain:
    input: "shards/tiny/manifest.json"
    output:
        "results/{{experiment}}/backbone.safetensors", "results/{{experiment}}/model.safetensors",
        "results/{{experiment}}/pretrain.json", "results/{{experiment}}/history.csv"
    shell: "touch {{output}}"
rule evaluate:
    input: "results/{{experiment}}/backbone.safetensors", "shards/tiny/manifest.json"
    output: "results/{{experiment}}/{{evaluation}}.json"
    wildcard_constraints: evaluation="|".join(EVALUATIONS)
    shell: "touch {{output}}"
rule views:
    input: "shards/tiny/manifest.json"
    output: "results/{{experiment}}/views.png"
    shell: "touch {{output}}"
rule curves:
    input: "results/{{experiment}}/history.csv"
    output: "results/{{experiment}}/curves.png"
    shell: "touch {{output}}"
rule table:
    input: RESULTS, expand("results/{{experiment}}/pretrain.json", experiment=EXPERIMENTS)
    output: "results/table.csv"
    shell: "touch {{output}}"
"""


# Tracking


def record_stage(stage: str, experiment: str) -> None:
    """Record one stage as the stages do, and wait until MLflow has all of it."""
    from ssl_core.tracking import run as tracking

    parameters = {"method": {"name": "simclr"}, "backbone": {"name": "resnet18"}, "training": {"epochs": 200}}
    with tracking.start(stage, experiment, digest="0" * 64, parameters=parameters) as run:
        run.dataset("benchmark", "0" * 64, num_images=1, source=Path("manifest.json"))
        if stage == "pretrain":
            for step in range(ROWS):
                run.metrics({f"loss/{number}": float(step) for number in range(8)}, step=step)
        run.headline({f"{stage}/v1 top1": 50.0})
    if run._recorder is None or run._recorder.poll() != 0:
        raise SystemExit("MLflow did not accept the record in time")


def measure_record(started: float, stage: str, experiment: str) -> dict[str, Any]:
    """Return the seconds of the record of a stage, the start of its side process included."""
    start = time.perf_counter()
    record_stage(stage, experiment)
    seconds = time.perf_counter() - start
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return {
        "seconds": seconds,
        "processor_seconds": usage.ru_utime + usage.ru_stime,
        "mb": usage.ru_maxrss * 1024 / 1e6,
    }


def measure_leaderboard(started: float) -> dict[str, Any]:
    """Return the seconds of the leaderboard's query for its first 100 rows, the second of two."""
    os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
    from memory import peak_bytes  # pyright: ignore[reportMissingImports]
    from mlflow.tracking import MlflowClient

    from ssl_core.tracking.recorder import EXPERIMENT, own_database

    client = MlflowClient(own_database())
    experiment = client.get_experiment_by_name(EXPERIMENT)
    assert experiment is not None
    times = []
    for _ in range(2):
        start = time.perf_counter()
        order = ["metrics.`knn1/v1 top1` DESC"]
        runs = client.search_runs([experiment.experiment_id], "tags.stage = 'experiment'", 1, 100, order)
        times.append(time.perf_counter() - start)
    return {"seconds": times[1], "first": times[0], "rows": len(runs), "mb": peak_bytes() / 1e6}


def fill(database: Path, runs: int) -> int:
    """Copy the runs of a database under new names until it has so many; return their number."""
    import sqlite3
    import uuid
    from contextlib import closing

    with closing(sqlite3.connect(database)) as connection, connection:
        tables = [row[0] for row in connection.execute("select name from sqlite_master where type = 'table'")]
        columns = {table: [row[1] for row in connection.execute(f"pragma table_info({table})")] for table in tables}
        of_runs = [table for table in tables if "run_uuid" in columns[table]]
        template = [row[0] for row in connection.execute("select run_uuid from runs")]
        connection.execute("create temp table names (number, old, new)")
        for number in range(runs // len(template) - 1):
            connection.executemany(
                "insert into names values (?, ?, ?)", [(number, old, uuid.uuid4().hex) for old in template]
            )
        connection.execute("create index temp.by_old on names (old)")
        for table in of_runs:
            names = columns[table]
            values = ["names.new" if name == "run_uuid" else f"{table}.{name}" for name in names]
            if table == "tags":  # the version and the parent run are other ones too
                parent = "(select new from names as other where other.old = tags.value and other.number = names.number)"
                values[names.index("value")] = (
                    f"case tags.key when 'mlflow.parentRunId' then {parent} "
                    "when 'version' then 'copy' || names.number || tags.value else tags.value end"
                )
            connection.execute(
                f"insert into {table} ({', '.join(names)}) select {', '.join(values)} "
                f"from {table} join names on {table}.run_uuid = names.old"
            )
        (count,) = connection.execute("select count(*) from runs").fetchone()
    return count


def track(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Measure a record and a query in a small database, then in a large one."""
    results: dict[str, Any] = {}
    stages = ["pretrain", *(f"knn{number}" for number in range(1, STAGES))]
    for stage in stages:
        in_own_process("record", options, folder, stage=stage, experiment="template")
    database = folder / "mlflow.db"
    count = STAGES + 1
    for name in ("small", "large"):
        if name == "large":
            count = fill(database, options.runs)
        for stage in stages[:2]:
            numbers = in_own_process("record", options, folder, stage=stage, experiment=name)
            results[f"{stage}, {count} runs"] = show(f"record of {stage}, {count:,} runs", numbers)
        numbers = in_own_process("leaderboard", options, folder)
        results[f"leaderboard, {count} runs"] = show(f"leaderboard, {count:,} runs", numbers)
    return {**results, "mlflow_db_mb": database.stat().st_size / 1e6}


PARTS: dict[str, Callable[[Path, argparse.Namespace], dict[str, Any]]] = {
    "training": train,
    "evaluation": evaluate_all,
    "checkpoint": measure_checkpoints,
    "dry_run": plan,
    "tracking": track,
}
MEASUREMENTS: dict[str, Callable[..., dict[str, Any]]] = {
    "training": measure_training,
    "evaluation": measure_evaluation,
    "snakemake": measure_snakemake,
    "record": measure_record,
    "leaderboard": measure_leaderboard,
}


if __name__ == "__main__":
    main()
